"""The state dict in a checkpoint: found in what wraps it, checked, and with the names that a model gave it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from .safe_pickle import StandIn, module_tensors, read_pickle
from .wording import listed_tensors

# Where training loops put it. An average of the weights comes first: it is what such a loop evaluates.
_AVERAGES = ("ema_state_dict", "state_dict_ema", "model_ema", "ema_model", "ema")
_ENTRIES = ("state_dict", "model_state_dict", "model_state", "model", "net", "network", "module", "weights")
# What wrappers put before every name: DataParallel, torch.compile, Lightning, and losses beside the network.
_PREFIXES = ("module.", "_orig_mod.", "model.", "net.", "network.")
_SLACK = 1 << 20  # bytes by which small files may share more
# Tensors that every checkpoint of a kind has, under a name that no other uses.
MARKS = {
    "torchvision": ("classifier.0.project.0.weight",),
    "smp": ("segmentation_head.0.weight",),
    "mmseg": ("decode_head.conv_seg.weight",),
    "caffe": tuple(f"{wrapper}layer1.conv1.conv.weight" for wrapper in ("base.", "scale.", "")),
}


def read_checkpoint(path: str | Path) -> Any:
    """Read a safetensors file or a pickle of PyTorch; raises `ValueError` if it is neither, or not whole."""
    path = Path(path)
    if path.suffix != ".safetensors":
        return read_pickle(path)
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is no whole safetensors file ({error}): download or save it again.") from error


def find_state_dict(
    content: Any, source: str, size: int, *, entry: str | None = None
) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Find the tensors of the network in what a file holds.

    Args:
        content: What `read_checkpoint` gave.
        source: The file, for messages.
        size: Its bytes, which no tensor may exceed, nor all together by far.
        entry: Entry of the checkpoint to take; None: an average of the weights (EMA) where there is one, which
            mmengine keeps in `state_dict`, else the first of the usual entries.

    Returns:
        The state dict in float32, without prefixes that wrappers put before its names and without what they hold
        beside the network (a loss's weights); and notes on what was done.

    Raises:
        ValueError: If there is no state dict, or more than one network, or a tensor is not a plain one of finite
            numbers.
    """
    notes: list[str] = []
    found, name = _entry(content, source, entry)
    if name:
        others = [key for key in (*_AVERAGES, *_ENTRIES) if key != name and _as_tensors(content.get(key))]
        beside = f"; not taken: {', '.join(others)}" if others else ""
        notes.append(f"Weights from the entry {name!r} of the checkpoint{beside}.")
    tensors = _network(_without_prefixes(found, notes), source, notes)
    _check(tensors, source, size)
    kinds = sorted({str(value.dtype) for value in tensors.values() if value.is_floating_point()} - {"torch.float32"})
    if kinds:
        notes.append(f"Stored as {', '.join(kinds)}, given as float32.")
        tensors = {key: value.float() if value.is_floating_point() else value for key, value in tensors.items()}
    return tensors, notes


def _entry(content: Any, source: str, entry: str | None) -> tuple[dict[str, torch.Tensor], str]:
    """The tensors and the name of the entry they were in, empty if there was none."""
    if entry is not None:
        found = _as_tensors(content.get(entry)) if isinstance(content, Mapping) else None
        if not found:
            there = ", ".join(map(str, list(content)[:20])) if isinstance(content, Mapping) else "no entries"
            raise ValueError(f"{source} has no state dict in an entry {entry!r}: it has {there}.")
        return found, entry
    if found := _as_tensors(content):
        return found, ""
    if isinstance(content, Mapping):
        # mmengine puts the average into state_dict and the plain weights beside it.
        order = (*_ENTRIES, *_AVERAGES) if "meta" in content else (*_AVERAGES, *_ENTRIES)
        for key in order:
            if found := _as_tensors(content.get(key)):
                return found, key
    kind = f"a dict of {', '.join(map(str, list(content)[:20]))}" if isinstance(content, Mapping) else type(content)
    raise ValueError(f"{source} holds no state dict, but {kind}: name the entry with --entry, or save a state dict.")


