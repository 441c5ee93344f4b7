"""Values as a model card writes them: escaped for Markdown, YAML and table cells, numbers short and with units."""

import os
import re
from typing import Any

_MARKDOWN = re.compile(r"([\\`*_\[\]|~$])")
_BAR = 20  # characters of a full bar


def plain(value: object) -> str:
    """One line of text without control characters: safe as a YAML value."""
    return " ".join("".join(char if char.isprintable() else " " for char in str(value)).split())


def markdown(value: object) -> str:
    """One line of text in which Markdown and HTML find nothing to do."""
    text = plain(value).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return _MARKDOWN.sub(r"\\\1", text)


def code(value: object) -> str:
    """Inline code, or escaped text where the value itself would end the code or a table's cell."""
    text = plain(value)
    return markdown(text) if not text or set(text) & set("`|\\") else f"`{text}`"


def fenced(text: object, language: str) -> str:
    """A block of code with a fence that the text cannot close."""
    line = plain(text)
    fence = "`" * max([3, *(len(ticks) + 1 for ticks in re.findall(r"`+", line))])
    return f"{fence}{language}\n{line}\n{fence}"


def number(value: object) -> str:
    """Integers in full, other numbers to four digits at least, sizes with an x between; texts are escaped."""
    if isinstance(value, list):
        return " x ".join(number(item) for item in value)
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return markdown(value)


def percent(value: float | None) -> str:
    """A share in percent, without the sign; `-` where it is not known."""
    return "-" if value is None else f"{100 * value:.1f}"


def bar(value: float | None) -> str:
    """A share as a row of blocks."""
    return "█" * round(_BAR * (value or 0.0))


def known(metrics: dict[str, Any], name: str) -> dict[str, Any]:
    """The facts of one part of `metrics.json` that are known."""
    return {key: value for key, value in (metrics.get(name) or {}).items() if value is not None}


def hub_id(value: object) -> str | None:
    """The value if it can only be meant as `namespace/name` on the Hub: not a folder that is here, nor a path."""
    text = str(value or "")
    is_id = re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", text) and not os.path.exists(text)
    return text if is_id else None
