"""How much memory a look at a picture takes, and how much there is: whether a picture is looked at as a whole."""

import re
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_UNITS = {"": 1, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}
_CPU_DEFAULT = 2 << 30
_CGROUP = Path("/sys/fs/cgroup")


def parse_bytes(text: str | int) -> int:
    """Read an amount of memory: a number of bytes, or one with a unit such as `2GiB` or `500 MB`.

    Raises:
        ValueError: If it is none, or not above 0.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]I?)?B?\s*", str(text).upper())
    amount = int(float(found[1]) * _UNITS[found[2] or ""]) if found else 0
    if amount < 1:
        raise ValueError(f"{text!r} is no amount of memory: give bytes, or a number and its unit such as 2GiB.")
    return amount


def format_bytes(amount: float) -> str:
    """Write an amount of memory as people do: `2.5 GiB`."""
    for unit in ("GiB", "MiB"):
        if amount >= (size := int(_UNITS[unit[:2].upper()])):
            return f"{amount / size:.1f} {unit}"
    return f"{amount / 1024:.1f} KiB"


def default_budget(device: torch.device) -> int:
    """What may be taken where nothing is said: of a GPU four fifths of what is free, else half, up to 2 GiB."""
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return (torch.cuda.mem_get_info(device)[0] + kept) * 4 // 5
    return min(_CPU_DEFAULT, available_memory() // 2)


def available_memory() -> int:
    """Bytes of main memory that a process can still take, within the limit of its container where there is one."""
    import psutil

    free = int(psutil.virtual_memory().available)
    try:  # version 2 of Linux's control groups
        limit, used = ((_CGROUP / f"memory.{name}").read_text(encoding="ascii").strip() for name in ("max", "current"))
        statistics = dict(line.split() for line in (_CGROUP / "memory.stat").read_text(encoding="ascii").splitlines())
        if limit != "max":
            free = min(free, int(limit) - int(used) + int(statistics["inactive_file"]))
    except (OSError, ValueError, KeyError):
        pass
    return max(free, 0)


def measured_need(look: Callable[[], Any]) -> int:
    """Bytes that calling a function takes: of all tensors alive at once, and half as much for operations inside."""
    with _LiveBytes() as live:
        look()
    return live.most * 3 // 2


class _LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of the tensors that are made within and alive: on any device, and the same each time.

    What an operation takes for itself and gives back is not seen: on a CPU up to two fifths of what is, by the
    process's own peak.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.most = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        before = {_key(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)}
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and _key(leaf) not in before | self._known:
                self._count(leaf.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage.data_ptr(), storage.nbytes()
        self._known.add(key)
        self.now += size
        self.most = max(self.most, self.now)

        def forget() -> None:
            self.now -= size
            self._known.discard(key)

        weakref.finalize(storage, forget)


def _key(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
