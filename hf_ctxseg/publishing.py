"""Publishing a trained model on the Hub: what goes up, checked and listed first, then one commit.

Only files that a reader of the model needs are uploaded. Arguments of the training command, optimizer states and the
sheet of training pictures stay at home; local paths and tokens are cut from the files that go.
"""

import fnmatch
import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import (
    CommitInfo,
    CommitOperationAdd,
    CommitOperationCopy,
    CommitOperationDelete,
    HfApi,
    get_session,
    get_token,
    hf_raise_for_status,
)
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.hf_api import ModelInfo
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]
from safetensors import safe_open

from .hub_errors import HUB_ERRORS, HUB_SECONDS, ask, cause_of, impatient, push_error
from .model_card import card_pictures, render_card
from .publishable import public_json, weight_files
from .remote_code import auto_maps, code_files

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
    "samples/*.jpg",
)


class PushFile(NamedTuple):
    """A file that is uploaded: its path in the repository and its size in bytes."""

    path: str
    size: int


def plan_push(
    run: str | Path, *, repo_id: str | None = None, include_pictures: bool = True, with_code: bool = False
) -> list[PushFile]:
    """Check that a run folder holds a whole, sound model, and list what would be uploaded.

    Args:
        run: The folder that a training run saved.
        repo_id: The repository, for it is named in the card.
        include_pictures: Whether the card's pictures go along; the newest preview shows validation images.
        with_code: Whether the model's code goes along.

    Raises:
        FileNotFoundError: A file that a model needs is missing.
        ValueError: A file cannot be read, a weight is not finite, or there is no code to go along.
    """
    contents = _contents(Path(run), repo_id, include_pictures, with_code)
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
    with_code: bool = False,
    confirm: Callable[[str], bool] | None = None,
    create_pr: bool = False,
) -> str:
    """Upload a trained model in one commit, with a card rendered for the repository; the run folder is not changed.

    With code there is a second commit, of the card alone: it names the first one, so that readers run the code that
    they have looked at. A second push of the same run changes nothing, and one that broke off is repeated.

    Args:
        run: The folder that a training run saved.
        repo_id: `namespace/name`, or a name under the user's own namespace. Made if it does not exist.
        private: Make the repository private; refused where it exists and is public.
        token: A token of the Hub with the right to write; that of `hf auth login` if it is not given.
        revision: An existing branch to commit to; the main branch if it is not given.
        commit_message: The commit's first line.
        include_pictures: Whether the card's pictures go along; the newest preview shows validation images.
        with_code: Whether the model's code goes along, so that it opens without this package, by
            `trust_remote_code=True`.
        confirm: Called with a text that lists what goes where; nothing is uploaded unless it returns True.
        create_pr: Open a pull request on an existing repository instead of committing to it.

    Returns:
        The address of the commit, or of the pull request; empty where `confirm` declined.

    Raises:
        FileNotFoundError, ValueError: The model is not whole or sound, or the repository is not as asked for.
        PermissionError, ConnectionError: Not logged in or no right to write; the Hub cannot be reached.
    """
    _check_repo_id(repo_id)
    if with_code and create_pr:
        raise ValueError("A pull request has no commit yet that a card could name: push with code to a branch.")
    contents = _contents(Path(run), repo_id, include_pictures, with_code)
    api = HfApi(token=token or get_token())
    with _plain_errors(repo_id, revision, api.endpoint):
        repo_id, there = _target(api, repo_id, revision, private=private, create_pr=create_pr)
        card = partial(render_card, Path(run), repo_id=repo_id, include_pictures=include_pictures, with_code=with_code)
        contents["README.md"] = card().encode()
        stale = _stale(there, contents)
        if confirm is not None and not confirm(_listing(contents, stale, repo_id, there, private)):
            return ""
        if there is None:
            api.create_repo(repo_id, private=private, exist_ok=True)
            there = api.model_info(repo_id, revision=revision, timeout=HUB_SECONDS)
        send = partial(_commit, api, repo_id, revision=revision, create_pr=create_pr)
        message = commit_message or "Upload model with hf_ctxseg"
        if with_code:
            named = _named_commit(api, repo_id, there)
            files = {path: content for path, content in contents.items() if path != "README.md"}
            first = send(files, stale, message, parent=there.sha)
            pinned = named if named and first.oid == there.sha else first.oid
            contents = {"README.md": card(code_revision=pinned).encode()}
            commit = send(contents, [], "Name the commit of the code in the card", parent=first.oid)
        else:
            commit = send(contents, stale, message, parent=there.sha)
    return commit.pr_url or commit.commit_url


def push_all(folder: str | Path, namespace: str, **options: Any) -> tuple[dict[str, str], dict[str, str]]:
    """Push every folder in a folder that holds a model, each to a repository of its own name; goes on past failures.

    Args:
        folder: Such as `model_cards/`.
        namespace: The user or organisation.
        **options: Those of `push`.

    Returns:
        Addresses of the commits, and what went wrong, both by the names of the folders.

    Raises:
        ValueError: There is no folder with a model, or `namespace` is none.
    """
    models = sorted(path.parent for path in Path(folder).glob("*/config.json"))
    if not models:
        raise ValueError(f"No folder in {folder} holds a model (config.json and weights): save or convert one there.")
    if "/" in namespace:
        raise ValueError(f"{namespace!r} names one repository: give the user or organisation that all models go to.")
    pushed, failed = {}, {}
    for model in models:
        try:
            pushed[model.name] = push(model, f"{namespace}/{model.name}", **options)
        except (ValueError, OSError) as error:
            failed[model.name] = str(error)
    return pushed, failed


