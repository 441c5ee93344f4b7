"""mmsegmentation's configuration, read as text.

Its checkpoints carry the configuration as Python source: assignments of literals and `dict(...)` calls. The source is
parsed and its literals are evaluated; nothing of it is run.
"""

import ast
import reprlib
import sys
from collections.abc import Mapping
from typing import Any

from .state_dict import plain_text

MAX_LENGTH = 2_000_000  # characters; the longest published one has some 20 thousand
_RESOLVED = (
    "give the resolved config, which mmsegmentation writes beside its checkpoints, or which Config.dump writes."
)


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
        raise ValueError(f"The mmsegmentation config assigns no model of literals{reason}: {_RESOLVED}")
    parts = [values["model"].get(name) for name in ("backbone", "decode_head")]
    if "_base_" in values and not all(isinstance(part, dict) and "type" in part for part in parts):
        raise ValueError(
            "The mmsegmentation config builds on others (_base_) and states only a part of the model itself: "
            f"{_RESOLVED}"
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
    return texts, _palette(palette, len(texts))


def _palette(given: Any, classes: int) -> list[list[int]] | None:
    """The colours if there is one of three bytes per class; others are left out, for the network works without."""
    if not isinstance(given, (list, tuple)) or len(given) != classes:
        return None
    for colour in given:
        if not isinstance(colour, (list, tuple)) or len(colour) != 3 or not all(map(_is_byte, colour)):
            return None
    return [[int(part) for part in colour] for colour in given]


def _is_byte(value: Any) -> bool:
    return isinstance(value, (int, float)) and 0 <= value <= 255 and value == int(value)


def mmseg_preprocessing(config: Mapping[str, Any]) -> tuple[dict[str, Any], bool, list[str]]:
    """Mean, deviation and order of colours that a configuration states.

    Returns:
        `image_mean` and `image_std` for values of 0 … 1, in the order of the network's channels; whether the network
        takes blue, green, red; and notes.

    Raises:
        ValueError: If mean or deviation are not one finite number per channel, or a deviation is not above 0.
    """
    model = config["model"]
    notes = _windows(model.get("test_cfg") or config.get("test_cfg"))
    given = model.get("data_preprocessor") or config.get("data_preprocessor")
    if isinstance(given, Mapping) and given.get("mean") is not None:
        bgr = not given.get("bgr_to_rgb", False)
    elif isinstance(given := config.get("img_norm_cfg"), Mapping) and given.get("mean") is not None:
        bgr = not given.get("to_rgb", True)
    else:
        return {}, False, ["The config states no mean and deviation: those of ImageNet, RGB, are assumed.", *notes]
    backbone = model.get("backbone")
    channels = backbone.get("in_channels", 3) if isinstance(backbone, Mapping) else 3
    statistics = {f"image_{name}": _statistic(name, given.get(name), channels) for name in ("mean", "std")}
    return statistics, bgr, notes


def _statistic(name: str, values: Any, channels: int) -> list[float]:
    """Mean or deviation for values of 0 … 1."""
    if isinstance(values, (list, tuple)) and len(values) == channels and all(map(_is_finite, values)):
        scaled = [float(value) / 255 for value in values]
        if name == "mean" or min(scaled) > 0:
            return scaled
    above = " above 0" if name == "std" else ""
    raise ValueError(
        f"The mmsegmentation config has the {name} {reprlib.repr(values)}, but must have a list of {channels} finite "
        f"numbers{above}, one per channel: correct it, and give it with --peer_config."
    )


def _is_finite(value: Any) -> bool:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and abs(value) <= sys.float_info.max  # which compares whole numbers of any length


def _windows(given: Any) -> list[str]:
    """A note where the network was scored window by window."""
    if not isinstance(given, Mapping) or given.get("mode") != "slide":
        return []
    crop, stride = _extent(given.get("crop_size")), _extent(given.get("stride"))
    told = f" of {crop} at a stride of {stride}" if crop and stride else ""
    return [f"Scored there with windows{told}; ours looks at the whole picture unless asked for windows."]


def _extent(pair: Any) -> str:
    if not isinstance(pair, (list, tuple)) or len(pair) != 2 or not all(map(_is_finite, pair)):
        return ""
    return f"{pair[1]}×{pair[0]}"  # mmsegmentation gives heights first
