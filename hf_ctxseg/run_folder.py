"""The run folder: a loadable model with processor, card, arguments, scores and figures.

`config.json` is what every loader asks for first. It is removed when training starts and put back last, so that a
folder which looks complete is complete.
"""

import csv
import json
import math
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Any

import yaml
from transformers import PreTrainedModel

from .checkpoints import PARTIAL, checkpoints, newest_checkpoint, remove_orphans, sync_folder, write_manifest
from .image_processing_ctxseg import CtxSegImageProcessor

_PARTIAL = f"model{PARTIAL}"
# What a run writes, the sheet of a dry run excepted: a folder that has one of these holds another's work.
_WRITTEN = (
    "config.json", "args.yaml", "model.safetensors", "preprocessor_config.json", "README.md", "metrics.json",
    "per_class.csv", "previews",
)  # fmt: skip
# What may differ when a run is continued: where things are, what is printed and kept, how long it goes on.
_FREE_AT_RESUME = {
    "cache_gib", "data", "dataloader_num_workers", "disable_tqdm", "dry_run", "eval_steps", "eval_strategy",
    "logging_steps", "max_nan_steps", "max_steps", "measure_cost", "num_train_epochs", "output_dir",
    "per_device_eval_batch_size", "preview_images", "report_to", "resume", "save_steps", "save_strategy",
    "save_total_limit", "scan_workers",
}  # fmt: skip


def check_run(run: Path, *, resume: bool) -> None:
    """Raise `ValueError` if the folder holds a run that is not to be resumed, a finished one or another's files."""
    if run.exists() and not run.is_dir():
        raise ValueError(f"output_dir {run} is a file, but must be a folder: choose another name.")
    if resume and is_finished(run):
        raise ValueError(f"output_dir {run} holds a finished run: use it, or train into another folder.")
    held = [name for name in _WRITTEN if (run / name).exists()]
    held += [folder.name for folder in checkpoints(run)[-1:]]
    is_open = not is_finished(run) and ("args.yaml" in held or bool(checkpoints(run)))
    if held and not (resume and is_open):
        raise ValueError(
            f"output_dir {run} already holds a run ({held[0]}): "
            f"{'continue it with --resume, or ' if is_open else ''}choose another folder."
        )


def check_arguments(run: Path, given: Mapping[str, Any]) -> None:
    """Raise `ValueError` if a run is to be continued with other arguments than it was started with."""
    try:
        saved = yaml.safe_load((run / "args.yaml").read_text(encoding="utf-8")) or {}
    except (OSError, yaml.YAMLError):
        return
    now = yaml.safe_load(yaml.safe_dump({name: _plain(value) for name, value in given.items()}))
    for name in sorted((set(saved) | set(now)) - _FREE_AT_RESUME):
        if saved.get(name) != now.get(name):
            raise ValueError(
                f"The run in {run} was started with {name}={saved.get(name)!r}, but is to be continued with "
                f"{name}={now.get(name)!r} (None: not given): repeat its own arguments (they are in {run}/args.yaml), "
                "or train into another folder."
            )


def prepare_run(run: Path, *, resume: bool, tell: Callable[[str], None] | None = None) -> Path | None:
    """Make the run folder ready; give the newest complete checkpoint to continue from, or None to start.

    Args:
        run: The run folder, which no other process may be using.
        resume: Whether a run in it is continued.
        tell: Is told of each checkpoint that is passed over, and why.

    Raises:
        ValueError: If `check_run` does, or the folder cannot be written.
    """
    check_run(run, resume=resume)
    try:
        run.mkdir(parents=True, exist_ok=True)
        remove_orphans(run)
        (run / "config.json").unlink(missing_ok=True)
    except OSError as error:
        raise ValueError(f"output_dir {run} cannot be written ({error.strerror}): choose another folder.") from error
    if not os.access(run, os.W_OK):
        raise ValueError(f"output_dir {run} cannot be written (no permission): choose another folder.")
    return newest_checkpoint(run, tell)


def is_finished(run: Path) -> bool:
    """Whether a run folder holds a finished model."""
    return (run / "config.json").is_file() and (run / "model.safetensors").is_file()


def save_model(
    run: Path,
    model: PreTrainedModel,
    processor: CtxSegImageProcessor,
    report: Callable[[Path], None] | None = None,
) -> None:
    """Put weights and processor into the run folder with a manifest, then what `report` writes, `config.json` last.

    Args:
        run: The run folder.
        model: The trained model.
        processor: Its image processor.
        report: Writes the rest of the folder; it is given the config's file, which is not in its place yet.
    """
    partial = run / _PARTIAL
    try:
        model.save_pretrained(partial)
        processor.save_pretrained(partial)
        write_manifest(partial)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    for path in sorted(partial.iterdir()):
        if path.name != "config.json":
            os.replace(path, run / path.name)
    if report is not None:
        report(partial / "config.json")
    os.replace(partial / "config.json", run / "config.json")
    sync_folder(run)
    partial.rmdir()


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write JSON, at once or not at all; NaN, which JSON lacks, becomes null."""
    partial = path.with_name(path.name + PARTIAL)
    partial.write_text(json.dumps(without_nan(content), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(partial, path)


def write_arguments(run: Path, given: Mapping[str, Any]) -> None:
    """Write `args.yaml`, from which `ctxseg train --config` repeats the run."""
    plain = {name: _plain(value) for name, value in given.items()}
    text = yaml.safe_dump(plain, allow_unicode=True, sort_keys=True, default_flow_style=None)
    (run / "args.yaml").write_text(text, encoding="utf-8")


def _plain(value: Any) -> Any:
    value = value.value if isinstance(value, Enum) else value
    return str(value) if isinstance(value, Path) else value


def write_class_table(path: Path, names: Sequence[str], scores: Mapping[str, Any], pixels: Sequence[int]) -> None:
    """Write IoU and accuracy of each class with its training pixels as CSV; absent classes have empty cells."""
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(["class", "iou", "accuracy", "training_pixels"])
        columns = (names, scores["per_category_iou"], scores["per_category_accuracy"], pixels)
        for name, iou, accuracy, count in zip(*columns, strict=True):
            writer.writerow([name, *("" if math.isnan(value) else f"{value:.6f}" for value in (iou, accuracy)), count])


def write_confusion_table(path: Path, names: Sequence[str], matrix: Any) -> None:
    """Write a confusion matrix (K, K) as CSV: pixels, a row for each reference class, a column for each prediction."""
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(["reference \\ prediction", *names])
        writer.writerows([name, *map(int, row)] for name, row in zip(names, matrix, strict=True))


def without_nan(value: Any) -> Any:
    """Put None in the place of NaN and infinities, which JSON lacks."""
    if isinstance(value, Mapping):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
