"""A Trainer that loses nothing: whole checkpoints, a way out on signals, batches without a finite loss left out.

The class here knows nothing of segmentation; `SegmentationTrainer` builds upon it.
"""

import errno
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from .checkpoints import PARTIAL, checkpoint_folder, checkpoints, publish, rotate, step_of
from .stop_signals import StopSignals, TrainingInterrupted
from .wording import listed

_OWED = "evaluation_owed"  # a file in a checkpoint that was saved instead of the evaluation due at its step
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class TrainingStopped(RuntimeError):
    """A training that cannot go on; its last complete checkpoint is kept."""


class SurvivingTrainer(Trainer):
    """Trainer with atomic checkpoints, whose steps without a finite loss change nothing.

    A batch may hold `name`, a list of what its samples are called, for messages. The training arguments hold
    `max_nan_steps`.

    Raises:
        TrainingStopped: From `train`: the loss was not finite for too long, memory or disk were not enough, a picture
            could not be read, or a process that loads pictures died.
        TrainingInterrupted: From `train`: after SIGINT or SIGTERM, when the checkpoint is saved.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.signals = StopSignals()
        self.survival = _SurvivalCallback(self)
        self.add_callback(self.survival)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train as Trainer does."""
        checkpoint = kwargs.get("resume_from_checkpoint")
        self.survival.owes_evaluation = checkpoint is not None and (Path(checkpoint) / _OWED).exists()
        with self.signals:
            try:
                output = super().train(*args, **kwargs)
            except Exception as error:
                if self.signals.number:
                    raise self._interrupted(self.signals.number) from error
                raise
        if self.survival.stop:
            raise self._interrupted(self.survival.stop)
        return output

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        """Make a step, and note whether its loss is finite."""
        names = inputs.pop("name", [])
        self.survival.before_forward()
        shape = tuple(inputs["pixel_values"].shape)
        try:
            loss = super().training_step(model, inputs, *args, **kwargs)
        except (MemoryError, RuntimeError) as error:
            if self.args.auto_find_batch_size or not _is_out_of_memory(error):
                raise
            raise TrainingStopped(
                f"Out of memory in step {self.state.global_step + 1} with {shape[0]} crops of {shape[2]}x{shape[3]} "
                f"pixels (height x width) on each device{_first_line(error)}: lower --per_device_train_batch_size or "
                f"--crop_size. {self._kept()}"
            ) from error
        if not bool(torch.isfinite(loss)):
            self.survival.bad_names += [str(name) for name in names] or ["a batch without names"]
        return loss

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """Load the batches of a step; what cannot be read is named."""
        try:
            return super().get_batch_samples(*args, **kwargs)
        except (ValueError, OSError, RuntimeError) as error:
            self._explain(error)
            raise

    def _evaluate(self, *args: Any, **kwargs: Any) -> Any:
        """Score; None if a signal came meanwhile, when the next session makes up for it."""
        self.survival.may_stop_evaluation = self.args.world_size == 1 and self.control.should_evaluate
        try:
            with self.explained_evaluation():
                return super()._evaluate(*args, **kwargs)
        except _EvaluationStopped:
            self.survival.stop_now(self.signals.number)
            return None
        finally:
            self.survival.may_stop_evaluation = False

    @contextmanager
    def explained_evaluation(self) -> Iterator[None]:
        """Turn what data and memory can do to an evaluation within a run into `TrainingStopped`."""
        try:
            yield
        except (MemoryError, ValueError, OSError, RuntimeError) as error:
            if _is_out_of_memory(error):
                raise TrainingStopped(
                    f"Out of memory in the evaluation after step {self.state.global_step} with "
                    f"--per_device_eval_batch_size {self.args.per_device_eval_batch_size}{_first_line(error)}: lower "
                    f"it, or --image_size. {self._kept()}"
                ) from error
            self._explain(error)
            raise

    def _determine_best_metric(self, metrics: Any, trial: Any) -> bool:
        return True if metrics is None else super()._determine_best_metric(metrics, trial)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Save everything that a run needs to continue, whole or not at all.

        A full disk is reported and training goes on: the checkpoint before is kept, and the next may fit.
        """
        folder = checkpoint_folder(Path(self.args.output_dir), self.state.global_step)
        partial = folder.with_name(folder.name + PARTIAL)
        failure: Exception | None = None
        try:
            self._write_checkpoint(partial)
        except (OSError, RuntimeError, SafetensorError) as error:
            failure = error
        (outcome,) = self._agree(_severity(failure))
        if self.args.should_save and not outcome:
            try:
                publish(partial, folder)
            except OSError as error:
                failure = error
        (outcome,) = self._agree(max(outcome, _severity(failure)))
        if not outcome:
            if self.args.should_save:
                rotate(folder.parent, step_of(folder), self.args.save_total_limit, self.state.best_model_checkpoint)
            return
        if self.args.should_save:
            shutil.rmtree(partial, ignore_errors=True)
        if outcome > 1:
            if isinstance(failure, TrainingStopped):
                raise failure
            cause = failure or "another process failed at it"
            raise TrainingStopped(f"{folder.name} could not be saved: {cause}. {self._kept()}") from failure
        if failure is not None:
            print(f"{folder.name} was not saved. {disk_full(folder.parent, self._bytes())} {self._kept()}", flush=True)

    def _write_checkpoint(self, folder: Path) -> None:
        for name, tensor in self.model.state_dict().items():
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                raise TrainingStopped(
                    f"{name} is not finite after step {self.state.global_step}, so that nothing is saved: "
                    f"lower --learning_rate. {self._kept()}"
                )
        self.store_flos()
        if self.state.best_global_step:
            best = checkpoint_folder(Path(self.args.output_dir), self.state.best_global_step)
            if best.is_dir() or self.state.best_global_step == self.state.global_step:
                self.state.best_model_checkpoint = str(best)
        self.save_model(str(folder), _internal_call=True)
        folder.mkdir(parents=True, exist_ok=True)  # where another process makes it, it may not be there yet
        if not self.args.save_only_model:
            self._save_optimizer_and_scheduler(str(folder))
            self._save_scaler(str(folder))
            self._save_rng_state(str(folder))
        if self.args.should_save:
            self.state.stateful_callbacks = self._callback_states()
            self.state.save_to_json(str(folder / "trainer_state.json"))
            if self.survival.owes_evaluation:
                (folder / _OWED).touch()

    def _callback_states(self) -> dict[str, Any]:
        states: dict[str, list[Any]] = {}
        for item in [*self.callback_handler.callbacks, self.control]:
            if isinstance(item, ExportableState):
                states.setdefault(type(item).__name__, []).append(item.state())
        return {name: found[0] if len(found) == 1 else found for name, found in states.items()}

    def _agree(self, *numbers: int) -> list[int]:
        """The highest of each number in all processes."""
        if self.args.world_size == 1:
            return list(numbers)
        shared = torch.tensor(numbers, device=self.args.device)
        torch.distributed.all_reduce(shared, torch.distributed.ReduceOp.MAX)
        return shared.tolist()

    def _bytes(self) -> int:
        tensors = [*self.model.state_dict().values()]
        for state in self.optimizer.state.values():
            tensors += [value for value in state.values() if isinstance(value, torch.Tensor)]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def _kept(self) -> str:
        """What a user still has, in a sentence."""
        newest = checkpoints(Path(self.args.output_dir))[-1:]
        if not newest:
            return "There is no checkpoint yet: the same command with --resume starts anew."
        return f"{newest[0].name} is kept: the same command with --resume continues from it."

    def _interrupted(self, number: int) -> TrainingInterrupted:
        name = signal.Signals(number).name
        return TrainingInterrupted(
            number, f"interrupted by {name} after step {self.state.global_step}. {self._kept()}"
        )

    def _explain(self, error: Exception) -> None:
        """Raise `TrainingStopped` for what data can do to a run."""
        lines = str(error).strip().splitlines() or [type(error).__name__]
        comes_from_worker = lines[0].startswith("Caught ")
        if isinstance(error, RuntimeError):
            if isinstance(error, TrainingStopped) or comes_from_worker or "DataLoader worker" not in lines[0]:
                return
            raise TrainingStopped(
                f"A process that loads pictures died after step {self.state.global_step} (often for want of memory): "
                f"lower --dataloader_num_workers; 0 loads without. {self._kept()}"
            ) from error
        # A worker sends its whole trace, whose last line is the error.
        cause = lines[-1].partition(": ")[2] if comes_from_worker else " ".join(lines)
        raise TrainingStopped(
            f"Training cannot go on after step {self.state.global_step}: {cause.rstrip('.')}. {self._kept()}"
        ) from error


class _EvaluationStopped(Exception):
    """Leaves an evaluation in which a signal came."""


class _SurvivalCallback(TrainerCallback):
    """What happens between Trainer's steps: leaving out bad ones, stopping, catching up on an evaluation."""

    def __init__(self, trainer: SurvivingTrainer) -> None:
        self.trainer = trainer
        self.stop = 0  # the signal that all processes agreed to stop for
        self.owes_evaluation = False
        self.may_stop_evaluation = False
        self.bad_names: list[str] = []
        self._all_bad_names: list[str] = []
        self._bad_steps = 0
        self._has_stopped = False
        self._is_fresh = True
        self._buffers: list[torch.Tensor] = []

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Forget another training."""
        self.stop, self._has_stopped = 0, False
        self._bad_steps, self.bad_names, self._all_bad_names = 0, [], []

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Catch up on an evaluation, and seed the step.

        Data loaders draw from torch's generator when they start workers, a resumed run at other moments than a whole
        one: what a step draws, for dropout, therefore depends on (seed, step, process) alone.
        """
        self._is_fresh = True
        if self.owes_evaluation:
            self.owes_evaluation = False
            self.trainer._determine_best_metric(self.trainer._evaluate(None, None), None)
        key = f"{args.seed}/{state.global_step}/{args.process_index}".encode()
        torch.manual_seed(int.from_bytes(blake2b(key, digest_size=7).digest(), "big"))

    def before_forward(self) -> None:
        """Keep the running statistics as they are before the step."""
        if not self._is_fresh:
            return
        self._is_fresh = False
        now = list(self.trainer.model.buffers())
        if [buffer.shape for buffer in now] != [buffer.shape for buffer in self._buffers]:
            self._buffers = [torch.empty_like(buffer) for buffer in now]
        for kept, buffer in zip(self._buffers, now, strict=True):
            kept.copy_(buffer)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Undo a step whose loss was not finite in any process, and learn of signals in any process."""
        trainer = self.trainer
        is_bad, self.stop = trainer._agree(bool(self.bad_names), trainer.signals.number)
        if not is_bad:
            self._bad_steps, self._all_bad_names = 0, []
            return
        for kept, buffer in zip(self._buffers, trainer.model.buffers(), strict=True):
            buffer.copy_(kept)
        if trainer.accelerator.scaler is None:  # which skips the step by itself
            trainer.optimizer.zero_grad()
        self._all_bad_names += self.bad_names
        self.bad_names = []
        self._bad_steps += 1
        if self._bad_steps >= args.max_nan_steps:
            self._give_up(state.global_step)

    def _give_up(self, step: int) -> None:
        names = self._all_bad_names
        if self.trainer.args.world_size > 1:
            every: list[Any] = [None] * self.trainer.args.world_size
            torch.distributed.all_gather_object(every, names)
            names = [name for part in every for name in part]
        names = list(dict.fromkeys(names))
        first = step + 2 - self._bad_steps
        steps = f"step {first}" if self._bad_steps == 1 else f"the {self._bad_steps} steps {first} to {step + 1}"
        raise TrainingStopped(
            f"The loss was NaN or infinite in {steps}, which were left out; the batches were "
            f"{listed(names)}. Look at these pictures, lower --learning_rate, or leave out --fp16. "
            f"{self.trainer._kept()}"
        )

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Save and stop if a signal came; at the end of an epoch wait for what belongs to it."""
        if self.stop and not float(state.epoch or 0.5).is_integer():
            self.stop_now(self.stop)
        return control

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Save and stop if a signal came in the epoch's last step; Trainer calls this after any stop, too."""
        if self._has_stopped:
            control.should_evaluate = control.should_save = control.should_log = False
        elif self.stop and not control.should_training_stop:
            self.stop_now(self.stop)
        return control

    def stop_now(self, number: int) -> None:
        """Have Trainer save and stop; an evaluation that is due is made up for by the next session."""
        control = self.trainer.control
        self.stop, self._has_stopped, self.owes_evaluation = number, True, control.should_evaluate
        control.should_evaluate = False
        control.should_save = control.should_training_stop = True

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leave an evaluation in which a signal came."""
        if self.may_stop_evaluation and self.trainer.signals.number:
            raise _EvaluationStopped


def disk_full(folder: Path, needed: int) -> str:
    """Say how much a full disk lacks, and what to do."""
    free = shutil.disk_usage(folder).free
    return (
        f"The disk of {folder} is full: about {needed / 1e6:.0f} MB are needed, {free / 1e6:.0f} MB are free. "
        "Make room there."
    )


def is_disk_full(error: BaseException | None) -> bool:
    """Whether an error of saving comes from a full disk; torch and safetensors tell it in words of their own."""
    if isinstance(error, OSError):
        return error.errno in _NO_SPACE
    text = str(error)
    return "inline_container" in text or any(f"os error {number}" in text for number in _NO_SPACE)


def _severity(error: Exception | None) -> int:
    return 0 if error is None else 1 if is_disk_full(error) else 2


def _is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, MemoryError) or any(
        words in str(error) for words in ("out of memory", "can't allocate memory", "not enough memory")
    )


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f" ({lines[0].rstrip('.')})" if lines else ""
