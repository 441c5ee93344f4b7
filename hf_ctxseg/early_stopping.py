"""Stopping a training whose scores do not rise any more."""

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


def has_converged(history: Sequence[Mapping[str, Any]], patience: int | None) -> bool:
    """Whether the last `patience` mean IoUs of a log are all no better than one before; None: never.

    The log is part of a checkpoint, so that a continued training stops where an uninterrupted one does.
    """
    scores = [logs["eval_mean_iou"] for logs in history if "eval_mean_iou" in logs]
    return patience is not None and len(scores) > patience and max(scores[-patience:]) <= max(scores[:-patience])


class EarlyStopping(TrainerCallback):
    """Stops the training after `patience` scores without a better one."""

    def __init__(self, patience: int) -> None:
        self.patience = patience

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Look at the scores so far."""
        if has_converged(state.log_history, self.patience):
            control.should_training_stop = True
