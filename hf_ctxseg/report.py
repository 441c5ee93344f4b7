"""What a run says of itself: `metrics.json`, the table of classes, the figures and the card."""

import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from .arguments import Arguments, CtxSegTrainingArguments, DataArguments
from .augmentation import CROP_TRIES
from .boundary_metrics import BOUNDARY_SHARE
from .card_pictures import write_samples
from .cost import measure_cost
from .data import DataSplits
from .label_scan import LabelStatistics
from .model_building import backbone_source
from .model_card import write_card
from .modeling_ctxseg import CtxSegForSemanticSegmentation
from .plots import plot_confusion, plot_curves, plot_per_class
from .registry import head_name
from .run_folder import write_class_table, write_confusion_table, write_json
from .samples import ClassInfo, Samples
from .scoring import named_scores, score_table
from .trainer import SegmentationTrainer
from .wording import duration

COST_SECONDS = 10.0  # spent at the end of a training on what the model costs


def device_name(arguments: CtxSegTrainingArguments) -> str:
    """Name the kind and number of devices."""
    if arguments.device.type == "cuda":
        count = max(arguments.world_size, arguments.n_gpu)
        return f"{count} × {torch.cuda.get_device_name()}" if count > 1 else torch.cuda.get_device_name()
    processes = f"{arguments.world_size} processes of " if arguments.world_size > 1 else ""
    return f"{arguments.device.type}, {processes}{torch.get_num_threads()} threads"


def precision(arguments: CtxSegTrainingArguments) -> str:
    """Name the number format of the training."""
    mixed = "bf16" if arguments.bf16 else "fp16" if arguments.fp16 else getattr(arguments, "mixed_precision", "no")
    return {"bf16": "bfloat16 autocast", "fp16": "float16 autocast"}.get(mixed, "float32")


def describe_model(model: CtxSegForSemanticSegmentation, origin: str | None) -> dict[str, Any]:
    """The part `model` of `metrics.json`."""
    return {
        "class": type(model).__name__,
        "head": head_name(type(model.config)),
        "backbone": model.config.backbone,
        "backbone_weights": public_name(origin),
        **backbone_source(model.config.backbone, origin),
        "parameters": model.num_parameters(),
        "output_stride": model.config.output_stride,
    }


def _describe_data(data: DataSplits, arguments: DataArguments, statistics: LabelStatistics | None) -> dict[str, Any]:
    counts = [] if statistics is None else statistics.histogram.tolist()
    return {
        "source": data.source,
        "license": arguments.data_license,
        "train_images": 0 if data.train is None else None if data.is_streamed else len(data.train),
        "eval_images": len(data.validation) if data.validation is not None else 0,
        "classes": list(data.classes.names),
        "ignore_index": data.classes.ignore_index,
        "class_pixels": dict(zip(data.classes.names, counts, strict=False)),
    }


def describe_evaluation(trainer: SegmentationTrainer, split: str) -> dict[str, Any]:
    """The part `evaluation` of `metrics.json`: the last scores, and the protocol beside them."""
    scores = trainer.scores.last
    if not scores:
        return {}
    processor, views = trainer.processing_class, trainer.views
    edge = processor.size["max_height"] if processor.do_resize else None
    size = "as they are" if edge is None else f"scaled to a longest edge of {edge} pixels"
    what, scales = views.describe()
    stride, ignore_index = trainer.scored_model.config.output_stride, trainer.classes.ignore_index
    trained = trainer.model.config.output_stride
    return {
        "split": split,
        "protocol": (
            f"{what} {size}, logits upsampled to the label's original size, {scales}, ignore_index {ignore_index}, "
            f"output stride {stride}{'' if stride == trained else f' (the model as saved: {trained})'}"
        ),
        "settings": {
            "longest_edge": edge,
            "output_stride": stride,
            "window": views.window,
            "overlap": views.overlap if views.window is not None else None,
            "blend": views.blend if views.window is not None else None,
            "scales": list(views.scales),
            "flip": views.flip,
            "ignore_index": ignore_index,
            "boundary_share_of_diagonal": BOUNDARY_SHARE,
        },
        "num_images": len(trainer.eval_dataset),
        **named_scores(scores, trainer.classes.names),
        "seconds": trainer.evaluation_seconds,
    }