def _as_tensors(value: Any) -> dict[str, torch.Tensor] | None:
    """The value as a state dict if it is one, or a module."""
    if isinstance(value, StandIn):
        return module_tensors(value)
    if not isinstance(value, Mapping) or not value or not all(isinstance(key, str) for key in value):
        return None
    tensors = {key: item.detach() for key, item in value.items() if isinstance(item, torch.Tensor)}
    # Beside its tensors, a state dict may hold counters of a wrapper, but no other part of a checkpoint.
    rest = [item for item in value.values() if not isinstance(item, (torch.Tensor, int, float, type(None)))]
    return tensors if tensors and not rest else None


def _without_prefixes(tensors: dict[str, torch.Tensor], notes: list[str]) -> dict[str, torch.Tensor]:
    tensors = {key: value for key, value in tensors.items() if key not in ("n_averaged", "steps")}
    # Of no tensors at all, every prefix would be common for ever.
    while tensors and (
        prefix := next((each for each in _PREFIXES if all(key.startswith(each) for key in tensors)), "")
    ):
        notes.append(f"The prefix {prefix!r} was taken from every name.")
        tensors = {key.removeprefix(prefix): value for key, value in tensors.items()}
    return tensors


def _network(tensors: dict[str, torch.Tensor], source: str, notes: list[str]) -> dict[str, torch.Tensor]:
    """The network alone, where a training loop saved it under a name of its own, beside others' tensors."""
    if not tensors:
        raise ValueError(f"{source} holds counters of an average, but no weights: give a checkpoint that has them.")
    marks = sorted((mark for each in MARKS.values() for mark in each), key=len, reverse=True)
    if any(mark in tensors for mark in marks):
        return tensors
    ends = ((key, next((mark for mark in marks if key.endswith(f".{mark}")), "")) for key in tensors)
    prefixes = sorted({key.removesuffix(mark) for key, mark in ends if mark})
    if not prefixes:
        return tensors
    if len(prefixes) > 1:
        raise ValueError(
            f"{source} holds {len(prefixes)} networks, under {', '.join(map(repr, prefixes[:10]))}: save the state "
            "dict of the one to convert, torch.save(model.state_dict(), FILE)."
        )
    prefix = prefixes[0]
    rest = [plain_text(key) for key in tensors if not key.startswith(prefix)]
    dropped = f"; left out, as no part of the network: {listed_tensors(rest)}" if rest else ""
    whose = "the network's names" if rest else "every name"
    notes.append(f"The prefix {plain_text(prefix)!r} was taken from {whose}{dropped}.")
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def _check(tensors: dict[str, torch.Tensor], source: str, size: int) -> None:
    odd = [
        key
        for key, value in tensors.items()
        if value.layout != torch.strided or value.is_quantized or value.is_complex() or value.device.type != "cpu"
    ]
    if odd:
        raise ValueError(
            f"{source} holds sparse, quantised or complex tensors, or none at all: {listed_tensors(odd)}."
        )
    sizes = {key: value.numel() * value.element_size() for key, value in tensors.items()}
    if large := [key for key, claimed in sizes.items() if claimed > size]:
        raise ValueError(f"{source} is smaller than tensors that it claims to hold: {listed_tensors(large)}.")
    # Tied weights are stored once; tensors that share far more would fill the memory when copied.
    if (claimed := sum(sizes.values())) > 2 * size + _SLACK:
        raise ValueError(
            f"{source} has {size} bytes, but its {len(sizes)} tensors, which share them, would take {claimed}: save "
            "the state dict of a model, without other views of its tensors."
        )
    if broken := [key for key, value in tensors.items() if value.is_floating_point() and not value.isfinite().all()]:
        raise ValueError(
            f"{source} holds NaN or infinite values in {listed_tensors(broken)}: take an earlier checkpoint."
        )


def plain_text(text: str) -> str:
    """One line without control characters, of a text that a checkpoint holds."""
    return " ".join("".join(char if char.isprintable() else " " for char in text).split())
