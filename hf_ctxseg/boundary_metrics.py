"""Scores near the edges of objects, counted in the same pass as the confusion matrix: boundary IoU and trimap mIoU.

Boundary IoU (Cheng et al., arXiv 2103.16562) compares what lies in each class within a distance of its own outline:
2 % of the picture's diagonal. The picture's edge belongs to an outline. Trimap mIoU (Kohli et al. 2009; DeepLabv3+,
arXiv 1802.02611, figure 5) is the mean IoU of the pixels in a band around the edges of the reference, for bands of
several widths. Where a data set outlines its objects in void (VOC), that is the paper's dilated void.

Distances are counted over rows and columns, whichever is more, as erosion by a 3×3 square does. Void counts as a
label of its own for where edges run, in the prediction too, and is not scored. Counts are summed over all pictures.
"""

from math import hypot
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from .metrics import mean_of_present, ratio

BOUNDARY_SHARE = 0.02
TRIMAP_WIDTHS = (1, 2, 4, 8, 16)


def boundary_distance(height: int, width: int) -> int:
    """Width of the outlines in boundary IoU: 2 % of the diagonal, in whole pixels, 1 at least."""
    return max(1, round(BOUNDARY_SHARE * hypot(height, width)))


def boundary_counts(
    prediction: torch.Tensor, reference: torch.Tensor, num_labels: int, ignore_index: int
) -> torch.Tensor:
    """Count the pixels of each class near edges.

    Args:
        prediction: Class ids (H, W), 0 to K - 1.
        reference: Class ids (H, W), and `ignore_index` where a pixel is not scored.
        num_labels: Number of classes K.
        ignore_index: Void.

    Returns:
        Counts, int64 (1 + bands, 3, K): pixels in both, in the reference, in the prediction; first of the outlines,
        then of the band of each of `TRIMAP_WIDTHS`.
    """
    scored = reference != ignore_index
    prediction = torch.where(scored, prediction, ignore_index)
    distance = boundary_distance(*reference.shape)
    in_reference, in_prediction = (
        near_other(labels, (distance,), with_edge=True)[0] & scored for labels in (reference, prediction)
    )
    outlines = _class_counts(prediction, reference, in_reference, in_prediction, num_labels)
    bands = near_other(reference, TRIMAP_WIDTHS)  # (bands, H, W), each inside the next
    rings = (~bands).sum(dim=0)  # 0 in the innermost, and outside of all of them one more than the last
    inside = bands[-1] & scored
    of_rings = _class_counts(
        prediction + rings * num_labels, reference + rings * num_labels, inside, inside, len(bands) * num_labels
    )
    cumulated = of_rings.view(3, len(bands), num_labels).cumsum(dim=1).transpose(0, 1)
    return torch.cat([outlines[None], cumulated])


def near_other(labels: torch.Tensor, distances: tuple[int, ...], with_edge: bool = False) -> torch.Tensor:
    """Find the pixels that have another label than their own within some distance.

    Args:
        labels: Integer labels (H, W).
        distances: Ascending, in pixels.
        with_edge: Whether what lies outside the picture counts as another label.

    Returns:
        bool (distances, H, W).
    """
    labels = labels.int()
    if with_edge:
        labels = F.pad(labels, (1, 1, 1, 1), value=int(labels.min()) - 1)
    near = (_maxima(labels, 1) != -_maxima(-labels, 1)).byte()
    reached, found = 1, []
    for distance in distances:
        # Another label is within n + m where a pixel within m has another one within n.
        near, reached = _maxima(near, distance - reached), distance
        found.append(near.bool())
    bands = torch.stack(found)
    return bands[:, 1:-1, 1:-1] if with_edge else bands


def boundary_scores(counts: NDArray[Any]) -> dict[str, Any]:
    """Turn counts, (1 + bands, 3, K), into scores.

    Returns:
        `boundary_iou`, a float in 0..1 (NaN where there is no edge); `per_category_boundary_iou`, K floats, NaN for
        absent classes; `trimap_mean_iou`, a mapping from the width of a band in pixels to its mean IoU.
    """
    both, in_reference, in_prediction = counts.swapaxes(0, 1)  # (1 + bands, K) each
    iou = ratio(both, in_reference + in_prediction - both)
    return {
        "boundary_iou": mean_of_present(iou[0]),
        "per_category_boundary_iou": iou[0].tolist(),
        "trimap_mean_iou": {
            width: mean_of_present(values) for width, values in zip(TRIMAP_WIDTHS, iou[1:], strict=True)
        },
    }


def empty_boundary_counts(num_labels: int) -> NDArray[np.int64]:
    """Counts of no picture, to add others to."""
    return np.zeros((1 + len(TRIMAP_WIDTHS), 3, num_labels), dtype=np.int64)


def _maxima(values: torch.Tensor, radius: int) -> torch.Tensor:
    """Largest integer within `radius` rows and columns, (H, W), in a time that grows with the radius' logarithm.

    On a CPU `F.max_pool2d` takes fifty times as long.
    """
    edge = 2 * radius + 1
    values = F.pad(values, (radius,) * 4, value=torch.iinfo(values.dtype).min)
    for dim in (0, 1):
        reach = 1
        while reach < edge:
            shift = min(reach, edge - reach)
            kept = values.shape[dim] - shift
            values = torch.maximum(values.narrow(dim, 0, kept), values.narrow(dim, shift, kept))
            reach += shift
    return values


def _class_counts(
    prediction: torch.Tensor,
    reference: torch.Tensor,
    in_reference: torch.Tensor,
    in_prediction: torch.Tensor,
    num_labels: int,
) -> torch.Tensor:
    """Pixels of each class in both, in the reference and in the prediction, (3, K)."""
    both = in_reference & in_prediction & (prediction == reference)
    return torch.stack(
        [
            # The rest goes to a bin of its own: no wait for the device to find out how much is chosen.
            torch.bincount(torch.where(chosen, ids, num_labels).flatten(), minlength=num_labels + 1)[:num_labels]
            for ids, chosen in ((reference, both), (reference, in_reference), (prediction, in_prediction))
        ]
    )
