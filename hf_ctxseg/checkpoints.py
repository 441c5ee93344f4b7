"""Checkpoints that are whole or not there.

A checkpoint is written under a temporary name beside its place, every file is brought to the disk and listed with its
size and SHA-256 in `manifest.json`, and only then is the folder renamed. A folder `checkpoint-N` whose manifest agrees
is therefore complete, whenever the process was killed; what was cut short still has the temporary name.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

MANIFEST = "manifest.json"
PARTIAL = ".partial"
_BLOCK = 1 << 20


def checkpoint_folder(run: Path, step: int) -> Path:
    """The folder of a run's checkpoint after `step` steps."""
    return run / f"checkpoint-{step}"


def step_of(checkpoint: Path) -> int:
    """The step that a checkpoint's name tells, or -1 if it is no checkpoint's name."""
    prefix, _, number = checkpoint.name.rpartition("-")
    return int(number) if prefix == "checkpoint" and number.isdecimal() else -1


def checkpoints(run: Path) -> list[Path]:
    """The checkpoints of a run, complete or not, by step."""
    return sorted((path for path in run.glob("checkpoint-*") if step_of(path) >= 0 and path.is_dir()), key=step_of)


def write_manifest(folder: Path, names: Iterable[str] | None = None) -> None:
    """Bring files to the disk and list each with its size and SHA-256.

    Args:
        folder: Where the files are and `manifest.json` is written.
        names: The files, by their paths in the folder; None: all.
    """
    if names is None:
        names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    files = {}
    for name in sorted(set(names) - {MANIFEST}):
        size, digest = _measure(folder / name, sync=True)
        files[name] = {"size": size, "sha256": digest}
    manifest = folder / MANIFEST
    manifest.write_text(json.dumps({"files": files}, indent=2) + "\n", encoding="utf-8")
    _measure(manifest, sync=True)
    for inner in {folder, *((folder / name).parent for name in files)}:
        sync_folder(inner)


def publish(partial: Path, folder: Path) -> None:
    """Give a finished folder its name; afterwards it is there whatever happens.

    Args:
        partial: The folder as it was written, in the same file system.
        folder: Its name; what has this name is taken away.
    """
    write_manifest(partial)
    if folder.exists():
        discard(folder)
    os.rename(partial, folder)
    sync_folder(folder.parent)


def discard(folder: Path) -> None:
    """Delete a folder; cut short, the rest of it does not look like a checkpoint."""
    doomed = folder.with_name(f"{folder.name}.old{PARTIAL}")
    shutil.rmtree(doomed, ignore_errors=True)
    os.rename(folder, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def find_damage(folder: Path) -> list[str]:
    """What speaks against a folder's manifest: a sentence for each file that is missing, cut short or changed.

    Files that the manifest does not list are not looked at.
    """
    try:
        listed = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        entries = [(str(name), int(entry["size"]), str(entry["sha256"])) for name, entry in listed.items()]
    except FileNotFoundError:
        return [f"{MANIFEST} is missing"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return [f"{MANIFEST} cannot be read ({type(error).__name__})"]
    damage = []
    for name, size, digest in entries:
        path = folder / name
        try:
            found = path.stat().st_size
            if found != size:
                damage.append(f"{name} has {found} bytes instead of {size}")
            elif _measure(path)[1] != digest:
                damage.append(f"{name} is not what was saved (its SHA-256 differs)")
        except FileNotFoundError:
            damage.append(f"{name} is missing")
        except OSError as error:
            damage.append(f"{name} cannot be read ({error.strerror})")
    return damage


def newest_checkpoint(run: Path, tell: Callable[[str], None] | None = None) -> Path | None:
    """The newest complete checkpoint of a run, or None.

    Args:
        run: The run folder.
        tell: Is told of each newer checkpoint that is passed over, and why.
    """
    for folder in reversed(checkpoints(run)):
        damage = find_damage(folder)
        if not damage:
            return folder
        if tell is not None:
            tell(f"{folder.name} is not complete and passed over: {damage[0]}.")
    return None


def remove_orphans(run: Path) -> None:
    """Delete what processes left that were killed while they wrote: partial folders, safetensors' temporary files."""
    for path in [*run.glob(f"*{PARTIAL}"), *run.glob(".tmp*")]:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def rotate(run: Path, step: int, limit: int | None, best: str | None) -> None:
    """Delete older checkpoints after that of `step` was published.

    Args:
        run: The run folder.
        step: The newest step. Checkpoints above it are damaged ones that were passed over: they do not count.
        limit: How many are kept, the newest included; None keeps all.
        best: A checkpoint that is kept in any case, as one of them where `limit` is above 1.
    """
    if not limit:
        return
    old = [folder for folder in checkpoints(run) if step_of(folder) < step]
    kept = 1
    if best is not None and (favourite := run / Path(best).name) in old:
        old.remove(favourite)
        kept = 2
    for folder in old[: max(0, len(old) - max(0, limit - kept))]:
        discard(folder)


def sync_folder(folder: Path) -> None:
    """Bring a folder's list of names to the disk, where the system can."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:  # Windows opens no folders
        return
    try:
        os.fsync(descriptor)
    except OSError:  # nor do all network file systems sync them
        pass
    finally:
        os.close(descriptor)


def _measure(path: Path, *, sync: bool = False) -> tuple[int, str]:
    """Size and SHA-256 of a file, which is brought to the disk if asked for."""
    size, digest = 0, hashlib.sha256()
    with path.open("rb+" if sync else "rb") as stream:
        while block := stream.read(_BLOCK):
            size += len(block)
            digest.update(block)
        if sync:
            os.fsync(stream.fileno())
    return size, digest.hexdigest()
