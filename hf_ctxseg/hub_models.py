"""Models of the Hub, brought whole into the cache before they are opened.

They open from their folder there, as those of a run do: the same checks of the weights, the same messages.
"""

import fnmatch
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import timm
from huggingface_hub import HfApi, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]
from transformers.utils import logging

from .hub_errors import HUB_ERRORS, HUB_SECONDS, ask, cause_of, hub_error, impatient, is_outage

logger = logging.get_logger(__name__)

_FILES = ("config.json", "preprocessor_config.json")
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "model-*.safetensors")


def model_folder(name: str | Path) -> Path:
    """Give the folder of a model: a folder as it is, a model of the Hub from the cache, fetched if need be.

    Code in a repository is neither fetched nor run. A Hub that is out of reach is told once, and the copy in the cache
    is used.

    Args:
        name: A folder, `namespace/name`, or `namespace/name@revision` with a branch, tag or commit.

    Raises:
        FileNotFoundError: There is no such folder and no such model.
        PermissionError: The model is gated or private.
        ConnectionError: The Hub cannot be reached, and the model is not in the cache.
        ValueError: The name is none, or there is no such revision.
    """
    if os.path.exists(name):  # Path.exists raises for a name that is too long
        return Path(name)
    repo_id, at, given = str(name).partition("@")
    if at and not given:
        raise ValueError(f"{name} names no revision: give a branch, tag or commit after the @, or leave it out.")
    revision = given or None
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise FileNotFoundError(f"There is no folder {name}: check the path.") from error
    try:
        return _fetch(repo_id, revision)
    except Exception as error:  # also what threads of snapshot_download wrap
        cause = cause_of(error)
        if is_outage(cause) and (folder := _cached(repo_id, revision)):
            if not isinstance(cause, OfflineModeIsEnabled):
                logger.warning_once(f"The Hub cannot be reached: {name} is opened as it lies in the cache.")
            return folder
        if not isinstance(cause, HUB_ERRORS):
            raise
        raise hub_error(cause, repo_id, revision) from error


def _fetch(repo_id: str, revision: str | None) -> Path:
    """Download what a model consists of.

    Raises:
        FileNotFoundError: The repository lacks a file.
        ValueError: It lists a file that leads elsewhere.
    """
    api = HfApi()
    there = ask(lambda: api.model_info(repo_id, revision=revision, timeout=HUB_SECONDS))
    names = [sibling.rfilename for sibling in there.siblings or []]
    lacking = [wanted for wanted in _FILES if wanted not in names]
    if not any(fnmatch.fnmatchcase(name, pattern) for name in names for pattern in _WEIGHTS):
        lacking.append("model.safetensors")
    if lacking:
        raise FileNotFoundError(
            f"{repo_id} holds no {' and no '.join(lacking)}, but a model of this package has them: check the name."
        )
    wanted = [name for name in names for pattern in (*_FILES, *_WEIGHTS) if fnmatch.fnmatchcase(name, pattern)]
    if escaping := [name for name in wanted if set(name) & set("/\\:")]:
        raise ValueError(
            f"{repo_id} lists the file {escaping[0]!r}, which leads out of its folder: get the model from a source "
            "that you trust."
        )
    with impatient():
        return Path(snapshot_download(repo_id, revision=revision, allow_patterns=[*_FILES, *_WEIGHTS]))


def _cached(repo_id: str, revision: str | None) -> Path | None:
    """The folder of a model in the cache, if it is whole there."""
    try:
        folder = Path(snapshot_download(repo_id, revision=revision, local_files_only=True))
    except Exception:  # huggingface_hub has several for a cache that lacks something
        return None
    if not all((folder / name).is_file() for name in _FILES):
        return None
    if (folder / "model.safetensors").is_file():
        return folder
    index = folder / "model.safetensors.index.json"
    shards = re.findall(r'"(model-[^"]+)"', index.read_text(encoding="utf-8")) if index.is_file() else []
    return folder if shards and all((folder / shard).is_file() for shard in shards) else None


@contextmanager
def backbone_from_hub(backbone: str) -> Iterator[None]:
    """Let timm fetch the weights of a backbone within; asks the Hub first, since timm would try for a minute.

    Raises:
        PermissionError, ConnectionError, FileNotFoundError: The weights are not in the cache and cannot be fetched;
            names the two other ways to start a training.
    """
    known = timm.get_pretrained_cfg(backbone)
    repo_id = known.hf_hub_id if known is not None else None
    if repo_id and not any(
        isinstance(try_to_load_from_cache(repo_id, name), str) for name in ("model.safetensors", "pytorch_model.bin")
    ):
        try:
            ask(lambda: HfApi().model_info(repo_id, timeout=HUB_SECONDS))
        except HUB_ERRORS as error:
            told = hub_error(error, repo_id, kind="backbone")
            raise type(told)(
                f"The pretrained weights of {backbone!r} are not here. {told} Other ways: --backbone_weights "
                "FILE.safetensors with a file in timm's names, or --backbone_weights none for random ones."
            ) from error
    with impatient():
        yield
