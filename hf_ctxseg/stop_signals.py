"""SIGTERM and Ctrl-C as wishes that are looked at between steps: clusters send them before they take a node."""

import os
import signal
import threading
import time
from types import FrameType
from typing import Any

from typing_extensions import Self

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
# torchrun passes a terminal's Ctrl-C on to processes that had it already.
_ECHO_SECONDS = 2.0


class TrainingInterrupted(KeyboardInterrupt):
    """A training that a signal ended, after its checkpoint was saved.

    Args:
        number: The signal.
        message: What was saved.
    """

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.exit_code = 128 + number


class StopSignals:
    """Notes SIGINT and SIGTERM instead of dying of them; a second one ends the process at once."""

    def __init__(self) -> None:
        self.number = 0
        self._since = 0.0
        self._owner = os.getpid()
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        self.number, self._owner = 0, os.getpid()
        if threading.current_thread() is threading.main_thread():  # no other may
            self._before = {number: signal.signal(number, self._note) for number in _SIGNALS}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._owner:  # a worker that inherited this: the main process ends it
            if number == signal.SIGTERM:
                os._exit(128 + number)
            return
        is_echo = "TORCHELASTIC_RUN_ID" in os.environ and time.monotonic() - self._since < _ECHO_SECONDS
        if self.number and not is_echo:
            os._exit(128 + number)
        if not self.number:
            self.number, self._since = number, time.monotonic()
            name = signal.Signals(number).name
            # not print: its buffer may be in use where the signal came
            os.write(2, f"\n{name}: saving a checkpoint after this step; again to leave at once.\n".encode())
