"""Publishing a trained model on the Hub: what goes up, checked and listed first, then one commit.

Only files that a reader of the model needs are uploaded. Arguments of the training command, optimizer states and the
sheet of training pictures stay at home; local paths and tokens are cut from the files that go.
"""

import fnmatch
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationCopy,
    CommitOperationDelete,
    HfApi,
    get_session,
    get_token,
    hf_raise_for_status,
)
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import ModelInfo
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]
from safetensors import SafetensorError, safe_open

from .model_card import card_pictures, render_card
from .publishable import public_json, read_json

TIMEOUT = 10.0  # seconds until a Hub that does not answer counts as unreachable

# What an earlier push may have left in the repository and this one takes away where the run no longer has it: an old
# model.safetensors beside new shards would be loaded in their place.
_OURS = (
    "model.safetensors",
    "model-*.safetensors",
    "model.safetensors.index.json",
    "metrics.json",
    "per_class.csv",
    "per_class.png",
    "confusion.csv",
    "confusion.png",
    "curves.png",
    "previews/step-*.png",
)

# Every failure to reach the Hub is an HTTPError of its HTTP client: httpx or httpx2, as huggingface_hub chooses.
_CLIENT_ERROR: type[Exception] = HfHubHTTPError.__mro__[1]


class PushFile(NamedTuple):
    """A file that is uploaded: its path in the repository and its size in bytes."""

    path: str
    size: int


def plan_push(run: str | Path, *, repo_id: str | None = None, include_pictures: bool = True) -> list[PushFile]:
    """Check that a run folder holds a whole, sound model, and list what would be uploaded.

    Args:
        run: The folder that a training run saved.
        repo_id: The repository, for it is named in the card.
        include_pictures: Whether the card's pictures go along; the newest preview shows validation images.

    Raises:
        FileNotFoundError: A file that a model needs is missing.
        ValueError: A file cannot be read, or a weight is not finite.
    """
    contents = _contents(Path(run), repo_id, include_pictures)
    return [PushFile(path, _size(content)) for path, content in contents.items()]


def push(
    run: str | Path,
    repo_id: str,
    *,
    private: bool = False,
    token: str | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    include_pictures: bool = True,
    confirm: Callable[[str], bool] | None = None,
    create_pr: bool = False,
) -> str:
    """Upload a trained model in one commit, with a card rendered for the repository; the run folder is not changed.

    A second push of the same run changes nothing.

    Args:
        run: The folder that a training run saved.
        repo_id: `namespace/name`, or a name under the user's own namespace. Made if it does not exist.
        private: Make the repository private; refused where it exists and is public.
        token: A token of the Hub with the right to write; that of `hf auth login` if it is not given.
        revision: An existing branch to commit to; the main branch if it is not given.
        commit_message: The commit's first line.
        include_pictures: Whether the card's pictures go along; the newest preview shows validation images.
        confirm: Called with a text that lists what goes where; nothing is uploaded unless it returns True.
        create_pr: Open a pull request on an existing repository instead of committing to it.

    Returns:
        The address of the commit, or of the pull request; empty where `confirm` declined.

    Raises:
        FileNotFoundError, ValueError: The model is not whole or sound, or the repository is not as asked for.
        PermissionError, ConnectionError: Not logged in or no right to write; the Hub cannot be reached.
    """
    _check_repo_id(repo_id)
    contents = _contents(Path(run), repo_id, include_pictures)
    api = HfApi(token=token or get_token())
    with _plain_errors(repo_id, revision, api.endpoint):
        repo_id, there = _target(api, repo_id, revision, private=private, create_pr=create_pr)
        contents["README.md"] = render_card(Path(run), repo_id=repo_id, include_pictures=include_pictures).encode()
        stale = _stale(there, contents)
        if confirm is not None and not confirm(_listing(contents, stale, repo_id, there, private)):
            return ""
        if there is None:
            api.create_repo(repo_id, private=private, exist_ok=True)
        message = commit_message or "Upload model with hf_ctxseg"
        operations = _operations(contents, stale)
        commit = api.create_commit(repo_id, operations, commit_message=message, revision=revision, create_pr=create_pr)
    return commit.pr_url or commit.commit_url


