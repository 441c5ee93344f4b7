"""Fine-tuning, from a folder of images and masks to a run folder: what `ctxseg train` and `hf_ctxseg.train` do."""

import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError
from transformers import TrainerState, set_seed

from .arguments import Arguments, CtxSegTrainingArguments, DataArguments, arguments_from_dict
from .augmentation import training_transform
from .checkpoints import checkpoints
from .class_weights import find_class_weights
from .data import CropMaker, DataSplits, EvaluationDataset, TrainingDataset, load_data
from .early_stopping import has_converged
from .freed_memory import keep_freed_memory
from .image_processing_ctxseg import CtxSegImageProcessor
from .label_scan import LabelStatistics, scan_labels, write_contact_sheet
from .model_building import build_model
from .modeling_ctxseg import CtxSegForSemanticSegmentation
from .processes import failing_together
from .report import describe_run, device_name, farewell, precision, write_report
from .run_folder import check_arguments, check_run, prepare_run, save_model, write_arguments
from .run_lock import locked
from .streaming import TrainingStream
from .survival import TrainingStopped, disk_full, is_disk_full
from .trainer import SegmentationTrainer


@dataclass
class TrainingResult:
    """What a training gives.

    Args:
        output_dir: The run folder.
        metrics: What `metrics.json` holds.
        model: The trained model, in evaluation mode.
        processor: Its image processor.
    """

    output_dir: Path
    metrics: dict[str, Any]
    model: CtxSegForSemanticSegmentation
    processor: CtxSegImageProcessor


def train(**arguments: Any) -> TrainingResult:
    """Fine-tune a model on your own pictures; the Python twin of `ctxseg train`.

    Args:
        **arguments: Any argument of `ctxseg train` by its name, for example `data="my_folder"`,
            `head="deeplabv3"`, `backbone="resnet50"`, `output_dir="runs/a"`, `max_steps=600`. `data` may also be a
            loaded `datasets` object.

    Raises:
        ValueError: If an argument, the data or the output folder is not usable; before any training step.
        FileNotFoundError: If a file or folder does not exist.
        ConnectionError: If something is needed from the Hub and it cannot be reached.
    """
    return run_training(arguments_from_dict(arguments), arguments)


def run_training(
    arguments: Arguments, given: dict[str, Any], command: str | None = None, say: Callable[[str], None] = print
) -> TrainingResult:
    """Train as the arguments say and fill the run folder.

    Args:
        arguments: The three argument objects.
        given: The arguments that were given, for `args.yaml`.
        command: The command line, for the card.
        say: Where lines for the user go.

    Raises:
        TrainingStopped: If it cannot go on; the last complete checkpoint is kept.
        TrainingInterrupted: After SIGTERM or Ctrl-C, when a checkpoint is saved.
    """
    training_arguments = arguments[-1]
    run = Path(str(training_arguments.output_dir))
    is_main = training_arguments.process_index == 0
    with ExitStack() as stack:
        with failing_together(training_arguments):
            if is_main:
                check_run(run, resume=training_arguments.resume)
                stack.enter_context(locked(run))
                if checkpoints(run):
                    check_arguments(run, given)
        return _run(arguments, given, command, say if is_main else _silent)


