"""How far a long job is: a bar on a terminal, plain lines elsewhere."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm

from .wording import duration

Progress = Callable[[int, int], None]


@contextmanager
def terminal_bar(progress: Progress | None = None, unit: str = "window") -> Iterator[Progress]:
    """Give what is called with the number done and the number in all; by default a bar, on a terminal only."""
    if progress is not None:
        yield progress
        return
    bar = tqdm(unit=unit, leave=False, disable=not sys.stderr.isatty())

    def show(done: int, total: int) -> None:
        bar.total = total
        bar.update(done - bar.n)

    try:
        yield show
    finally:
        bar.close()


def lines(say: Callable[[str], None], unit: str = "windows") -> Progress:
    """Give what says a line each time that another tenth is done, with the time left."""
    started, tenth = time.monotonic(), 0

    def show(done: int, total: int) -> None:
        nonlocal started, tenth
        if not done or done * 10 // total < tenth:  # another job begins
            started, tenth = time.monotonic(), 0
        if done * 10 // total > tenth:
            tenth = done * 10 // total
            left = duration((time.monotonic() - started) * (total - done) / done)
            say(f"{done} of {total} {unit}{f', {left} left' if done < total else ''}")

    return show
