"""What `ctxseg doctor` finds out about a folder: is what was saved still whole, and does it belong together?"""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoImageProcessor, AutoModelForSemanticSegmentation

from .checkpoints import MANIFEST, PARTIAL, checkpoints, find_damage
from .publishable import weight_files
from .registry import head_name
from .wording import listed

Verdict = Literal["ok", "note", "fail"]


class Finding(NamedTuple):
    """One line of the doctor's: whether it is well, what was looked at, and what was found."""

    verdict: Verdict
    subject: str
    text: str


def examine(folder: str | Path) -> list[Finding]:
    """Verify a run folder, a checkpoint or a saved model, without changing anything.

    Files against their manifests, the config by building its model (without memory), the weights against this model,
    tensor by tensor, the image processor against the config, `metrics.json` against both, and every checkpoint.

    Raises:
        FileNotFoundError: If there is no such folder.
        ValueError: If the folder holds neither a model nor a run.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder {folder}: name a run folder or a saved model.")
    has_model, saved = (folder / "config.json").is_file(), checkpoints(folder)
    if not has_model and not saved and not (folder / "args.yaml").is_file():
        raise ValueError(f"{folder} holds neither a config.json nor checkpoints: name a run folder or a saved model.")
    found: list[Finding] = []
    if has_model:
        found += _examine_model(folder)
    else:
        found.append(Finding("note", "model", "none yet: the run has not ended, or did not end well"))
    whole = 0
    for checkpoint in saved:
        damage = find_damage(checkpoint)
        whole += not damage
        found.append(_finding(checkpoint.name, damage, "complete"))
    if not has_model:
        hint = "--resume continues" if whole else "no complete checkpoint: --resume starts anew"
        found.append(Finding("note" if whole or not saved else "fail", "resume", hint))
    if left := sorted(path.name for path in folder.glob(f"*{PARTIAL}")):
        found.append(Finding("note", ", ".join(left), "left by a killed process; --resume removes it"))
    return found


def diagnose(found: Sequence[Finding], say: Callable[[str], None] = print) -> int:
    """Print what was found, a line each; give 0 if all is well and 1 if not."""
    width = max(len(item.subject) for item in found)
    for item in found:
        say(f"{item.verdict:<4}  {item.subject:<{width}}  {item.text}")
    return int(any(item.verdict == "fail" for item in found))


def _finding(subject: str, complaints: list[str], praise: str) -> Finding:
    return Finding("fail", subject, "; ".join(complaints)) if complaints else Finding("ok", subject, praise)


def _examine_model(folder: Path) -> Iterator[Finding]:
    if (folder / MANIFEST).is_file():
        yield _finding(MANIFEST, find_damage(folder), "every listed file is as it was saved")
    else:
        yield Finding("note", MANIFEST, "missing: a change of the files would not be noticed")
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        with torch.device("meta"):
            model = AutoModelForSemanticSegmentation.from_config(config)
    except (ValueError, OSError, KeyError, TypeError) as error:
        yield Finding("fail", "config.json", _short(error))
        return
    yield Finding(
        "ok",
        "config.json",
        f"{type(model).__name__} on {getattr(config, 'backbone', '?')}, {config.num_labels} classes",
    )
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    yield _finding("weights", _check_weights(folder, shapes), f"{len(shapes)} tensors, all finite")
    yield _finding("processor", _check_processor(folder, config), "agrees with the config")
    if (folder / "metrics.json").is_file():
        yield _finding("metrics.json", _check_metrics(folder / "metrics.json", model), "agrees with the model")
    else:
        yield Finding("note", "metrics.json", "missing: nothing says how good the model is")


def _check_weights(folder: Path, shapes: dict[str, tuple[int, ...]]) -> list[str]:
    """Compare names and shapes with the model's, and look for values that are not finite."""
    left, complaints = dict(shapes), []
    surplus, reshaped, broken = [], [], []
    try:
        for name in weight_files(folder):
            if not name.endswith(".safetensors"):
                continue
            with safe_open(folder / name, framework="pt") as tensors:
                for key in tensors.keys():
                    tensor = tensors.get_tensor(key)
                    expected = left.pop(key, None)
                    if expected is None:
                        surplus.append(key)
                    elif expected != tuple(tensor.shape):
                        reshaped.append(f"{key} {tuple(tensor.shape)} instead of {expected}")
                    if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
                        broken.append(key)
    except (SafetensorError, OSError, ValueError) as error:
        return [_short(error)]
    for what, names in (
        ("missing", [*left]),
        ("not the model's", surplus),
        ("of another shape", reshaped),
        ("NaN or infinite", broken),
    ):
        if names:
            complaints.append(f"{what}: {listed(names, 3)}")
    return complaints


def _check_processor(folder: Path, config: Any) -> list[str]:
    try:
        processor = AutoImageProcessor.from_pretrained(folder, trust_remote_code=False)
    except (ValueError, OSError, KeyError, TypeError) as error:
        return [_short(error)]
    complaints = []
    for name in ("image_mean", "image_std"):
        if len(getattr(processor, name)) != config.num_channels:
            complaints.append(f"{name} has {len(getattr(processor, name))} values for {config.num_channels} channels")
    if not all(value > 0 for value in processor.image_std):
        complaints.append(f"image_std is {list(processor.image_std)}, but must be above 0")
    if getattr(processor, "align_corners", config.align_corners) != config.align_corners:
        complaints.append(f"align_corners is {processor.align_corners}, but {config.align_corners} in the config")
    return complaints


def _check_metrics(path: Path, model: Any) -> list[str]:
    """Compare what `metrics.json` says with the model, and its mean with its classes."""
    try:
        metrics = json.loads(path.read_text(encoding="utf-8"))
        described, scores = metrics["model"], metrics.get("evaluation") or {}
        told = {name: described.get(name) for name in ("class", "head", "backbone", "output_stride", "parameters")}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return [f"cannot be read ({_short(error)})"]
    config = model.config
    facts = {
        "class": type(model).__name__,
        "head": head_name(type(config)),
        "backbone": config.backbone,
        "output_stride": config.output_stride,
        "parameters": model.num_parameters(),
    }
    complaints = [
        f"{name} is {told[name]!r}, but {facts[name]!r} in the model" for name in facts if told[name] != facts[name]
    ]
    ious = scores.get("per_category_iou")
    if ious is not None:
        names = [config.id2label[index] for index in range(config.num_labels)]
        if list(ious) != names:
            complaints.append("the classes scored are not the model's")
        present = [value for value in ious.values() if value is not None]
        mean = scores.get("mean_iou")
        if present and (mean is None or not math.isclose(mean, sum(present) / len(present), abs_tol=1e-6)):
            complaints.append(f"mean_iou is {mean}, but its classes' mean is {sum(present) / len(present):.6f}")
    return complaints


def _short(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
