"""Checkpoints that are pickles, read without running anything that they name.

torch's unpickler for weights (`torch.load(weights_only=True)`) builds tensors and plain containers and refuses all
else; its rules are in the documentation of `torch.serialization`. Training loops leave more in a checkpoint:
histories, arguments, dates, NumPy scalars, or the whole module. Each such name is answered by a stand-in, a class of
our own that takes what it is given and does nothing: no module that a file names is imported, no function of it
called. An object is met so wherever its class comes from; a *call* only where the name is that of a known leftover, so
that a pickle made to run code is refused as such.
"""

import pickle
import pickletools
import re
import sys
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

MAX_TENSORS = 100_000

# Names that may be called (pickle's REDUCE) without the file counting as one with code: reconstruction of data.
_CALLED = re.compile(
    r"numpy\.(_?core\.multiarray\.(_reconstruct|scalar)|_?core\.numeric\._frombuffer|dtype|dtypes\.\w+"
    r"|random\._pickle\.__\w+_ctor)"
    r"|copyreg\._reconstructor|builtins\.(getattr|object|list|dict|tuple|int|float|str|bytes|frozenset|slice|range)"
    r"|functools\.partial|collections\.\w+|datetime\.\w+|pathlib\.\w+|argparse\.Namespace|uuid\.UUID|decimal\.Decimal|typing\.\w+"
    r"|(mmengine|mmcv|mmseg|omegaconf|yacs|addict|easydict)\..+"
)
# Classes of the standard library, torch and NumPy that may stand as objects (pickle's NEWOBJ), beside all others'.
_OBJECTS = re.compile(
    r"numpy\.(ndarray|random\.\w+|\w*\d+|bool_?)|types\.SimpleNamespace|enum\.\w+"
    r"|torch\.(nn\.(modules|parallel)\..+|optim\..+|cuda\.amp\..+|amp\..+|torch_version\.TorchVersion)"
)
_DICTS = ("Dict", "CfgNode")  # subclasses of dict, whose entries the unpickler gives to plain dicts only


class StandIn:
    """What stands for an object of another package: it keeps the state it is given, as data, and can do nothing."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:  # noqa: D102
        return object.__new__(cls)

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Called(StandIn):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Take the arguments of a call that never takes place."""


class _Uncalled(StandIn):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise pickle.UnpicklingError(f"GLOBAL {type(self).__name__} is called")


class _DictStandIn(StandIn):
    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        return OrderedDict()


def read_pickle(path: str | Path) -> Any:
    """Read a file that `torch.save` wrote, in its present (zip) or its first format.

    Args:
        path: The file (`.pth`, `.pt`, `.bin`, `.ckpt`, `.pkl`).

    Returns:
        What was saved: tensors on the CPU, plain containers, and `StandIn` objects for everything else.

    Raises:
        ValueError: If the file is no such file, is cut short, claims more than it holds, or calls a function.
    """
    path = Path(path)
    protocol = 0
    try:
        names, protocol = _names_in_zip(path) if zipfile.is_zipfile(path) else _names_in_legacy(path)
        with torch.serialization.safe_globals(_stand_ins(names)), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about old storages and protocols
            return torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except pickle.UnpicklingError as error:
        inner = error.__context__ or error  # torch puts advice of its own, to load it all the same, before the reason
        raise ValueError(_refusal(path, str(inner), protocol)) from error
    except Exception as error:  # a torn or forged pickle ends in errors of any kind
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{path} is no whole PyTorch checkpoint ({reason}): download or save it again.") from error


def _refusal(path: Path, reason: str, protocol: int) -> str:
    reason = reason.splitlines()[0]
    if reason.startswith("Unsupported operand") and protocol > torch.serialization.DEFAULT_PROTOCOL:
        return (
            f"{path} is whole, but was saved with pickle protocol {protocol}, which is not read: save it with torch's "
            "default protocol, torch.save(model.state_dict(), FILE)."
        )
    if name := re.search(r"GLOBAL ([\w.]+)", reason):
        reason = f"the pickle names {name[1]} as something to build or call"
    elif not reason.startswith(("Trying to call", "Can only")):
        return f"{path} is no whole PyTorch checkpoint ({reason}): download or save it again."
    return (
        f"{path} is refused: it holds more than weights ({reason}). Nothing of it was run. If you trust its origin, "
        "save the state dict alone there: torch.save(model.state_dict(), FILE)."
    )


