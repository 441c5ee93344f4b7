"""What `ctxseg doctor` tells of the machine: versions, extras, device, cache and disk. It asks no network."""

import os
import platform
import shutil
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, metadata, requires, version
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants, get_token
from packaging.requirements import Requirement

from .doctor import Finding

PACKAGE = "hf-ctxseg"
_SCARCE = 2 * 2**30  # bytes of free disk below which a training may end


def examine_environment() -> list[Finding]:
    """Look at what the package runs on; nothing is changed.

    Returns:
        A line for the versions, each requirement that is not met, each extra, the device, the cache and the disks.
    """
    return [*_versions(), *_extras(), *_devices(), *_cache(), *_disks()]


def _versions() -> Iterator[Finding]:
    yield Finding("ok", PACKAGE, f"{version(PACKAGE)}, Python {platform.python_version()}, {platform.platform()}")
    met = []
    for requirement in _requirements(""):
        found = _installed(requirement)
        if found is None or not requirement.specifier.contains(found, prereleases=True):
            what = "not installed" if found is None else found
            fix = f"needed is {requirement.specifier}: pip install '{requirement.name}{requirement.specifier}'"
            yield Finding("fail", requirement.name, f"{what}; {fix}")
        else:
            met.append(f"{requirement.name} {found}")
    yield Finding("ok", "packages", ", ".join(met))


def _extras() -> Iterator[Finding]:
    for extra in metadata(PACKAGE).get_all("Provides-Extra") or []:
        needed = [item for item in _requirements(extra) if item not in _requirements("")]
        lacking = [
            f"{item.name}{item.specifier}"
            for item in needed
            if (found := _installed(item)) is None or not item.specifier.contains(found, prereleases=True)
        ]
        if lacking:
            hint = f"without {', '.join(lacking)}: pip install '{PACKAGE}[{extra}]'"
            yield Finding("note", f"extra {extra}", hint)
        else:
            yield Finding("ok", f"extra {extra}", ", ".join(f"{item.name} {_installed(item)}" for item in needed))


def _requirements(extra: str) -> list[Requirement]:
    """What the package asks for on this Python; with the name of an extra, that extra's too."""
    listed = [Requirement(text) for text in requires(PACKAGE) or []]
    return [item for item in listed if item.marker is None or item.marker.evaluate({"extra": extra})]


def _installed(requirement: Requirement) -> str | None:
    try:
        return version(requirement.name)
    except PackageNotFoundError:
        return None


def _devices() -> Iterator[Finding]:
    for index in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(index)
        bf16 = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "no bf16"
        yield Finding("ok", f"GPU {index}", f"{facts.name}, {facts.total_memory / 2**30:.0f} GiB, {bf16}")
    if torch.backends.mps.is_available():
        yield Finding("ok", "GPU", "Apple's, by mps")
    able: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # not in every torch that is allowed
    fast = [name for name in ("avx512_bf16", "amx_bf16", "bf16") if able.get(name)]
    bf16 = f"bf16 by {', '.join(fast)}" if fast else "no instructions for bf16: --bf16 would be slower than float32"
    kind = torch.backends.cpu.get_cpu_capability()
    yield Finding("ok", "CPU", f"{torch.get_num_threads()} threads on {os.cpu_count()} cores, {kind}, {bf16}")


def _cache() -> Iterator[Finding]:
    folder = Path(constants.HF_HUB_CACHE)
    there = _nearest(folder)
    text = f"{folder}{'' if folder.is_dir() else ' (made when needed)'}"
    if os.access(there, os.W_OK):
        yield Finding("ok", "cache", text)
    else:
        yield Finding("fail", "cache", f"{text} cannot be written: set HF_HOME to a folder of yours")
    if constants.HF_HUB_OFFLINE:
        yield Finding("note", "Hub", "offline by HF_HUB_OFFLINE: only what the cache holds can be opened")
    else:
        login = "a token is stored" if get_token() else "no token: `hf auth login` before ctxseg push"
        yield Finding("ok", "Hub", f"{constants.ENDPOINT} is asked for what the cache lacks; {login}")


def _disks() -> Iterator[Finding]:
    for subject, folder in (("disk here", Path.cwd()), ("disk of cache", _nearest(Path(constants.HF_HUB_CACHE)))):
        free = shutil.disk_usage(folder).free
        scarce = free < _SCARCE
        hint = ": checkpoints or downloads may not fit" if scarce else ""
        yield Finding("note" if scarce else "ok", subject, f"{free / 2**30:.1f} GiB free{hint}")


def _nearest(folder: Path) -> Path:
    """The folder, or the one above it that is there."""
    return next(path for path in (folder, *folder.absolute().parents) if path.is_dir())