def _run(
    arguments: Arguments, given: dict[str, Any], command: str | None, tell: Callable[[str], None]
) -> TrainingResult:
    model_arguments, data_arguments, training_arguments = arguments
    run = Path(str(training_arguments.output_dir))
    is_main = training_arguments.process_index == 0
    with failing_together(training_arguments):
        data = _load(data_arguments, training_arguments)
        set_seed(training_arguments.seed)
        model, processor, origin = build_model(model_arguments, data_arguments, data.classes, tell)
    with failing_together(training_arguments):
        statistics = _scan(data, data_arguments, tell if is_main else None)
        checkpoint = _prepare(run, arguments, data, given, tell) if is_main else None
        weights = statistics and find_class_weights(training_arguments.class_weights, statistics, data.classes.names)
    checkpoint, weights = broadcast_object_list([checkpoint, weights])
    with failing_together(training_arguments):
        trainer = _make_trainer(model, processor, data, data_arguments, training_arguments, weights)
    tell(_plan(trainer, model, data, checkpoint))
    if data_arguments.dry_run:
        tell(f"Dry run: nothing was trained. Look at {run / 'contact_sheet.png'}.")
        return TrainingResult(run, {}, model.eval(), processor)
    if training_arguments.device.type == "cpu":
        keep_freed_memory()
    started = time.monotonic()
    train_loss = _train(trainer, checkpoint)
    seconds = time.monotonic() - started
    is_scored = trainer.scored_step == trainer.state.global_step and not training_arguments.load_best_model_at_end
    if data.validation is not None and not is_scored:
        with trainer.explained_evaluation():
            trainer.evaluate()
    metrics = describe_run(
        trainer, arguments, data, statistics, origin, train_loss, seconds, command, bool(checkpoint)
    )
    if trainer.is_world_process_zero():
        report = partial(
            write_report,
            run,
            metrics,
            trainer.state.log_history,
            data.classes,
            trainer.scores.last,
            pictures=data.validation if training_arguments.preview_images > 0 else None,
        )
        _save(run, trainer, processor, report)
        tell(farewell(run, metrics))
    return TrainingResult(run, metrics, model.eval(), processor)


def _train(trainer: SegmentationTrainer, checkpoint: Path | None) -> float:
    """Train to the end; give the mean loss of this session."""
    if checkpoint is not None:
        state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
        is_last = state.global_step >= (trainer.args.max_steps if trainer.args.max_steps > 0 else state.max_steps)
        if is_last or has_converged(state.log_history, trainer.args.early_stopping_patience):
            # Interrupted after its last step: Trainer would make one more.
            best = state.best_model_checkpoint if trainer.args.load_best_model_at_end else None
            trainer.load_trained(checkpoint.parent / Path(best).name if best else checkpoint)
            trainer.state = state
            return 0.0
    return trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None).training_loss


def _save(
    run: Path, trainer: SegmentationTrainer, processor: CtxSegImageProcessor, report: Callable[[Path], None]
) -> None:
    try:
        save_model(run, trainer.accelerator.unwrap_model(trainer.model), processor, report)
    except (OSError, SafetensorError) as error:
        if not is_disk_full(error):
            raise
        needed = trainer.model.num_parameters() * 4
        raise TrainingStopped(
            f"The trained model was not saved. {disk_full(run, needed)} Then the same command with --resume finishes."
        ) from error


def _silent(line: str) -> None:
    """Say nothing: only the main process speaks."""


def _load(arguments: DataArguments, training: CtxSegTrainingArguments) -> DataSplits:
    data = load_data(
        arguments.data,
        recipe=arguments.recipe,
        labels=arguments.labels,
        ignore_index=arguments.ignore_index,
        train_split=arguments.train_split,
        eval_split=arguments.eval_split,
        image_column=arguments.image_column,
        label_column=arguments.label_column,
        eval_fraction=arguments.eval_fraction,
        streaming=arguments.streaming,
        seed=training.seed,
    )
    if data.is_streamed and training.max_steps <= 0:
        raise ValueError("A stream has no number of pictures, so there are no epochs to count: give --max_steps.")
    if data.validation is None:
        training.eval_strategy = "no"
    return data


def _scan(data: DataSplits, arguments: DataArguments, tell: Callable[[str], None] | None) -> LabelStatistics | None:
    """Scan both splits before anything is trained; in the main process alone."""
    if tell is None or data.train is None:
        return None
    statistics = scan_labels(data.seen, data.classes, split="train", num_workers=arguments.scan_workers)
    if data.validation is not None:
        scan_labels(data.validation, data.classes, split="validation", num_workers=arguments.scan_workers)
    if data.is_streamed:
        tell(f"Of the stream, the first {len(data.seen)} samples were looked at:")
    tell(statistics.table(data.classes.names))
    return statistics