def _names_in_zip(path: Path) -> tuple[set[str], int]:
    """The classes and functions that the pickle in a zip archive names, and its protocol."""
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise ValueError("a zip archive with compressed entries: unpack it, and give the checkpoint in it")
        if sum(entry.file_size for entry in entries) > path.stat().st_size:
            raise ValueError("a zip archive whose entries overlap")
        if any(entry.filename.endswith("/constants.pkl") for entry in entries):
            raise ValueError("a TorchScript program: save the state dict of the model that it was made from")
        pickles = [entry for entry in entries if entry.filename.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise ValueError("a zip archive, but not one that torch.save writes: it has no single data.pkl")
        with archive.open(pickles[0]) as stream:
            return _names(stream)


def _names_in_legacy(path: Path) -> tuple[set[str], int]:
    """The same of the pickles that a file of the first format starts with: magic number, version, system, content."""
    with path.open("rb") as stream:
        found = [_names(stream) for _ in range(4)]
    return set().union(*(names for names, _ in found)), max(protocol for _, protocol in found)


def _names(stream: Any) -> tuple[set[str], int]:
    names: set[str] = set()
    protocol = 0
    for opcode, argument, _ in pickletools.genops(stream):
        if opcode.name == "PROTO":
            protocol = int(argument or 0)
        elif opcode.name == "GLOBAL":
            module, _, name = str(argument).partition(" ")
            names.add(f"{ {'__builtin__': 'builtins', 'copy_reg': 'copyreg'}.get(module, module) }.{name}")
    return names, protocol


def _stand_ins(names: set[str]) -> list[Any]:
    """Pairs (what stands for a name, the name), for those names that may be met so; the unpickler refuses the rest."""
    found: list[Any] = []
    for name in sorted(names):
        root = name.partition(".")[0]
        if name in ("collections.defaultdict", "collections.deque"):
            found.append((_plain_dict if name.endswith("dict") else _plain_list, name))
        elif name.endswith(_DICTS) and root not in ("collections", "torch"):
            found.append((_DictStandIn, name))
        elif _CALLED.fullmatch(name):
            found.append((type(name, (_Called,), {}), name))
        elif _OBJECTS.fullmatch(name) or root not in {*sys.stdlib_module_names, "torch", "numpy"}:
            found.append((type(name, (_Uncalled,), {}), name))
    return found


def _plain_dict(*_: Any) -> dict[Any, Any]:
    return {}


def _plain_list(*_: Any) -> list[Any]:
    return []


def module_tensors(module: StandIn) -> dict[str, torch.Tensor] | None:
    """The state dict of a module that was pickled whole, or None if this is something else.

    Args:
        module: What stands for it.

    Raises:
        ValueError: If it holds more than `MAX_TENSORS` tensors or modules: it may contain itself.
    """
    if not _is_module(module):
        return None
    tensors: dict[str, torch.Tensor] = {}
    waiting, visited = [("", module)], 0
    while waiting:
        prefix, part = waiting.pop()
        visited += 1
        if max(visited, len(tensors)) > MAX_TENSORS:
            raise ValueError("The pickled module is too large, or contains itself: save its state_dict() instead.")
        temporary = part.state.get("_non_persistent_buffers_set") or ()
        for kind in ("_parameters", "_buffers"):
            for name, value in part.state[kind].items():
                if isinstance(value, torch.Tensor) and name not in temporary:
                    tensors[f"{prefix}{name}"] = value.detach()
        children = [(f"{prefix}{name}.", child) for name, child in part.state["_modules"].items()]
        waiting += [(name, child) for name, child in reversed(children) if _is_module(child)]
    return tensors


def _is_module(value: Any) -> bool:
    parts = ("_parameters", "_buffers", "_modules")
    return (
        isinstance(value, StandIn)
        and isinstance(state := getattr(value, "state", None), Mapping)
        and all(isinstance(state.get(part), Mapping) for part in parts)
    )