def describe_run(
    trainer: SegmentationTrainer,
    arguments: Arguments,
    data: DataSplits,
    statistics: LabelStatistics | None,
    origin: str,
    train_loss: float,
    seconds: float,
    command: str | None,
    resumed: bool,
) -> dict[str, Any]:
    """Everything that `metrics.json` holds; a continued run knows neither its whole time nor its mean loss."""
    model_arguments, data_arguments, training = arguments
    weights = trainer.loss.class_weights
    measures = training.measure_cost and trainer.is_world_process_zero()
    return {
        "model": describe_model(trainer.model, origin),
        "data": _describe_data(data, data_arguments, statistics),
        "training": {
            "command": command,
            "steps": trainer.state.global_step,
            "epochs": round(trainer.state.epoch or 0.0, 2),
            "batch_size": training.train_batch_size * training.world_size * training.gradient_accumulation_steps,
            "crop_size": [data_arguments.crop_size[0], data_arguments.crop_size[-1]],
            "seconds": None if resumed else round(seconds, 1),
            "train_loss": None if resumed else train_loss,
            **trainer.throughput.in_all(),
            "loss": training.loss,
            "class_weights": None if weights is None else dict(zip(data.classes.names, weights.tolist(), strict=True)),
            "label_smoothing": training.label_smoothing,
            "learning_rate": training.learning_rate,
            "head_learning_rate_factor": training.head_learning_rate_factor,
            "optimizer": str(getattr(training.optim, "value", training.optim)),
            "lr_scheduler": _schedule(training),
            "weight_decay": training.weight_decay,
            "warmup_steps": training.warmup_steps or None,
            "layer_decay": training.layer_decay if training.layer_decay < 1 else None,
            "ema_decay": training.ema_decay or None,
            "freeze_batch_norm": training.freeze_batch_norm if training.freeze_batch_norm != "none" else None,
            "augmentation": _augmentation(data_arguments),
            "precision": precision(training),
            "seed": training.seed,
            "device": device_name(training),
            "init_from": public_name(model_arguments.model_name_or_path),
        },
        "evaluation": describe_evaluation(trainer, data.validation_name),
        **({"cost": measure_cost(trainer.scored_model, seconds=COST_SECONDS)} if measures else {}),
        "versions": versions(),
    }


def public_name(checkpoint: str | None) -> str | None:
    """Name a checkpoint: a folder by its last part alone, which is no name on the Hub, too."""
    return Path(checkpoint).resolve().name if checkpoint is not None and Path(checkpoint).is_dir() else checkpoint


def _augmentation(data: DataArguments) -> str:
    again = f", again up to {CROP_TRIES} times where one class covers more than {100 * data.max_class_ratio:g} %"
    return (
        f"scaled by {data.scale[0]:g} to {data.scale[1]:g}, cropped{again if data.max_class_ratio < 1 else ''}, "
        "mirrored, brightness, contrast, saturation and hue changed"
    )


def _schedule(training: CtxSegTrainingArguments) -> str:
    name = str(getattr(training.lr_scheduler_type, "value", training.lr_scheduler_type))
    power = (training.lr_scheduler_kwargs or {}).get("power")  # type: ignore[union-attr]
    return name if power is None else f"{name} {power}"


def versions() -> dict[str, str]:
    """Versions of what computed the numbers."""
    names = {"hf_ctxseg": "hf-ctxseg", "torch": "torch", "transformers": "transformers", "timm": "timm"}
    return {key: version(package) for key, package in names.items()} | {"python": platform.python_version()}


def write_report(
    run: Path,
    metrics: dict[str, Any],
    history: Sequence[Mapping[str, Any]],
    classes: ClassInfo,
    scores: Mapping[str, Any],
    config_file: Path | None = None,
    pictures: Samples | None = None,
) -> None:
    """Write metrics, table of classes, figures, samples of the validation pictures and card into a run folder."""
    write_json(run / "metrics.json", metrics)
    plot_curves(history, run / "curves.png")
    if scores:
        counts = metrics["data"]["class_pixels"]
        write_class_table(run / "per_class.csv", classes.names, scores, [counts.get(name) for name in classes.names])
        plot_per_class(classes.names, scores["per_category_iou"], run / "per_class.png")
        write_confusions(run, classes, scores)
    if pictures is not None:
        write_samples(run, pictures)
    write_card(run, config_file=config_file)


def write_confusions(folder: Path, classes: ClassInfo, scores: Mapping[str, Any]) -> None:
    """Write the confusion matrix: `confusion.csv` with the counts, `confusion.png` with their shares."""
    write_confusion_table(folder / "confusion.csv", classes.names, scores["confusion_matrix"])
    plot_confusion(classes.names, scores["confusion_matrix"], folder / "confusion.png")


def farewell(run: Path, metrics: Mapping[str, Any]) -> str:
    """The last lines of a training: the scores, where everything is, and what to type next."""
    training, evaluation = metrics["training"], metrics["evaluation"]
    took = "" if training["seconds"] is None else f" in {duration(training['seconds'])}"
    lines = [f"Trained {training['steps']} steps{took}."]
    if evaluation:
        lines += ["", score_table(evaluation), ""]
    return "\n".join(
        [
            *lines,
            f"The run folder {run} holds the model, its card (README.md), metrics.json, previews and figures.",
            f"Next: ctxseg predict {run} PICTURES --out masks",
            f"      ctxseg push {run} YOUR_NAME/MODEL_NAME",
        ]
    )