def _prepare(
    run: Path, arguments: Arguments, data: DataSplits, given: dict[str, Any], tell: Callable[[str], None]
) -> Path | None:
    _, data_arguments, training = arguments
    checkpoint = prepare_run(run, resume=training.resume, tell=tell)
    written = {name: value for name, value in given.items() if name not in ("resume", "dry_run")}
    if not isinstance(written["data"], (str, Path)):
        written["data"] = data.source
    write_contact_sheet(data.seen, data.classes, run / "contact_sheet.png")
    if not data_arguments.dry_run:
        write_arguments(run, written)
    return checkpoint


def _longest_edge(processor: CtxSegImageProcessor) -> int | None:
    """The edge that pictures are scaled to before augmentation, so that training sees the scale of use."""
    if not processor.do_resize:
        return None
    size: Any = processor.size
    if not size["max_height"] or size["max_height"] != size["max_width"]:
        raise ValueError(
            f"The checkpoint's image processor resizes to {dict(size)}, which training does not do: "
            "give --image_size, the longest edge in pixels."
        )
    return int(size["max_height"])


def _make_trainer(
    model: CtxSegForSemanticSegmentation,
    processor: CtxSegImageProcessor,
    data: DataSplits,
    arguments: DataArguments,
    training: CtxSegTrainingArguments,
    class_weights: tuple[float, ...] | None,
) -> SegmentationTrainer:
    height, width = arguments.crop_size[0], arguments.crop_size[-1]
    fill = [round(255 * mean) for mean in processor.image_mean]
    transform = training_transform(
        (height, width),
        scale=(arguments.scale[0], arguments.scale[1]),
        max_class_ratio=arguments.max_class_ratio,
        ignore_index=data.classes.ignore_index,
        image_fill=(fill[0], fill[1], fill[2]),
    )
    return SegmentationTrainer(
        model,
        training,
        data.classes,
        processor,
        train_dataset=_training_data(data, arguments, training, transform, processor),
        eval_dataset=EvaluationDataset(data.validation, processor) if data.validation is not None else None,
        class_weights=class_weights,
    )


def _training_data(
    data: DataSplits, arguments: DataArguments, training: CtxSegTrainingArguments, transform: Any, processor: Any
) -> TrainingDataset | TrainingStream:
    edge, seed = _longest_edge(processor), training.seed
    if not data.is_streamed:
        cache_bytes = round(arguments.cache_gib * 2**30)
        return TrainingDataset(data.train, transform, processor, seed, edge, cache_bytes)
    return TrainingStream(
        data.train,
        data.classes,
        CropMaker(transform, processor, edge),
        seed=seed,
        buffer=arguments.shuffle_buffer,
        batch_size=training.train_batch_size,
        rank=training.process_index,
        world_size=training.world_size,
    )


def _plan(
    trainer: SegmentationTrainer, model: CtxSegForSemanticSegmentation, data: DataSplits, checkpoint: Path | None
) -> str:
    arguments = trainer.args
    scored = len(data.validation) if data.validation is not None else 0
    number = "streamed" if data.is_streamed else len(data.train)
    cache = getattr(trainer.train_dataset, "cache", None)
    held = f", {len(cache)} of them decoded in {cache.allocated / 2**30:.2f} GiB" if cache is not None else ""
    steps = f"{arguments.max_steps} steps" if arguments.max_steps > 0 else f"{arguments.num_train_epochs:g} epochs"
    return (
        f"{type(model).__name__} on {model.config.backbone}, output stride {model.config.output_stride}, "
        f"{model.num_parameters() / 1e6:.2f} M parameters, {data.classes.num_labels} classes\n"
        f"{number} pictures to train on{held}, {scored} to score; {steps} of "
        f"{arguments.train_batch_size * arguments.world_size} crops on {device_name(arguments)}, "
        f"{precision(arguments)}" + (f"\nContinuing from {checkpoint.name}" if checkpoint else "")
    )
