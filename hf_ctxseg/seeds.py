"""The spread of scores over trainings that differ in their seed alone."""

from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from .card_sections import MEASURES
from .publishable import read_json

# What runs may differ in and be the same training; all else is compared.
_FREE = {
    "training": {"seed", "command", "seconds", "train_loss", "images_per_second", "data_wait_share", "device"},
    "data": {"license", "credit"},
    "model": {"backbone_license"},
}
_SCORED = ("split", "protocol", "num_images")


def spread(run: Path, others: Sequence[Path]) -> dict[str, Any]:
    """Give mean, standard deviation and range of each score.

    Args:
        run: A run folder.
        others: Run folders of the same training with other seeds.

    Returns:
        The part `seeds` of `metrics.json`: `seeds` in the order of the folders, and `scores` with the `mean`, the
        sample's standard `deviation`, `lowest` and `highest` of each, 0..1.

    Raises:
        FileNotFoundError: If a folder has no metrics.
        ValueError: If a run was not scored, differs in more than the seed, or two have the same seed.
    """
    folders = [run, *others]
    found = [read_json(folder / "metrics.json") for folder in folders]
    for folder, metrics in zip(folders, found, strict=True):
        if (metrics.get("evaluation") or {}).get("mean_iou") is None:
            raise ValueError(f"{folder} was not scored: its metrics.json has no mean_iou.")
        for part in ("model", "data", "training", "evaluation"):
            ours, theirs = (m.get(part) or {} for m in (found[0], metrics))
            names = _SCORED if part == "evaluation" else sorted({*ours, *theirs} - _FREE[part])
            for name in names:
                first, other = ours.get(name), theirs.get(name)
                if first != other:
                    raise ValueError(
                        f"{folder} differs from {run} in more than the seed: {part}.{name} is {other!r} and not "
                        f"{first!r}."
                    )
    seeds = [metrics["training"].get("seed") for metrics in found]
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"The seeds are {seeds}, but each run must have one of its own.")
    told = [name for name in MEASURES if all(m["evaluation"].get(name) is not None for m in found)]
    scores = {name: _summary([m["evaluation"][name] for m in found]) for name in told}
    return {"seeds": seeds, "scores": scores}


def _summary(values: Sequence[float]) -> dict[str, float]:
    return {"mean": mean(values), "deviation": stdev(values), "lowest": min(values), "highest": max(values)}
