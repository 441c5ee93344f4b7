"""transformers' Trainer for segmentation: learning rates by part, scores streamed in constant memory, previews.

Evaluation turns the logits of each picture into a K×K confusion matrix on the device, at the label's original size;
only matrices are gathered, so that memory does not grow with the number of pictures and padded duplicates of a
distributed sampler are dropped as Trainer drops them.
"""

import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import TensorBoardCallback
from transformers.trainer_callback import PrinterCallback

from .arguments import CtxSegTrainingArguments
from .data import EvaluationDataset, TrainingDataset, collate_evaluation
from .dense_loss import upsampled_cross_entropy
from .image_processing_ctxseg import CtxSegImageProcessor
from .inference import predict_mask
from .metrics import MeanIoU, confusion_matrix
from .modeling_ctxseg import CtxSegForSemanticSegmentation
from .samples import ClassInfo
from .upsampling import upsampled_argmax
from .visualization import preview_grid


class SegmentationTrainer(Trainer):
    """Trainer whose evaluation scores whole pictures at their own size.

    Args:
        model: A segmentation model of this package.
        args: The training arguments.
        classes: Names, colours and ignore index.
        image_processor: Saved with each checkpoint.
        train_dataset: Crops; None for evaluation alone.
        eval_dataset: Whole pictures; None trains without scores.
    """

    def __init__(
        self,
        model: CtxSegForSemanticSegmentation,
        args: CtxSegTrainingArguments,
        classes: ClassInfo,
        image_processor: CtxSegImageProcessor,
        train_dataset: TrainingDataset | None = None,
        eval_dataset: EvaluationDataset | None = None,
    ) -> None:
        self.classes = classes
        self.scores = _StreamedScores(classes)
        self.evaluation_seconds: float | None = None
        self.scored_step: int | None = None
        if args.channels_last and args.device.type != "cpu":  # on a CPU the model chooses by itself
            model.to(memory_format=torch.channels_last)
        super().__init__(
            model=model,
            args=args,
            data_collator=_collate,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=image_processor,
            compute_metrics=self.scores,
        )
        self.add_callback(_EpochCallback(train_dataset))
        self.frozen_norms = _freeze_norms(model, args.freeze_batch_norm)
        if args.disable_tqdm:
            self.remove_callback(PrinterCallback)
            self.add_callback(ConsoleCallback(classes))

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Four groups: backbone and the rest at its multiple of the rate, with and without weight decay."""
        if getattr(self, "optimizer", None) is None:
            optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            self.optimizer = optimizer_class(self._parameter_groups(), **options)
        return self.optimizer

    def _parameter_groups(self) -> list[dict[str, Any]]:
        groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                # Norms' gains and all biases are vectors; what is left are kernels.
                groups.setdefault((".backbone." not in f".{name}", parameter.dim() > 1), []).append(parameter)
        rate = self.args.learning_rate
        return [
            {
                "params": parameters,
                "lr": rate * (self.args.head_learning_rate_factor if is_head else 1.0),
                "weight_decay": self.args.weight_decay if decays else 0.0,
            }
            for (is_head, decays), parameters in sorted(groups.items())
        ]

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Compute the loss; frozen normalisations stay in evaluation mode although Trainer calls `train()`."""
        for norm in self.frozen_norms:
            norm.eval()
        return super().compute_loss(model, inputs, *args, **kwargs)

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[None, torch.Tensor, torch.Tensor]:
        """Score a batch of whole pictures: matrices (B, K, K) and (loss sum, valid pixels) (B, 2)."""
        inputs = self._prepare_inputs(inputs)
        matrices, losses = [], []
        ignore_index, align_corners = self.classes.ignore_index, self.model.config.align_corners
        with torch.no_grad(), self.compute_loss_context_manager():
            for logits, label in zip(_logits(model, inputs["pixel_values"]), inputs["labels"], strict=True):
                pixels = (label != ignore_index).sum()
                mean = upsampled_cross_entropy(logits[None], label[None], ignore_index, align_corners)
                losses.append(torch.stack([mean * pixels, pixels.float()]))
                mask = upsampled_argmax(logits[None], (label.shape[0], label.shape[1]), align_corners)[0]
                matrices.append(confusion_matrix(mask, label, self.classes.num_labels, ignore_index))
        return None, torch.stack(matrices), torch.stack(losses)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Score the validation pictures and draw the preview grid."""
        started = time.monotonic()
        if self.args.world_size > 1:
            # Running statistics differ between processes after a step; those of the first are what is saved.
            for buffer in self.model.buffers():
                torch.distributed.broadcast(buffer, src=0)
        metrics: dict[str, float] = super().evaluate(*args, **kwargs)
        self.scored_step = self.state.global_step
        self.evaluation_seconds = round(time.monotonic() - started, 1)
        if self.is_world_process_zero() and self.args.preview_images > 0:
            self._draw_preview()
        return metrics

    def _draw_preview(self) -> None:
        samples = self.eval_dataset.samples
        chosen = np.linspace(0, len(samples) - 1, min(self.args.preview_images, len(samples))).round().astype(int)
        rows = []
        for index in chosen:
            picture, label = samples.image(int(index)), samples.label(int(index))
            rows.append((picture, label, predict_mask(self.model, self.processing_class, picture)))
        grid = preview_grid(
            rows,
            self.classes.names,
            self.classes.palette,
            self.classes.ignore_index,
            title=f"step {self.state.global_step}",
        )
        path = Path(self.args.output_dir) / "previews" / f"step-{self.state.global_step:06d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        grid.save(path)
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
                callback.tb_writer.add_image("previews", np.asarray(grid), self.state.global_step, dataformats="HWC")


class _StreamedScores:
    """What Trainer calls with each gathered batch; the last result stays readable, per class."""

    def __init__(self, classes: ClassInfo) -> None:
        self.metric = MeanIoU(classes.num_labels, classes.ignore_index, classes.names)
        self.loss_and_pixels = torch.zeros(2, dtype=torch.float64)
        self.last: dict[str, Any] = {}

    def __call__(self, batch: Any, compute_result: bool = True) -> dict[str, float]:
        self.metric.add_matrix(torch.as_tensor(batch.predictions).sum(dim=0).cpu().numpy())
        self.loss_and_pixels += torch.as_tensor(batch.label_ids).cpu().double().sum(dim=0)
        if not compute_result:
            return {}
        loss, pixels = self.loss_and_pixels.tolist()
        self.loss_and_pixels.zero_()
        self.last = {**self.metric.compute(), "loss": loss / max(pixels, 1.0)}
        return {name: value for name, value in self.last.items() if isinstance(value, float)}


class _EpochCallback(TrainerCallback):
    """Tells the training pictures which epoch is drawn.

    accelerate's data loaders forget it wherever they wrap the batch sampler: with several processes, and in the epoch
    that a resumed run continues.
    """

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(int(state.epoch or 0))


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
            print(
                f"step {state.global_step}/{state.max_steps}  loss {float(logs['loss']):.4f}  "
                f"lr {float(logs['learning_rate']):.2e}  {seconds:.2f} s/step  {left} left",
                flush=True,
            )
        elif "eval_mean_iou" in logs:
            print(
                f"step {state.global_step}/{state.max_steps}  evaluation: mIoU {logs['eval_mean_iou']:.4f}  "
                f"mean accuracy {logs['eval_mean_accuracy']:.4f}  pixel accuracy {logs['eval_overall_accuracy']:.4f}  "
                f"loss {logs['eval_loss']:.4f}",
                flush=True,
            )


def duration(seconds: float) -> str:
    """Write a time as people say it: `3 min 20 s`."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60} min"


