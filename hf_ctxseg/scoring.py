"""Scores of whole pictures while they stream by: what is counted for each, added up, and told.

Only counts are kept and gathered, so memory does not grow with the pictures, and several processes give exactly the
numbers of one.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from .boundary_metrics import boundary_counts, boundary_scores, empty_boundary_counts
from .metrics import MeanIoU, confusion_matrix
from .samples import ClassInfo
from .views import segment_with_loss

# What is told of a set of pictures beside the lists by class.
MEASURES = ("mean_iou", "frequency_weighted_iou", "boundary_iou", "mean_accuracy", "overall_accuracy", "loss")
PER_CLASS = ("per_category_iou", "per_category_accuracy", "per_category_boundary_iou")
CONFUSIONS = 10


def count_picture(
    maps: Sequence[torch.Tensor], label: torch.Tensor, num_labels: int, ignore_index: int, align_corners: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Count a picture at its label's size.

    Args:
        maps: Logits of each view, (1, K, h, w).
        label: Class ids (H, W), and `ignore_index`.
        num_labels: Number of classes K.
        ignore_index: Label value that is not scored.
        align_corners: How logits are upsampled.

    Returns:
        Confusion matrix (K, K), counts near edges as of `boundary_counts`, and the loss summed over pixels, (1,).

    Raises:
        ValueError: If the label holds other values.
    """
    label = label.to(maps[0].device)
    mask, loss = segment_with_loss(maps, label, align_corners)
    matrix = confusion_matrix(mask, label, num_labels, ignore_index)
    return matrix, boundary_counts(mask, label, num_labels, ignore_index), loss[None]


class StreamedScores:
    """What Trainer calls with each gathered batch; the last result stays readable, per class.

    Args:
        classes: Names and ignore index.
    """

    def __init__(self, classes: ClassInfo) -> None:
        self.metric = MeanIoU(classes.num_labels, classes.ignore_index, classes.names)
        self.boundary = empty_boundary_counts(classes.num_labels)
        self.loss = 0.0
        self.last: dict[str, Any] = {}

    def __call__(self, batch: Any, compute_result: bool = True) -> dict[str, float]:
        """Add counts (B, …) and, with the last batch, give the scores that are single numbers."""
        matrices, boundary = (torch.as_tensor(counts).sum(dim=0).cpu().numpy() for counts in batch.predictions)
        self.metric.add_matrix(matrices)
        self.boundary += boundary
        self.loss += float(torch.as_tensor(batch.label_ids).cpu().double().sum())
        if not compute_result:
            return {}
        matrix = self.metric.confusion_matrix
        self.last = {
            **self.metric.compute(),
            **boundary_scores(self.boundary),
            "loss": self.loss / max(int(matrix.sum()), 1),
            "confusion_matrix": matrix,
        }
        self.boundary[:], self.loss = 0, 0.0
        return {name: value for name, value in self.last.items() if isinstance(value, float)}


def named_scores(scores: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """The last result of `StreamedScores` as `metrics.json` holds it: by class name, without the matrix.

    Args:
        scores: The result.
        names: Name of each class.
    """
    absent = [name for name, iou in zip(names, scores["per_category_iou"], strict=True) if math.isnan(iou)]
    return {
        **{name: scores[name] for name in MEASURES},
        **{measure: dict(zip(names, scores[measure], strict=True)) for measure in PER_CLASS},
        "trimap_mean_iou": {str(width): iou for width, iou in scores["trimap_mean_iou"].items()},
        "absent_classes": absent,
        "worst_confusions": worst_confusions(scores["confusion_matrix"], names),
    }


def worst_confusions(matrix: Any, names: Sequence[str]) -> list[dict[str, Any]]:
    """The classes that are most often taken for another, the most pixels first.

    Args:
        matrix: Counts (K, K), rows reference, columns prediction.
        names: Name of each class.

    Returns:
        At most ten of `reference`, `prediction`, `pixels`, and their `share` of the reference class, 0..1.
    """
    wrong = matrix.copy()
    wrong[range(len(wrong)), range(len(wrong))] = 0
    order = (-wrong).ravel().argsort(kind="stable")[:CONFUSIONS]
    found = [(int(place) // len(wrong), int(place) % len(wrong)) for place in order]
    return [
        {
            "reference": names[row],
            "prediction": names[column],
            "pixels": int(wrong[row, column]),
            "share": float(wrong[row, column] / matrix[row].sum()),
        }
        for row, column in found
        if wrong[row, column]
    ]


def score_table(scores: Mapping[str, Any]) -> str:
    """Write the part `evaluation` of `metrics.json` as a text table, one line per class."""
    width = max(len(name) for name in [*scores["per_category_iou"], "class"])
    lines = [f"{'class':<{width}}     IoU  accuracy  boundary IoU"]
    columns = [scores[measure] for measure in PER_CLASS]
    for name in scores["per_category_iou"]:
        lines.append(_line(name, width, [column[name] for column in columns]))
    lines.append(_line("mean", width, [scores["mean_iou"], scores["mean_accuracy"], scores["boundary_iou"]]))
    bands = ", ".join(f"{edge} px {_score(iou).strip()}" for edge, iou in scores["trimap_mean_iou"].items())
    lines.append(f"pixel accuracy {_score(scores['overall_accuracy']).strip()}")
    lines.append(f"frequency-weighted IoU {_score(scores['frequency_weighted_iou']).strip()}")
    lines.append(f"mean IoU near edges: {bands}")
    return "\n".join(lines)


def _line(name: str, width: int, values: Sequence[float]) -> str:
    iou, accuracy, boundary = map(_score, values)
    return f"{name:<{width}}  {iou}    {accuracy}        {boundary}"


def _score(value: float) -> str:
    return "absent" if math.isnan(value) else f"{value:6.4f}"
