"""Arguments of training that transformers' own lack, on weights, memory and schedule; with their checks."""

import os
from dataclasses import dataclass, field
from typing import Any

from transformers import TrainingArguments


@dataclass
class TrainerOptions(TrainingArguments):
    """transformers' `TrainingArguments` with an average of the weights, rates by stage, early stopping and more."""

    ema_decay: float = field(
        default=0.0,
        metadata={"help": "Score and save a moving average of the weights with this decay, such as 0.999; 0: do not."},
    )
    layer_decay: float = field(
        default=1.0, metadata={"help": "Learning rate of each backbone stage as a multiple of that of the next."}
    )
    sync_batch_norm: bool = field(
        default=False, metadata={"help": "Share the statistics of batch normalisation between the processes (CUDA)."}
    )
    early_stopping_patience: int | None = field(
        default=None, metadata={"help": "Stop after this many scores without a better mIoU, and take the best model."}
    )
    eval_output_stride: int | None = field(
        default=None, metadata={"help": "Score at this output stride (default: that of training)."}
    )

    def __post_init__(self) -> None:
        given: Any = self  # names that differ between versions of transformers
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay is {self.ema_decay}, but must be from 0 to below 1: 0.999 is usual.")
        if not 0 < self.layer_decay <= 1:
            raise ValueError(f"layer_decay is {self.layer_decay}, but must be above 0 and at most 1: 0.8 is usual.")
        if self.early_stopping_patience is not None:
            if self.early_stopping_patience < 1:
                raise ValueError(f"early_stopping_patience is {self.early_stopping_patience}, but must be at least 1.")
            if given.eval_strategy == "no" or given.save_strategy == "no":
                raise ValueError(
                    "early_stopping_patience needs scores and checkpoints: leave out --eval_strategy no and "
                    "--save_strategy no."
                )
            given.load_best_model_at_end = True
        if given.load_best_model_at_end and given.metric_for_best_model is None:
            given.metric_for_best_model = "mean_iou"
        if given.fsdp or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
            raise ValueError(
                "FSDP splits the weights over the processes, but each of them scores and draws its pictures alone: "
                "leave it out. DistributedDataParallel, the default of torchrun and accelerate launch, holds the "
                "whole model on each device; --gradient_checkpointing saves memory."
            )
        # The old name gives a warning where there is the new one.
        if hasattr(self, "activation_checkpointing") and given.activation_checkpointing is None:
            given.activation_checkpointing = given.gradient_checkpointing
            given.activation_checkpointing_kwargs = (
                given.activation_checkpointing_kwargs or given.gradient_checkpointing_kwargs
            )
        super().__post_init__()
        if self.sync_batch_norm and self.device.type != "cuda":
            raise ValueError(
                f"sync_batch_norm works on CUDA devices only, but this is a training on {self.device.type}: leave it "
                "out, or freeze the statistics with --freeze_batch_norm all."
            )
