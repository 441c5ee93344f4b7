"""What may be published of files and commands: no local paths, no tokens, no numbers that JSON lacks."""

import fnmatch
import json
import math
import os
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .weight_files import check_weight_files

_TOKEN = re.compile(r"\b(?:hf|api_org)_[A-Za-z0-9]{16,}(?![\w-])")
_SECRET_OPTION = re.compile(r"-+(?:.*[_-])?(?:token|password|secret|api[_-]key)", re.IGNORECASE)
_PATH_START = re.compile(r"(?:file://)?(?:~[^/\\]*|[A-Za-z]:|\.\.)?[/\\]\S")
_QUOTED_PATH = re.compile(r"""(["'])(?:file://)?(?:~[^/\\"']*|[A-Za-z]:|\.\.)?[/\\][^"'\n]*\1""")
_BARE_PATH = re.compile(
    r"""(?<![\w.:/\\~*-])(?:file://)?(?:~[\w.-]*|[A-Za-z]:|\.\.)?(?:[/\\]+[^\s/\\"'`|<>;,()\[\]{}]+)+[/\\]*"""
)
_USER_NAMED = ("id2label", "label2id", "classes", "absent_classes", "worst_confusions")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a run folder.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file does not hold a JSON object.
    """
    if not path.is_file():
        raise FileNotFoundError(f"There is no {path.name} in {path.parent}: give a folder that a training run saved.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}): save the model again.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not a JSON object: save the model again.")
    return content


def weight_files(run: Path) -> list[str]:
    """The safetensors file, or the index and its shards.

    Raises:
        FileNotFoundError: There are no weights, or a shard is missing.
        ValueError: `check_weight_files` refuses them, or a shard has another name than shards have.
    """
    check_weight_files(run)
    index = run / "model.safetensors.index.json"
    if (run / "model.safetensors").is_file():
        return ["model.safetensors"]
    if not index.is_file():
        raise FileNotFoundError(f"There is no model.safetensors in {run}: give a folder that a training run saved.")
    shards = sorted(set(read_json(index)["weight_map"].values()))
    for name in shards:
        if not fnmatch.fnmatchcase(name, "model-*.safetensors"):
            raise ValueError(f"{index} names the shard {name!r}, not a model-*.safetensors beside it: save again.")
        if not (run / name).is_file():
            raise FileNotFoundError(f"{index} names the shard {name}, which is not there: save the model again.")
    return [index.name, *shards]


def public_json(path: Path) -> dict[str, Any]:
    """Read a JSON object without what must not be published; raises what `read_json` raises.

    Absolute paths are cut to their last component, tokens blanked, numbers that are not finite become None, and
    `auto_map` and `_name_or_path` are dropped: they point to code and folders that do not travel with the file.
    Class names are left as they are.
    """
    content = read_json(path)
    for key in ("auto_map", "_name_or_path"):
        content.pop(key, None)
    return {key: _public(value, key) for key, value in content.items()}


def public_text(text: str) -> str:
    """Cut absolute paths in a text to their last component and blank what looks like a token."""
    home = Path.home()
    if home.name:  # else it is the root; a user's name may hold spaces, at which the search for paths ends
        text = text.replace(str(home), "~")
    if _PATH_START.match(text):
        return base_name(text)
    text = _QUOTED_PATH.sub(lambda match: match[1] + base_name(match[0][1:-1]) + match[1], text)
    text = _BARE_PATH.sub(lambda match: base_name(match[0]), text)
    return _TOKEN.sub("…", text)


def public_command(argv: Sequence[str]) -> str:
    """Write the command of a run as it may be published.

    Args:
        argv: What followed `ctxseg` on the command line.

    Returns:
        One shell line. Arguments that are absolute paths or exist as paths are cut to their last component; tokens
        are left out together with the option they belong to.
    """
    kept: list[str] = []
    for argument in argv:
        option, equals, value = argument.partition("=") if argument.startswith("-") else ("", "", argument)
        if option and not equals:
            kept.append(option)
        elif _SECRET_OPTION.fullmatch(option):
            continue
        elif _TOKEN.search(value) or (not option and kept and _SECRET_OPTION.fullmatch(kept[-1])):
            if not option and kept and kept[-1].startswith("-"):
                kept.pop()
        else:
            kept.append(option + equals + _public_argument(value))
    return shlex.join(["ctxseg", *kept])


def _public_argument(value: str) -> str:
    return base_name(value) if re.search(r"[/\\]", value) and os.path.exists(value) else public_text(value)


def base_name(path: str) -> str:
    """The last component of a path, `~` for the home folder's."""
    name = re.split(r"[/\\]+", path.rstrip("/\\"))[-1]
    return "~" if name == Path.home().name else name


def _public(value: Any, key: str) -> Any:
    if key in _USER_NAMED:
        return value
    if isinstance(value, str):
        return public_text(value)
    if isinstance(value, dict):
        return {name: _public(item, name) for name, item in value.items()}
    if isinstance(value, list):
        return [_public(item, key) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