def _contents(run: Path, repo_id: str | None, include_pictures: bool, with_code: bool) -> dict[str, bytes | Path]:
    """Everything that goes up, by its path in the repository: cleaned texts as bytes, other files by their path."""
    config = public_json(run / "config.json")
    if not config.get("model_type") or not config.get("architectures"):
        raise ValueError(f"{run / 'config.json'} does not name a model_type and architectures: save the model again.")
    if not str(config["model_type"]).startswith("ctxseg_"):
        raise ValueError(f"{run} holds a model of the type {config['model_type']!r}, which is none of ours.")
    processor = public_json(run / "preprocessor_config.json")
    weights = weight_files(run)
    _check_weights(run, weights)
    code: dict[str, bytes | Path] = {}
    if with_code:
        entries = auto_maps(config["model_type"])
        config["auto_map"], processor["auto_map"] = entries["config.json"], entries["preprocessor_config.json"]
        code |= code_files(config["model_type"])
    card = render_card(run, repo_id=repo_id, include_pictures=include_pictures, with_code=with_code)
    contents: dict[str, bytes | Path] = {
        "README.md": card.encode(),
        "config.json": _json_bytes(config),
        "preprocessor_config.json": _json_bytes(processor),
    }
    if (run / "metrics.json").is_file():
        contents["metrics.json"] = _json_bytes(public_json(run / "metrics.json"))
    pictures = card_pictures(run) if include_pictures else []
    others = [name for name in ("per_class.csv", "confusion.csv", "LICENSE") if (run / name).is_file()]
    contents |= {name: run / name for name in [*weights, *others, *pictures]}
    for name in contents:
        if name != "README.md" and not (run / name).resolve().is_relative_to(run.resolve()):
            raise ValueError(f"{run / name} is a link that leads out of the folder: put the file itself there.")
    return contents | code


def _check_weights(run: Path, names: list[str]) -> None:
    """Open every weight file and refuse values that are not finite, which the format allows."""
    broken: list[str] = []
    for name in names:
        if not name.endswith(".safetensors"):
            continue
        with safe_open(run / name, framework="pt") as tensors:
            for key in tensors.keys():
                tensor = tensors.get_tensor(key)
                if tensor.is_floating_point() and not tensor.isfinite().all():
                    broken.append(key)
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
    headers = {"authorization": f"Bearer {api.token}"}
    response = ask(lambda: get_session().get(f"{api.endpoint}/api/whoami-v2", headers=headers, timeout=HUB_SECONDS))
    hf_raise_for_status(response)
    return str(ask(response.json)["name"])


def _target(
    api: HfApi, repo_id: str, revision: str | None, *, private: bool, create_pr: bool
) -> tuple[str, ModelInfo | None]:
    """The repository's full name and what is there, None if it must be made; refuses what cannot be as asked for."""
    user = _user_name(api)
    repo_id = repo_id if "/" in repo_id else f"{user}/{repo_id}"
    try:
        there = ask(lambda: api.model_info(repo_id, revision=revision, timeout=HUB_SECONDS))
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


def _commit(
    api: HfApi,
    repo_id: str,
    contents: dict[str, bytes | Path],
    stale: list[str],
    message: str,
    *,
    parent: str | None,
    revision: str | None,
    create_pr: bool,
) -> CommitInfo:
    """Commit onto `parent` or not at all: a request that is repeated because its answer was lost does nothing."""
    operations: list[CommitOperationAdd | CommitOperationCopy | CommitOperationDelete] = [
        *(CommitOperationDelete(path) for path in stale),
        *(CommitOperationAdd(path, content) for path, content in contents.items()),
    ]
    return api.create_commit(
        repo_id,
        operations,
        commit_message=message,
        revision=revision,
        create_pr=create_pr,
        parent_commit=parent,
    )


def _named_commit(api: HfApi, repo_id: str, there: ModelInfo) -> str | None:
    """The commit whose code the card there tells to load, if nothing but the card was changed since."""
    if all(sibling.rfilename != "README.md" for sibling in there.siblings or []):
        return None
    card = Path(api.hf_hub_download(repo_id, "README.md", revision=there.sha)).read_text(encoding="utf-8")
    found = re.search(r'revision="([0-9a-f]{40})"', card)
    if found is None:
        return None
    try:
        then, now = (
            {sibling.rfilename: sibling.blob_id for sibling in info.siblings or [] if sibling.rfilename != "README.md"}
            for info in (
                api.model_info(repo_id, revision=commit, files_metadata=True, timeout=HUB_SECONDS)
                for commit in (found[1], there.sha)
            )
        )
    except RevisionNotFoundError:
        return None
    return found[1] if then == now else None


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
        with impatient():
            yield
    except (*HUB_ERRORS, RuntimeError) as error:  # of uploads, which run in threads, huggingface_hub wraps the errors
        cause = cause_of(error)
        if not isinstance(cause, HUB_ERRORS):
            raise
        raise push_error(cause, repo_id, revision, endpoint) from error
