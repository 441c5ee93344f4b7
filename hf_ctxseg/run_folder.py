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
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel

from .image_processing_ctxseg import CtxSegImageProcessor

_CHECKPOINT_FILES = ("model.safetensors", "optimizer.pt", "scheduler.pt", "trainer_state.json")
_PARTIAL = "model.partial"
# What may differ when a run is continued: where things are, what is printed and kept, how long it goes on.
_FREE_AT_RESUME = {
    "data", "dataloader_num_workers", "disable_tqdm", "dry_run", "eval_steps", "eval_strategy", "logging_steps",
    "max_steps", "num_train_epochs", "output_dir", "per_device_eval_batch_size", "preview_images", "report_to",
    "resume", "save_steps", "save_strategy", "save_total_limit", "scan_workers",
}  # fmt: skip


def check_run(run: Path, *, resume: bool) -> None:
    """Raise `ValueError` if the folder holds a run and `resume` is false, or a finished one, or is no folder."""
    if run.exists() and not run.is_dir():
        raise ValueError(f"output_dir {run} is a file, but must be a folder: choose another name.")
    if resume and is_finished(run):
        raise ValueError(f"output_dir {run} holds a finished run: use it, or train into another folder.")
    held = [name for name in ("config.json", "args.yaml") if (run / name).exists()]
    checkpoints = sorted(run.glob("checkpoint-*"), key=_step)
    if not resume and (held or checkpoints):
        raise ValueError(
            f"output_dir {run} already holds a run ({', '.join(held or [path.name for path in checkpoints[-1:]])}): "
            f"{'' if is_finished(run) else 'continue it with --resume, or '}choose another folder."
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


def prepare_run(run: Path, *, resume: bool) -> Path | None:
    """Make the run folder ready; give the newest complete checkpoint to continue from, or None to start.

    Raises:
        ValueError: If `check_run` does, or the folder cannot be written.
    """
    check_run(run, resume=resume)
    try:
        run.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(run / _PARTIAL, ignore_errors=True)
        (run / "config.json").unlink(missing_ok=True)
    except OSError as error:
        raise ValueError(f"output_dir {run} cannot be written ({error.strerror}): choose another folder.") from error
    if not os.access(run, os.W_OK):
        raise ValueError(f"output_dir {run} cannot be written (no permission): choose another folder.")
    return newest_checkpoint(run)


def newest_checkpoint(run: Path) -> Path | None:
    """The newest checkpoint of a run that was written to its end, or None."""
    complete = [path for path in sorted(run.glob("checkpoint-*"), key=_step) if _is_complete(path)]
    return complete[-1] if complete else None


def is_finished(run: Path) -> bool:
    """Whether a run folder holds a finished model."""
    return (run / "config.json").is_file() and (run / "model.safetensors").is_file()


def _step(checkpoint: Path) -> int:
    number = checkpoint.name.rpartition("-")[2]
    return int(number) if number.isdigit() else -1


def _is_complete(checkpoint: Path) -> bool:
    # Trainer writes trainer_state.json last, and a file may still be cut short.
    if not all((checkpoint / name).is_file() for name in _CHECKPOINT_FILES):
        return False
    try:
        json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
        with safe_open(checkpoint / "model.safetensors", "pt"):
            return True
    except (ValueError, OSError, SafetensorError):
        return False


def save_model(
    run: Path,
    model: PreTrainedModel,
    processor: CtxSegImageProcessor,
    report: Callable[[Path], None] | None = None,
) -> None:
    """Put weights and processor into the run folder, then what `report` writes, `config.json` last.

    Args:
        run: The run folder.
        model: The trained model.
        processor: Its image processor.
        report: Writes the rest of the folder; it is given the config's file, which is not in its place yet.
    """
    partial = run / _PARTIAL
    model.save_pretrained(partial)
    processor.save_pretrained(partial)
    for path in sorted(partial.iterdir()):
        if path.name != "config.json":
            os.replace(path, run / path.name)
    if report is not None:
        report(partial / "config.json")
    os.replace(partial / "config.json", run / "config.json")
    partial.rmdir()


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write JSON; NaN, which JSON lacks, becomes null."""
    path.write_text(json.dumps(without_nan(content), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


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


def without_nan(value: Any) -> Any:
    """Put None in the place of NaN and infinities, which JSON lacks."""
    if isinstance(value, Mapping):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
