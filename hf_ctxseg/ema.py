"""The exponential moving average of a model's tensors, which is scored and saved in their place.

Polyak and Juditsky: "Acceleration of Stochastic Approximation by Averaging", SIAM J. Control Optim. 30 (1992). The
decay grows with the steps, min(decay, (1 + steps) / (10 + steps)), as in TensorFlow's `ExponentialMovingAverage`, so
that the first weights are soon forgotten. Running statistics are averaged like weights.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_model, save_file
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .survival import SurvivingTrainer

AVERAGE = "ema.safetensors"


class WeightAverage:
    """The average of a model's parameters and buffers; what is no floating point number is copied.

    Args:
        model: The model, whose present tensors the average starts from.
        decay: Weight of the past in the long run, below 1.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.steps = 0
        self.tensors = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take in the tensors of the model after a step."""
        self.steps += 1
        share = 1 - min(self.decay, (1 + self.steps) / (10 + self.steps))
        averages, tensors = [], []
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                averages.append(self.tensors[name])
                tensors.append(tensor)
            else:
                self.tensors[name].copy_(tensor)
        torch._foreach_lerp_(averages, tensors, share)

    @torch.no_grad()
    def exchange(self, model: nn.Module) -> None:
        """Put the average into the model and the model's tensors in its place; a second call undoes it."""
        for name, tensor in model.state_dict().items():
            kept = tensor.clone()
            tensor.copy_(self.tensors[name])
            self.tensors[name].copy_(kept)

    def save(self, folder: Path) -> None:
        """Write the average as `ema.safetensors`, with the names of the model's own file."""
        tensors = {name: tensor.contiguous() for name, tensor in self.tensors.items()}
        save_file(tensors, folder / AVERAGE, metadata={"format": "pt", "steps": str(self.steps)})

    def load(self, folder: Path) -> None:
        """Go on from a saved average."""
        with safe_open(folder / AVERAGE, framework="pt") as file:
            self.steps = int(file.metadata()["steps"])
            for name, tensor in self.tensors.items():
                tensor.copy_(file.get_tensor(name))


class AveragingTrainer(SurvivingTrainer):
    """Trainer that ends with the average of the weights where `ema_decay` of its arguments is above 0.

    Checkpoints hold both: the weights themselves, from which training goes on, and their average.
    """

    average: WeightAverage | None = None

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train, and leave the average in the model."""
        if self.args.ema_decay > 0:
            self.average = WeightAverage(self.model, self.args.ema_decay)
            if checkpoint := kwargs.get("resume_from_checkpoint"):
                self.average.load(Path(checkpoint))
            self.add_callback(_AverageCallback(self))
        output = super().train(*args, **kwargs)
        if self.average is not None:
            self.average.exchange(self.model)
            self.average = None
        return output

    def load_trained(self, checkpoint: Path) -> None:
        """Put into the model what a training that ended with this checkpoint leaves in it."""
        load_model(self.model, checkpoint / (AVERAGE if self.args.ema_decay > 0 else "model.safetensors"))

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Have the model hold the average meanwhile, where there is one."""
        if self.average is None:
            yield
            return
        self.average.exchange(self.model)
        try:
            yield
        finally:
            self.average.exchange(self.model)

    def _write_checkpoint(self, folder: Path) -> None:
        super()._write_checkpoint(folder)
        if self.average is not None and self.args.should_save:
            self.average.save(folder)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        if self.average is not None:
            self.average.load(Path(self.state.best_model_checkpoint))


class _AverageCallback(TrainerCallback):
    def __init__(self, trainer: AveragingTrainer) -> None:
        self.trainer = trainer

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.trainer.average is not None:
            self.trainer.average.update(self.trainer.model)
