"""How many pictures a training gets through, and how much of its time it waits for them."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


@dataclass
class _Tally:
    images: int = 0
    waited: float = 0.0
    worked: float = 0.0

    def rates(self) -> dict[str, float]:
        seconds = self.waited + self.worked
        if not seconds:
            return {}
        return {
            "images_per_second": round(self.images / seconds, 2),
            "data_wait_share": round(self.waited / seconds, 4),
        }


class Throughput(TrainerCallback):
    """Counts pictures and time of training steps; evaluation and saving do not count.

    A step lasts from asking for its batches to the end of `on_step_end`. With workers, waiting is what they do not
    manage to do while the model computes.
    """

    def __init__(self) -> None:
        self._since_log = _Tally()
        self._in_all = _Tally()
        self._began: float | None = None

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Time what runs inside as waiting for data."""
        began = time.perf_counter()
        yield
        self._add(waited=time.perf_counter() - began)

    def count(self, images: int) -> None:
        """Count pictures, those of all processes."""
        self._add(images=images)

    def _add(self, images: int = 0, waited: float = 0.0, worked: float = 0.0) -> None:
        for tally in (self._since_log, self._in_all):
            tally.images += images
            tally.waited += waited
            tally.worked += worked

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the clock."""
        self._began = time.perf_counter()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stop it."""
        if self._began is not None:
            self._add(worked=time.perf_counter() - self._began)
            self._began = None

    def since_log(self) -> dict[str, float]:
        """Pictures per second and share of waiting since this was last asked; empty before the first step."""
        tally, self._since_log = self._since_log, _Tally()
        return tally.rates()

    def in_all(self) -> dict[str, float]:
        """Pictures per second and share of waiting in this session."""
        return self._in_all.rates()
