"""How messages and cards name many things, the first few and how many more there are, and times."""

from collections.abc import Iterable


def listed(names: Iterable[str], count: int = 10) -> str:
    """The first names, separated by commas, and the number of the others."""
    names = list(names)
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + more


def listed_tensors(names: Iterable[str]) -> str:
    """The number of tensors, with the first names."""
    names = list(names)
    return f"{len(names)} tensors ({listed(names)})"


def duration(seconds: float) -> str:
    """A time as people say it: `3 min 20 s`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    if minutes:
        return f"{minutes} min {rest} s"
    return f"{seconds:.2g} s" if seconds < 10 else f"{rest} s"
