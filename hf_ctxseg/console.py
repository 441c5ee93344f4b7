"""What a training prints: a line for each log with the time left, a line for each evaluation."""

import time
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .samples import ClassInfo
from .wording import duration


class ConsoleCallback(TrainerCallback):
    """One plain line for each log and a table for each evaluation."""

    def __init__(self, classes: ClassInfo) -> None:
        self.classes = classes
        self.started = time.monotonic()
        self.first_step = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the clock."""
        self.started, self.first_step = time.monotonic(), state.global_step

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Print the step, its loss and the time left, or the scores."""
        logs = logs or {}
        if not state.is_world_process_zero:
            return
        if "loss" in logs:
            done = max(state.global_step - self.first_step, 1)
            seconds = (time.monotonic() - self.started) / done
            left = duration(seconds * (state.max_steps - state.global_step))
            speed = f"{seconds:.2f} s/step"
            if "images_per_second" in logs:
                speed += f", {logs['images_per_second']:.1f} images/s ({logs['data_wait_share']:.0%} waiting for data)"
            print(
                f"step {state.global_step}/{state.max_steps}  loss {float(logs['loss']):.4f}  "
                f"lr {float(logs['learning_rate']):.2e}  {speed}  {left} left",
                flush=True,
            )
        elif "eval_mean_iou" in logs:
            print(
                f"step {state.global_step}/{state.max_steps}  evaluation: mIoU {logs['eval_mean_iou']:.4f}  "
                f"mean accuracy {logs['eval_mean_accuracy']:.4f}  pixel accuracy {logs['eval_overall_accuracy']:.4f}  "
                f"loss {logs['eval_loss']:.4f}",
                flush=True,
            )
