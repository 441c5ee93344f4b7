"""transformers' Trainer for segmentation: learning rates by part, scores streamed in constant memory, previews.

Evaluation turns each picture's logits into counts on the device, at the label's original size; only counts are
gathered, so that memory does not grow with the number of pictures and padded duplicates of a distributed sampler are
dropped as Trainer drops them.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from .arguments import CtxSegTrainingArguments
from .batch_norms import freeze_norms, synchronise_norms
from .console import ConsoleCallback
from .data import EvaluationDataset, TrainingDataset, collate_evaluation
from .early_stopping import EarlyStopping
from .ema import AveragingTrainer
from .image_processing_ctxseg import CtxSegImageProcessor
from .inference import predict_mask
from .learning_rates import parameter_groups
from .losses import SegmentationLoss, parse_loss
from .model_building import at_output_stride
from .modeling_ctxseg import CtxSegForSemanticSegmentation
from .samples import ClassInfo
from .scoring import StreamedScores, count_picture
from .streaming import TrainingStream, stream_loader
from .throughput import Throughput
from .tracking import class_scores, track_evaluation
from .views import PLAIN, Views, view_maps
from .visualization import preview_grid


class SegmentationTrainer(AveragingTrainer):
    """Trainer whose evaluation scores whole pictures at their own size.

    Args:
        model: A segmentation model of this package.
        args: The training arguments.
        classes: Names, colours and ignore index.
        image_processor: Saved with each checkpoint.
        train_dataset: Crops; None for evaluation alone.
        eval_dataset: Whole pictures; None trains without scores.
        views: How pictures are looked at in evaluation.
        class_weights: Weight of each class in the loss; None: 1 for all.
    """

    def __init__(
        self,
        model: CtxSegForSemanticSegmentation,
        args: CtxSegTrainingArguments,
        classes: ClassInfo,
        image_processor: CtxSegImageProcessor,
        train_dataset: TrainingDataset | TrainingStream | None = None,
        eval_dataset: EvaluationDataset | None = None,
        views: Views = PLAIN,
        class_weights: Sequence[float] | None = None,
    ) -> None:
        self.classes = classes
        self.loss = SegmentationLoss(
            parse_loss(args.loss),
            classes.ignore_index,
            model.config.align_corners,
            None if class_weights is None else torch.tensor(class_weights),
            args.label_smoothing,
        )
        self.views = views
        self.scores = StreamedScores(classes)
        self.throughput = Throughput()
        self.evaluation_seconds: float | None = None
        self.scored_step: int | None = None
        if args.channels_last and args.device.type != "cpu":  # on a CPU the model chooses by itself
            model.to(memory_format=torch.channels_last)
        if args.sync_batch_norm:
            synchronise_norms(model)
        super().__init__(
            model=model,
            args=args,
            data_collator=_collate,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=image_processor,
            compute_metrics=self.scores,
        )
        model.base_model.refuses_nan = False  # a step with such pictures is undone, and they are named
        self.frozen_norms = freeze_norms(model, args.freeze_batch_norm)
        self._twin: CtxSegForSemanticSegmentation | None = None
        if args.eval_output_stride not in (None, model.config.output_stride):
            self._twin = at_output_stride(model, args.eval_output_stride)
        self._add_callbacks()

    def _add_callbacks(self) -> None:
        self.add_callback(_EpochCallback(self.train_dataset))
        self.add_callback(self.throughput)
        if self.args.early_stopping_patience is not None:
            if self.eval_dataset is None:
                raise ValueError("early_stopping_patience needs pictures to score: add them, or leave it out.")
            self.add_callback(EarlyStopping(self.args.early_stopping_patience))
        if self.args.disable_tqdm:
            self.remove_callback(PrinterCallback)
            self.add_callback(ConsoleCallback(self.classes))

    @property
    def scored_model(self) -> CtxSegForSemanticSegmentation:
        """The model, or its twin at the output stride of evaluation."""
        return self.model if self._twin is None else self._twin

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Groups of parameters as of `parameter_groups`."""
        if getattr(self, "optimizer", None) is None:
            optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            self.optimizer = optimizer_class(parameter_groups(self.model, self.args), **options)
        return self.optimizer

    def get_train_dataloader(self) -> torch.utils.data.DataLoader[Any]:
        """Give the loader of training batches; a stream deals itself out to processes and workers."""
        if isinstance(self.train_dataset, TrainingStream):
            return stream_loader(self.train_dataset, self.args, _collate, self.args.device)
        return super().get_train_dataloader()

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log, with pictures per second and the share of time spent waiting for them beside the loss."""
        super().log({**logs, **self.throughput.since_log()} if "loss" in logs else logs, *args, **kwargs)

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list[Any], Any]:
        """Give the batches of a step, and what their pixel losses are divided by.

        That is the number of valid pixels in all batches of all processes, over the number of these batches: Trainer
        and `DistributedDataParallel` take the mean over them.
        """
        with self.throughput.waiting():
            batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if not batches:
            return batches, None
        self.throughput.count(sum(len(batch["labels"]) for batch in batches) * self.args.world_size)
        pixels = torch.stack([self.loss.count(batch["labels"]).to(device) for batch in batches]).sum()
        parts = len(batches) * self.args.world_size * max(1, self.args.n_gpu)
        return batches, self.accelerator.reduce(pixels, reduction="sum") / parts

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Compute the loss; frozen normalisations stay in evaluation mode although Trainer calls `train()`."""
        for norm in self.frozen_norms:
            norm.eval()
        bare = self.accelerator.unwrap_model(model)
        bare.training_loss = replace(self.loss, pixels=num_items_in_batch)
        try:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        finally:
            bare.training_loss = None

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[None, tuple[torch.Tensor, torch.Tensor], torch.Tensor]:
        """Count a batch of whole pictures: confusion matrices and counts near edges (B, …), and losses (B, 1)."""
        inputs = self._prepare_inputs(inputs)
        config, ignore_index = self.model.config, self.classes.ignore_index
        model = model if self._twin is None else self._twin
        counts = []
        with torch.no_grad(), self.compute_loss_context_manager():
            for maps, label in zip(self._views(model, inputs["pixel_values"]), inputs["labels"], strict=True):
                counts.append(count_picture(maps, label, self.classes.num_labels, ignore_index, config.align_corners))
        matrices, boundary, losses = (torch.stack(parts).to(self.args.device) for parts in zip(*counts, strict=True))
        return None, (matrices, boundary), losses

    def _views(self, model: nn.Module, pictures: Sequence[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
        """Logits (1, K, h, w) of each picture's views: in one pass where all have one size, one by one where not."""

        def forward(pixels: torch.Tensor) -> torch.Tensor:
            with self.accelerator.autocast():
                logits: torch.Tensor = model(pixels).logits
            return logits.float()

        same = len({picture.shape for picture in pictures}) == 1
        for batch in [torch.stack(list(pictures))] if same else [picture[None] for picture in pictures]:
            maps = view_maps(forward, batch, self.views, self.scored_model.config.output_stride)
            yield from ([view[index : index + 1] for view in maps] for index in range(len(batch)))

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Score the validation pictures and draw the preview grid, with the average of the weights if there is one."""
        started = time.monotonic()
        with self.averaged():
            if self.args.world_size > 1:
                # Running statistics differ between processes after a step; those of the first are what is saved.
                for buffer in self.model.buffers():
                    torch.distributed.broadcast(buffer, src=0)
            if self._twin is not None:
                self._twin.load_state_dict(self.model.state_dict(), assign=True)
                self._twin.to(self.args.device).eval()
            metrics: dict[str, float] = super().evaluate(*args, **kwargs)
            self.scored_step = self.state.global_step
            self.evaluation_seconds = round(time.monotonic() - started, 1)
            if self.is_world_process_zero():
                preview = self._draw_preview() if self.args.preview_images > 0 else None
                scores = class_scores(self.scores.last, self.classes.names)
                track_evaluation(self.callback_handler.callbacks, self.state.global_step, scores, preview)
        return metrics

    def _draw_preview(self) -> Image.Image:
        samples = self.eval_dataset.samples
        chosen = np.linspace(0, len(samples) - 1, min(self.args.preview_images, len(samples))).round().astype(int)
        rows = []
        for index in chosen:
            picture, label = samples.image(int(index)), samples.label(int(index))
            rows.append((picture, label, predict_mask(self.scored_model, self.processing_class, picture, self.views)))
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
        return grid


class _EpochCallback(TrainerCallback):
    """Tells the training pictures which epoch is drawn.

    accelerate's data loaders forget it wherever they wrap the batch sampler: with several processes, and in the epoch
    that a resumed run continues.
    """

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Tell a stream how many batches of a resumed run are only skipped."""
        if isinstance(self.dataset, TrainingStream):
            seen = 0 if args.ignore_data_skip else state.global_step * args.gradient_accumulation_steps
            self.dataset.skip_batches(seen)

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(int(state.epoch or 0))


def _collate(batch: Sequence[dict[str, Any]]) -> dict[str, Any]:
    if "index" in batch[0]:
        return collate_evaluation(batch)
    stacked: dict[str, Any] = {}
    for key in batch[0]:
        column = [item[key] for item in batch]
        stacked[key] = column if key == "name" else torch.stack(column)
    return stacked
