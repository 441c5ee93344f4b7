"""Score a trained model on labelled pictures: what `ctxseg eval` does, with the evaluation that training uses."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from .arguments import CtxSegTrainingArguments
from .console import ConsoleCallback
from .data import DataSplits, EvaluationDataset, load_data
from .inference import Predictor
from .label_scan import scan_labels
from .report import describe_evaluation, describe_model, versions, write_confusions
from .run_folder import write_json
from .samples import ClassInfo
from .sliding import Blend
from .trainer import SegmentationTrainer

DEFAULT_IGNORE_INDEX = 255


def evaluate(
    model: str | Path,
    data: Any,
    *,
    recipe: str | Path | None = None,
    split: str | None = None,
    labels: str | None = None,
    ignore_index: int | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    output_dir: str | Path | None = None,
    batch_size: int = 1,
    output_stride: int | None = None,
    window: int | None = None,
    overlap: float = 0.5,
    blend: Blend = "gaussian",
    scales: Sequence[float] = (1.0,),
    flip: bool = False,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Score a model on a split of a data set, at the labels' original size.

    Args:
        model: A run folder, or the name of a model on the Hub.
        data: Folder, parquet, Hub name or loaded `datasets` object, as for training.
        recipe: Name of a known data set or a recipe file, as for training.
        split: The split that is scored; by default the data's validation split.
        labels: Class names, where the data has none; by default the model's, which they must be.
        ignore_index: Label value without a class; by default the data's own, or the model's where that is 255.
        image_column: Column of the pictures in a table.
        label_column: Column of the label maps in a table.
        output_dir: Where metrics, confusion matrix and a preview grid are written; by default `<model>/eval-<split>`
            for a run folder, `<name>-eval-<split>` for a model of the Hub.
        batch_size: Pictures per step and device.
        output_stride: Input pixels per step of the deepest map; None: the model's own.
        window: Edge of sliding windows in pixels; None looks at whole pictures.
        overlap: Share of a window that the next one covers too.
        blend: Weights of overlapping windows: gaussian or constant.
        scales: Factors of the pictures' size; the probabilities of several are averaged.
        flip: Whether pictures are looked at mirrored left to right, too.
        say: Where lines for the user go.

    Returns:
        What `metrics.json` holds: the model, the scores with their protocol, the versions.

    Raises:
        ValueError: If model, data or classes do not fit, or an option is out of range.
    """
    predictor = Predictor(  # on the CPU: the trainer moves it to its own device
        model, device="cpu", window=window, overlap=overlap, blend=blend, scales=scales, flip=flip
    )
    loaded = load_data(
        data,
        recipe=recipe,
        labels=labels,
        ignore_index=ignore_index,
        train_split=None,
        eval_split=split,
        image_column=image_column,
        label_column=label_column,
        default_labels=predictor.names,
    )
    classes, split_name = _model_classes(predictor, loaded.classes, ignore_index), loaded.validation_name
    scan_labels(loaded.validation, classes, split=split_name)
    folder = Path(output_dir) if output_dir is not None else _default_folder(model, split_name)
    trainer = _trainer(predictor, loaded, classes, folder, batch_size, output_stride)
    trainer.evaluate()
    metrics = {
        "model": describe_model(predictor.model, None),
        "data": {"source": loaded.source},
        "evaluation": describe_evaluation(trainer, split_name),
        "versions": versions(),
    }
    if trainer.is_world_process_zero():
        write_json(folder / "metrics.json", metrics)
        write_confusions(folder, classes, trainer.scores.last)
        say(f"Metrics, confusion matrix and a preview grid are in {folder}.")
    return metrics


def _trainer(
    predictor: Predictor,
    data: DataSplits,
    classes: ClassInfo,
    folder: Path,
    batch_size: int,
    output_stride: int | None,
) -> SegmentationTrainer:
    folder.mkdir(parents=True, exist_ok=True)
    arguments = CtxSegTrainingArguments(
        output_dir=str(folder),
        per_device_eval_batch_size=batch_size,
        eval_output_stride=output_stride,
        dataloader_num_workers=0,
        eval_strategy="no",
    )
    trainer = SegmentationTrainer(
        predictor.model.float(),
        arguments,
        classes,
        predictor.processor,
        eval_dataset=EvaluationDataset(data.validation, predictor.processor),
        views=predictor.views,
    )
    trainer.remove_callback(ConsoleCallback)
    return trainer


def _model_classes(predictor: Predictor, classes: ClassInfo, ignore_index: int | None) -> ClassInfo:
    # the data's classes in the model's colours, with the ignored value that was asked for
    if tuple(classes.names) != predictor.names:
        raise ValueError(
            f"The model knows the classes {', '.join(predictor.names)}, but the data has {', '.join(classes.names)}: "
            "score it on data of its own classes, or name them with --labels."
        )
    void = classes.ignore_index
    if ignore_index is None and void == DEFAULT_IGNORE_INDEX:
        void = predictor.model.config.semantic_loss_ignore_index
    return replace(classes, palette=predictor.palette, ignore_index=void)


def _default_folder(model: str | Path, split: str) -> Path:
    name = f"eval-{split.replace(' ', '_')}"
    # A folder called org/name would stand in the way of the Hub's model from then on.
    return Path(model) / name if Path(model).is_dir() else Path(f"{Path(model).name}-{name}")
