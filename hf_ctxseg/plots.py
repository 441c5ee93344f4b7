"""Training curves, per-class bars and confusion matrices as PNG files.

matplotlib is used through its figure objects, never through its global state, so that plots work in threads and
without a display; it is imported when a plot is made, since that takes longer than everything else here.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .sheet import shorten


def plot_curves(history: Sequence[Mapping[str, Any]], path: str | Path) -> None:
    """Draw loss, mean IoU and learning rates over the steps of a training, as far as they were logged.

    Args:
        history: The log history of transformers' Trainer: mappings with "step" and any of "loss", "eval_loss",
            "eval_mean_iou" and keys that begin with "learning_rate".
        path: PNG file to write.
    """
    from matplotlib.figure import Figure

    rates = sorted({key for entry in history for key in entry if key.startswith("learning_rate")})
    wanted = [("loss", ["loss", "eval_loss"]), ("mean IoU", ["eval_mean_iou"]), ("learning rate", rates)]
    names = {"loss": "training", "eval_loss": "evaluation", "eval_mean_iou": "evaluation", "learning_rate": "main"}
    panels = [(label, [key for key in keys if any(key in e for e in history)]) for label, keys in wanted]
    panels = [(label, keys) for label, keys in panels if keys] or [("nothing logged yet", [])]
    last = max((entry.get("step", 0) for entry in history), default=0) or 1
    figure = Figure(figsize=(8, 0.6 + 2.4 * len(panels)), dpi=110, layout="constrained")
    for place, (label, keys) in enumerate(panels, start=1):
        axes = figure.add_subplot(len(panels), 1, place)
        for key in keys:
            points = [(entry["step"], entry[key]) for entry in history if key in entry and "step" in entry]
            steps, values = [step for step, _ in points], [value for _, value in points]
            name = names.get(key, key.removeprefix("learning_rate_"))
            axes.plot(steps, values, marker="o" if len(points) <= 30 else "", markersize=4, label=name)
        axes.set(ylabel=label, xlim=(0, 1.02 * last))
        axes.grid(alpha=0.3)
        if len(keys) > 1:
            axes.legend()
        if place == len(panels):
            axes.set_xlabel("step")
    figure.savefig(path, format="png")


def plot_per_class(names: Sequence[str], ious: Sequence[float], path: str | Path) -> None:
    """Draw the IoU of each class as horizontal bars, best first.

    Args:
        names: One name per class.
        ious: IoU of each class, 0..1; NaN for a class that is absent from truth and prediction.
        path: PNG file to write.

    Raises:
        ValueError: Names and values differ in number.
    """
    from matplotlib.figure import Figure

    if len(names) != len(ious):
        raise ValueError(f"There are {len(names)} class names, but {len(ious)} values; give one value per name.")
    order = sorted(range(len(names)), key=lambda label: (math.isnan(ious[label]), -ious[label]))
    present = [value for value in ious if not math.isnan(value)]
    figure = Figure(figsize=(8, 1.1 + 0.26 * len(names)), dpi=110, layout="constrained")
    axes = figure.add_subplot()
    lengths = [0.0 if math.isnan(ious[label]) else ious[label] for label in order]
    axes.barh(range(len(order)), lengths, color="#0072b2", height=0.7)
    for place, label in enumerate(order):
        text = "absent" if math.isnan(ious[label]) else f"{100 * ious[label]:.1f} %"
        axes.text(lengths[place] + 0.01, place, text, va="center", color="grey" if text == "absent" else "black")
    axes.set_yticks(range(len(order)), [shorten(names[label]) for label in order], parse_math=False)
    axes.set(xlim=(0, 1.12), ylim=(len(order) - 0.4, -0.6), xlabel="IoU")
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0 %", "25 %", "50 %", "75 %", "100 %"])
    mean = f"mean {100 * sum(present) / len(present):.1f} %" if present else "all classes absent"
    axes.set_title(f"IoU per class, {mean}")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, format="png")


def plot_confusion(names: Sequence[str], matrix: NDArray[Any], path: str | Path) -> None:
    """Draw a confusion matrix, each row as shares of its reference class; up to 25 classes with the numbers.

    Args:
        names: One name per class.
        matrix: Counts (K, K), rows reference, columns prediction.
        path: PNG file to write.

    Raises:
        ValueError: Names and matrix differ in size.
    """
    from matplotlib.figure import Figure

    count = len(names)
    if matrix.shape != (count, count):
        raise ValueError(f"There are {count} class names, but a matrix of {matrix.shape}; give one name per class.")
    shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    edge = 3.2 + min(0.42 * count, 20)
    figure = Figure(figsize=(edge, edge), dpi=110, layout="constrained")
    axes = figure.add_subplot()
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    labels = [shorten(name) for name in names]
    size = "medium" if count <= 50 else "x-small"
    axes.set_xticks(range(count), labels, rotation=90, parse_math=False, fontsize=size)
    axes.set_yticks(range(count), labels, parse_math=False, fontsize=size)
    axes.set(xlabel="prediction", ylabel="reference", title="% of each reference class")
    for row, column in zip(*np.nonzero(shares >= 0.005), strict=True) if count <= 25 else ():
        colour = "white" if shares[row, column] > 0.5 else "black"
        text = f"{100 * shares[row, column]:.0f}"
        axes.text(column, row, text, ha="center", va="center", color=colour, fontsize="x-small")
    figure.savefig(path, format="png")
