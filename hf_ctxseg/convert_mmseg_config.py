"""mmsegmentation's configuration, read as text.

Its checkpoints carry the configuration as Python source: assignments of literals and `dict(...)` calls. The source is
parsed and its literals are evaluated; nothing of it is run.
"""

import ast
from collections.abc import Mapping
from typing import Any

from .state_dict import plain_text

MAX_LENGTH = 2_000_000  # characters; the longest published one has some 20 thousand


def parse_mmseg_config(text: str) -> dict[str, Any]:
    """Give the values that a configuration assigns.

    Args:
        text: Its source, with every base resolved, as checkpoints and `Config.dump` hold it.

    Returns:
        The values by name. What is no literal (an arithmetic expression, a call other than `dict`) is left out, but
        not where `model` depends on it.

    Raises:
        ValueError: If the text is no Python source, assigns no `model`, or one that is not made of literals.
    """
    if len(text) > MAX_LENGTH:
        raise ValueError(f"The mmsegmentation config has {len(text)} characters, but {MAX_LENGTH} at most are read.")
    try:
        statements = ast.parse(text).body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"The mmsegmentation config is no Python source ({error}): dump it again.") from error
    values: dict[str, Any] = {}
    problems: dict[str, str] = {}
    for statement in statements:
        if isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name):
            name = statement.targets[0].id
            try:
                values[name] = _value(statement.value, values)
            except (ValueError, RecursionError) as error:
                values.pop(name, None)
                problems[name] = str(error)
    if not isinstance(values.get("model"), dict):
        reason = f" ({problems['model']})" if "model" in problems else ""
        raise ValueError(
            f"The mmsegmentation config assigns no model of literals{reason}: give the full one that mmsegmentation "
            "writes beside its checkpoints, or that Config.dump writes."
        )
    return values


def _value(node: ast.expr, names: Mapping[str, Any]) -> Any:
    match node:
        case ast.Constant(value=value):
            return value
        case ast.List(elts=items):
            return [_value(item, names) for item in items]
        case ast.Tuple(elts=items):
            return tuple(_value(item, names) for item in items)
        case ast.Dict(keys=keys, values=items):
            result: dict[Any, Any] = {}
            for key, item in zip(keys, items, strict=True):
                value = _value(item, names)
                result |= _mapping(value, node) if key is None else {_key(_value(key, names), node): value}
            return result
        case ast.Call(func=ast.Name(id="dict"), args=[], keywords=keywords):
            result = {}
            for keyword in keywords:
                value = _value(keyword.value, names)
                result |= _mapping(value, node) if keyword.arg is None else {keyword.arg: value}
            return result
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as number)):
            return -number
        case ast.Name(id=name) if name in names:
            return names[name]
    raise ValueError(f"line {node.lineno} holds {ast.unparse(node)[:60]!r}, which is no literal")


def _mapping(value: Any, node: ast.expr) -> dict[Any, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"line {node.lineno} unpacks what is no dict")
    return value


def _key(value: Any, node: ast.expr) -> Any:
    if not isinstance(value, (str, int, float)):
        raise ValueError(f"line {node.lineno} has a key that is neither text nor number")
    return value


def mmseg_config(meta: Any) -> dict[str, Any] | None:
    """The configuration in the `meta` of a checkpoint, of mmsegmentation 0.x (`config`) or 1.x (`cfg`), or None.

    Raises:
        ValueError: If there is one that `parse_mmseg_config` refuses.
    """
    if not isinstance(meta, Mapping):
        return None
    text = next((meta[key] for key in ("cfg", "config") if isinstance(meta.get(key), str)), None)
    return None if text is None else parse_mmseg_config(text)


def mmseg_classes(meta: Any) -> tuple[list[str] | None, list[list[int]] | None]:
    """Names and colours of the classes in the `meta` of a checkpoint, each None where it does not hold them."""
    if not isinstance(meta, Mapping):
        return None, None
    data = meta.get("dataset_meta")
    found = {**meta, **(data if isinstance(data, Mapping) else {})}
    names = found.get("classes", found.get("CLASSES"))
    palette = found.get("palette", found.get("PALETTE"))
    if not (isinstance(names, (list, tuple)) and names and all(isinstance(name, str) for name in names)):
        return None, None
    texts = [plain_text(name) for name in names]
    if not isinstance(palette, (list, tuple)) or len(palette) != len(texts):
        return texts, None
    try:
        return texts, [[int(part) for part in colour] for colour in palette]
    except (TypeError, ValueError):
        return texts, None


def mmseg_preprocessing(config: Mapping[str, Any]) -> tuple[dict[str, Any], bool, list[str]]:
    """Mean, deviation and order of colours that a configuration states.

    Returns:
        `image_mean` and `image_std` for values of 0 … 1, in the order of the network's channels; whether the network
        takes blue, green, red; and notes.

    Raises:
        ValueError: If mean or deviation are not one number per channel.
    """
    model = config["model"]
    given = model.get("data_preprocessor") or config.get("data_preprocessor")
    if isinstance(given, Mapping) and given.get("mean") is not None:
        bgr = not given.get("bgr_to_rgb", False)
    elif isinstance(given := config.get("img_norm_cfg"), Mapping) and given.get("mean") is not None:
        bgr = not given.get("to_rgb", True)
    else:
        return {}, False, ["The config states no mean and deviation: those of ImageNet, RGB, are assumed."]
    statistics: dict[str, Any] = {}
    for name in ("mean", "std"):
        values = given.get(name)
        if not (isinstance(values, (list, tuple)) and all(isinstance(value, (int, float)) for value in values)):
            raise ValueError(f"The mmsegmentation config has the {name} {values!r}, but must have a list of numbers.")
        statistics[f"image_{name}"] = [value / 255 for value in values]
    return statistics, bgr, []
