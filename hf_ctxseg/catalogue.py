"""Which timm networks serve as backbones, found by building and running each instead of believing a list.

A network is built without memory at several strides and its maps are measured, which takes about a second. What was
found is kept in Hugging Face's cache folder, for as long as timm, torch and the check stay as they are.
"""

import contextlib
import difflib
import hashlib
import inspect
import json
import multiprocessing
import os
import signal
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import timm
import torch
from huggingface_hub import constants

from .backbone import reachable_strides
from .backbone_probe import probe
from .configuration_ctxseg import check_number

_SAVE_EVERY = 50


@dataclass(frozen=True)
class BackboneInfo:
    """What a timm network gives as a backbone.

    Attributes:
        name: timm's name.
        strides: Output strides that it reaches: its native one alone where it cannot dilate, none where it is of no
            use.
        channels: Channels of its deepest map.
        parameters: Parameters up to its deepest map.
        low_level: Whether it has a map of stride 4, which DeepLabv3+ takes.
        reason: Why it is of no use; empty where it is.
    """

    name: str
    strides: tuple[int, ...] = ()
    channels: int = 0
    parameters: int = 0
    low_level: bool = False
    reason: str = ""


def list_backbones(pattern: str = "*", output_stride: int | None = None, processes: int = 1) -> list[BackboneInfo]:
    """List the timm networks that serve as backbones; the first time, each takes about a second.

    Args:
        pattern: timm's name, with the wildcards `*`, `?` and `[…]`.
        output_stride: Only networks that reach this stride; None: at least one.
        processes: As for `check_backbones`.

    Raises:
        ValueError: If no name matches, with near names, or the stride is no whole number above 0.
    """
    return [found for found in check_backbones(backbone_names(pattern), processes) if serves(found, output_stride)]


def serves(found: BackboneInfo, output_stride: int | None) -> bool:
    """Whether a network reaches a stride, or any where None is given; raises `ValueError` for a stride below 1."""
    if output_stride is None:
        return bool(found.strides)
    check_number("output_stride", output_stride, 1, float("inf"), int)
    return output_stride in found.strides


def backbone_names(pattern: str) -> list[str]:
    """Give timm's names that match a pattern; none raises `ValueError` with near names."""
    known = timm.list_models()
    if names := [name for name in known if fnmatchcase(name, pattern)]:
        return names
    plain = pattern.strip("*")
    near = difflib.get_close_matches(plain, known, n=3)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    raise ValueError(
        f"timm {timm.__version__} has no backbone {pattern!r}: {hint}Wildcards find parts of names: '*{plain[:6]}*'."
    )


def check_backbones(names: Sequence[str], processes: int = 1) -> Iterator[BackboneInfo]:
    """Check networks one after the other, in the order of their names; those checked before come from the cache.

    Args:
        names: timm's names.
        processes: Processes that share the work. A program that asks for more than one must guard its main module, as
            `multiprocessing` demands.
    """
    known = _read_cache()
    missing = [name for name in names if name not in known]
    fresh: dict[str, BackboneInfo] = {}
    with contextlib.ExitStack() as stack:
        stack.callback(lambda: _write_cache(fresh))  # what was found so far, when the caller stops early too
        results: Iterator[BackboneInfo] = map(check_backbone, missing)
        if processes > 1 and missing:
            context = multiprocessing.get_context("spawn")
            pool = stack.enter_context(context.Pool(processes, signal.signal, (signal.SIGINT, signal.SIG_IGN)))
            results = pool.imap(check_backbone, missing)
        for name in names:
            if name not in known:
                fresh[name] = next(results)
                if len(fresh) % _SAVE_EVERY == 0:  # a process that is killed outright runs no callback
                    _write_cache(fresh)
            yield known.get(name) or fresh[name]


def check_backbone(name: str) -> BackboneInfo:
    """Build and run a network at its own stride and at 8 and 16, and tell what it gives."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of timm, on names that it has renamed
        try:
            native = probe(name)
        except ValueError as error:
            return BackboneInfo(name, reason=" ".join(str(error).split()))
        strides = tuple(reachable_strides(name))
    return BackboneInfo(name, strides, native.channels[-1], native.num_parameters, 4 in native.reductions[:-1])


def _cache_file() -> Path:
    parts = (BackboneInfo, reachable_strides, probe)
    check = [inspect.getsource(sys.modules[part.__module__]) for part in parts]
    digest = hashlib.sha256("\n".join([torch.__version__, *check]).encode()).hexdigest()[:12]
    return Path(constants.HF_HOME) / "ctxseg" / f"backbones-timm-{timm.__version__}-{digest}.json"


def _read_cache() -> dict[str, BackboneInfo]:
    try:
        content = json.loads(_cache_file().read_text(encoding="utf-8"))
        return {name: BackboneInfo(**{**row, "strides": tuple(row["strides"])}) for name, row in content.items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):  # not there, not readable, not whole
        return {}


def _write_cache(fresh: Mapping[str, BackboneInfo]) -> None:
    """Add to the cache; a folder that cannot be written to is no error."""
    # A network that a user has registered with timm may change under its name.
    rows = {name: found for name, found in fresh.items() if _is_of_timm(name)}
    if not rows:
        return
    content: dict[str, Any] = {name: asdict(found) for name, found in {**_read_cache(), **rows}.items()}
    with contextlib.suppress(OSError):
        file = _cache_file()
        file.parent.mkdir(parents=True, exist_ok=True)
        handle, partial = tempfile.mkstemp(dir=file.parent, suffix=".partial")
        try:
            with open(handle, "w", encoding="utf-8") as stream:
                json.dump(content, stream)
            os.replace(partial, file)
        except BaseException:
            os.unlink(partial)
            raise


def _is_of_timm(name: str) -> bool:
    return timm.models.model_entrypoint(name).__module__.startswith("timm.")