def _contents(run: Path, repo_id: str | None, include_pictures: bool) -> dict[str, bytes | Path]:
    """Everything that goes up, by its path in the repository: cleaned texts as bytes, other files by their path."""
    config = public_json(run / "config.json")
    if not config.get("model_type") or not config.get("architectures"):
        raise ValueError(f"{run / 'config.json'} does not name a model_type and architectures: save the model again.")
    weights = weight_files(run)
    _check_weights(run, weights)
    contents: dict[str, bytes | Path] = {
        "README.md": render_card(run, repo_id=repo_id, include_pictures=include_pictures).encode(),
        "config.json": _json_bytes(config),
        "preprocessor_config.json": _json_bytes(public_json(run / "preprocessor_config.json")),
    }
    if (run / "metrics.json").is_file():
        contents["metrics.json"] = _json_bytes(public_json(run / "metrics.json"))
    pictures = card_pictures(run) if include_pictures else []
    tables = [name for name in ("per_class.csv", "confusion.csv") if (run / name).is_file()]
    return contents | {name: run / name for name in [*weights, *tables, *pictures]}


def weight_files(run: Path) -> list[str]:
    """The safetensors file, or the index and its shards; names that lead out of the folder are refused."""
    index = run / "model.safetensors.index.json"
    if (run / "model.safetensors").is_file():
        return ["model.safetensors"]
    if not index.is_file():
        raise FileNotFoundError(f"There is no model.safetensors in {run}: give a folder that a training run saved.")
    shards = sorted(set(read_json(index).get("weight_map", {}).values()))
    for name in shards:
        if not fnmatch.fnmatchcase(name, "model-*.safetensors") or Path(name).name != name:
            raise ValueError(f"{index} names the shard {name!r}, not a model-*.safetensors beside it: save again.")
        if not (run / name).is_file():
            raise FileNotFoundError(f"{index} names the shard {name}, which is not there: save the model again.")
    return [index.name, *shards]


def _check_weights(run: Path, names: list[str]) -> None:
    """Open every weight file and refuse values that are not finite, which the format allows."""
    broken: list[str] = []
    for name in names:
        if not name.endswith(".safetensors"):
            continue
        try:
            with safe_open(run / name, framework="pt") as tensors:
                for key in tensors.keys():
                    tensor = tensors.get_tensor(key)
                    if tensor.is_floating_point() and not tensor.isfinite().all():
                        broken.append(key)
        except SafetensorError as error:
            raise ValueError(
                f"{run / name} is not a whole safetensors file ({error}): save the model again."
            ) from error
    if broken:
        more = f" and {len(broken) - 5} more" if len(broken) > 5 else ""
        raise ValueError(
            f"The weights of {run} hold NaN or infinity in {', '.join(broken[:5])}{more}: "
            "the training diverged; push an earlier checkpoint or train with a lower learning rate."
        )


def _json_bytes(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


def _size(content: bytes | Path) -> int:
    return len(content) if isinstance(content, bytes) else content.stat().st_size


def _check_repo_id(repo_id: str) -> None:
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(
            f"{repo_id!r} is not a name for a repository: write namespace/name with letters, digits, '-', '_' and '.'."
        ) from error


def _user_name(api: HfApi) -> str:
    if not api.token:
        raise PermissionError("You are not logged in to the Hub: run `hf auth login`, or set HF_TOKEN.")
    # Not HfApi.whoami: it waits for ever on a Hub that does not answer.
    headers = {"authorization": f"Bearer {api.token}"}
    response = get_session().get(f"{api.endpoint}/api/whoami-v2", headers=headers, timeout=TIMEOUT)
    hf_raise_for_status(response)
    return str(response.json()["name"])


def _target(
    api: HfApi, repo_id: str, revision: str | None, *, private: bool, create_pr: bool
) -> tuple[str, ModelInfo | None]:
    """The repository's full name and what is there, None if it must be made; refuses what cannot be as asked for."""
    user = _user_name(api)
    repo_id = repo_id if "/" in repo_id else f"{user}/{repo_id}"
    try:
        there = api.model_info(repo_id, revision=revision, timeout=TIMEOUT)
    except RepositoryNotFoundError as error:
        if create_pr or revision not in (None, "main"):
            raise ValueError(
                f"There is no repository {repo_id} that this token can see, and a branch or a pull request needs one: "
                "check the name, or push to the main branch first."
            ) from error
        return repo_id, None
    if private and not there.private:
        raise ValueError(
            f"{repo_id} exists and is public, but a private push was asked for: make it private in its settings on "
            "the Hub, or choose another name."
        )
    return repo_id, there


def _stale(there: ModelInfo | None, contents: dict[str, bytes | Path]) -> list[str]:
    names = [sibling.rfilename for sibling in (there.siblings or [] if there else [])]
    ours = [name for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in _OURS)]
    return sorted(set(ours) - set(contents))


