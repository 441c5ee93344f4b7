"""Folders that are whole or not there: written beside their place, and put there at the end."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError


def checked_target(output_dir: str | Path) -> Path:
    """Give the place of a folder to be written; raises `ValueError` unless it is new or empty."""
    target = Path(os.path.realpath(output_dir))  # a link is followed, not replaced
    if target == Path.cwd():
        raise ValueError("The output is the folder that you are in, which cannot be replaced: choose a new one.")
    if target.exists() and not target.is_dir():
        raise ValueError(f"{target} is a file, but the output must be a folder: choose another name.")
    if target.is_dir() and any(target.iterdir()):
        raise ValueError(f"{target} is not empty, and nothing in it is overwritten: choose a new folder.")
    return target


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """Give a folder beside `target` that takes its place when the block ends, and vanishes if it fails."""
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        yield partial
        for path in partial.iterdir():
            to_disk(path)
        partial.chmod(0o777 & ~_umask())  # a temporary folder is its maker's alone
        if target.is_dir():
            target.rmdir()
        os.replace(partial, target)
    except SafetensorError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise OSError(f"{target} cannot be written ({error}): is there room?") from error
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def to_disk(path: Path) -> None:
    """Bring a file to the disk, readable as the user's other files are."""
    with path.open("rb+") as stream:
        os.fsync(stream.fileno())
    path.chmod(0o666 & ~_umask())  # safetensors and temporary files are their maker's alone


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