def score_table(scores: Mapping[str, Any]) -> str:
    """Write the part `evaluation` of `metrics.json` as a text table, one line per class."""
    width = max(len(name) for name in [*scores["per_category_iou"], "class"])
    lines = [f"{'class':<{width}}     IoU  accuracy"]
    for name, iou in scores["per_category_iou"].items():
        lines.append(f"{name:<{width}}  {_score(iou)}    {_score(scores['per_category_accuracy'][name])}")
    lines.append(f"{'mean':<{width}}  {_score(scores['mean_iou'])}    {_score(scores['mean_accuracy'])}")
    return "\n".join([*lines, f"pixel accuracy {_score(scores['overall_accuracy']).strip()}"])


def _score(value: float) -> str:
    return "absent" if math.isnan(value) else f"{value:6.4f}"


def _collate(batch: Sequence[dict[str, Any]]) -> dict[str, Any]:
    if "index" in batch[0]:
        return collate_evaluation(batch)
    return {key: torch.stack([item[key] for item in batch]) for key in batch[0]}


def _logits(model: nn.Module, pictures: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Logits (K, h, w) of each picture: in one forward where all have one size, one by one where not."""
    if len({picture.shape for picture in pictures}) == 1:
        return list(model(torch.stack(list(pictures))).logits)
    return [model(picture[None]).logits[0] for picture in pictures]


def _freeze_norms(model: CtxSegForSemanticSegmentation, part: str) -> list[nn.Module]:
    roots: dict[str, list[nn.Module]] = {"none": [], "backbone": [model.backbone], "all": [model]}
    norms: list[nn.Module] = [
        module for root in roots[part] for module in root.modules() if isinstance(module, _BatchNorm)
    ]
    for norm in norms:
        norm.requires_grad_(False)
    return norms