def _operations(
    contents: dict[str, bytes | Path], stale: list[str]
) -> list[CommitOperationAdd | CommitOperationCopy | CommitOperationDelete]:
    return [
        *(CommitOperationDelete(path) for path in stale),
        *(CommitOperationAdd(path, content) for path, content in contents.items()),
    ]


def _listing(
    contents: dict[str, bytes | Path], stale: list[str], repo_id: str, there: ModelInfo | None, private: bool
) -> str:
    if there is None:
        state = "a new private repository" if private else "a new public repository"
    else:
        state = "an existing private repository" if there.private else "an existing public repository"
    width = max(map(len, contents))
    lines = [f"To {repo_id}, {state}:"]
    lines += [f"  {path:<{width}}  {_readable(_size(content)):>9}" for path, content in contents.items()]
    lines.append(f"  {'in all':<{width}}  {_readable(sum(map(_size, contents.values()))):>9}")
    if stale:
        lines.append(f"Removed there, since this run does not have them: {', '.join(stale)}")
    return "\n".join(lines)


def _readable(size: float) -> str:
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"


@contextmanager
def _plain_errors(repo_id: str, revision: str | None, endpoint: str) -> Iterator[None]:
    """Say what went wrong between here and the Hub in one sentence with its cure."""
    try:
        yield
    except OfflineModeIsEnabled as error:
        raise ConnectionError("HF_HUB_OFFLINE is set, so nothing can be pushed: unset it.") from error
    except HfHubHTTPError as error:
        raise _http_error(error, repo_id, revision, endpoint) from error
    except _CLIENT_ERROR as error:
        raise _unreachable(error, endpoint) from error
    except RuntimeError as error:
        # Uploads run in threads whose errors huggingface_hub wraps.
        if isinstance(error.__cause__, HfHubHTTPError):
            raise _http_error(error.__cause__, repo_id, revision, endpoint) from error
        if isinstance(error.__cause__, _CLIENT_ERROR):
            raise _unreachable(error.__cause__, endpoint) from error
        raise


def _unreachable(error: Exception, endpoint: str) -> ConnectionError:
    return ConnectionError(
        f"The Hub cannot be reached at {endpoint} ({type(error).__name__}): check the network and HF_ENDPOINT, "
        "then push again."
    )


def _http_error(error: HfHubHTTPError, repo_id: str, revision: str | None, endpoint: str) -> Exception:
    status = error.response.status_code
    said = f" ({error.server_message})" if error.server_message else ""
    if isinstance(error, RevisionNotFoundError):
        return ValueError(f"{repo_id} has no branch {revision!r}: make it on the Hub, or leave the revision out.")
    if status == 401:
        return PermissionError("The Hub does not accept this token: run `hf auth login`, or correct HF_TOKEN.")
    if status == 403:
        return PermissionError(f"This token may not write to {repo_id}{said}: use one that may, or another namespace.")
    if status == 404:
        return ValueError(f"{repo_id} was not found at {endpoint}, or this token may not see it: check the name.")
    if status in (409, 412):
        return ValueError(f"{repo_id} was changed by someone else in the meantime{said}: push again.")
    if status == 429 or status >= 500:
        return ConnectionError(f"The Hub at {endpoint} answers {status}{said}: wait a little, then push again.")
    return ValueError(f"The Hub refused the upload to {repo_id} with status {status}{said}.")
