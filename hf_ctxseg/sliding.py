"""Logits of a picture from overlapping windows, in memory that grows with the logits and not with the picture.

Other code upsamples each window and averages at the picture's size. Windows here start at multiples of the output
stride, so that their logits fall on one grid and are blended there: at stride 16 in a 256th of the memory. Bilinear
upsampling being linear, the result is the same but at the windows' rims.
"""

from collections.abc import Callable, Iterator
from itertools import groupby, product
from math import ceil
from typing import Literal

import torch

from .upsampling import computing_type

Blend = Literal["gaussian", "constant"]

# Sums of more values than these (256 MB) are kept in the memory of the CPU.
DEVICE_VALUES = 1 << 26


def sliding_logits(
    forward: Callable[[torch.Tensor], torch.Tensor],
    pixels: torch.Tensor,
    window: int,
    overlap: float = 0.5,
    blend: Blend = "gaussian",
    multiple: int = 1,
    batch: int = 4,
) -> torch.Tensor:
    """Blend the logits of overlapping windows.

    Args:
        forward: Gives the logits (n, K, h, w) of pictures (n, 3, H, W).
        pixels: The pictures, (B, 3, H, W), all of one size.
        window: Edge of the windows in pixels, rounded up to a `multiple`. The last of a row or column may be smaller
            by less than a `multiple`, for it ends with the picture; nothing is padded.
        overlap: Share of a window, 0 to below 1, that the next one covers too, at least.
        blend: Weights of a window's logits in the mean: those of a Gaussian whose standard deviation is an eighth of
            the window, as in nnU-Net (but at least 0.001 along an edge), or all the same.
        multiple: Output stride of the network.
        batch: Windows in one forward pass.

    Returns:
        Logits (B, K, h, w) at the network's own stride, in float32 (float64 of float64); those of `forward` alone
        where one window covers the picture.

    Raises:
        ValueError: If the network's logits do not divide the window evenly.
    """
    spans = [_spans(edge, window, overlap, multiple) for edge in pixels.shape[-2:]]
    if len(spans[0]) == len(spans[1]) == 1:
        return forward(pixels)
    strides: list[int] = []
    for boxes in _batches(spans[0], spans[1], batch):
        logits = forward(torch.cat([pixels[..., rows, columns] for rows, columns in boxes]))
        if not strides:  # the first window is of full size along every edge that takes several
            grids = [_grid(axis, size) for axis, size in zip(spans, logits.shape[-2:], strict=True)]
            strides, cells = [stride for stride, _ in grids], [cells for _, cells in grids]
            values = len(pixels) * logits.shape[1] * cells[0] * cells[1]
            place = logits.device if values <= DEVICE_VALUES else torch.device("cpu")
            sums = torch.zeros(len(pixels), logits.shape[1], *cells, dtype=computing_type(logits), device=place)
            mass = sums.new_zeros(cells)
        weights = (_weights(logits.shape[-2], blend)[:, None] * _weights(logits.shape[-1], blend)).to(sums)
        parts = (logits.to(sums) * weights).reshape(len(boxes), *sums.shape[:2], *weights.shape)
        for part, (rows, columns) in zip(parts, boxes, strict=True):
            top, left = rows.start // strides[0], columns.start // strides[1]
            where = (..., slice(top, top + part.shape[-2]), slice(left, left + part.shape[-1]))
            sums[where] += part
            mass[where] += weights
    height, width = (int(mass.amax(dim=axis).count_nonzero()) for axis in (1, 0))  # networks round up, or down
    return sums[..., :height, :width] / mass[:height, :width]


def _spans(edge: int, window: int, overlap: float, multiple: int) -> list[slice]:
    window = ceil(window / multiple) * multiple
    if edge <= window:
        return [slice(0, edge)]
    step = max(multiple, int(window * (1 - overlap)) // multiple * multiple)
    last = ceil((edge - window) / multiple) * multiple
    return [slice(start, min(start + window, edge)) for start in [*range(0, last, step), last]]


def _batches(rows: list[slice], columns: list[slice], batch: int) -> Iterator[list[tuple[slice, slice]]]:
    """Windows of equal size, the first of full size, in batches."""

    def size(box: tuple[slice, slice]) -> tuple[int, int]:
        return box[0].stop - box[0].start, box[1].stop - box[1].start

    for _, group in groupby(sorted(product(rows, columns), key=size, reverse=True), key=size):
        boxes = list(group)
        yield from (boxes[start : start + batch] for start in range(0, len(boxes), batch))


def _grid(spans: list[slice], cells: int) -> tuple[int, int]:
    """Pixels for each of a window's logits along an edge, and how many logits the whole edge has at most."""
    edge = spans[0].stop
    if len(spans) == 1:
        return edge, cells  # it lies at 0, whatever its stride
    if edge % cells:
        raise ValueError(
            f"The model gives {cells} logits for a window of {edge} pixels, which do not divide it evenly: give a "
            "window that is a multiple of the model's output stride."
        )
    return edge // cells, spans[-1].stop * cells // edge + 1


def _weights(cells: int, blend: Blend) -> torch.Tensor:
    if blend == "constant":
        return torch.ones(cells)
    distance = torch.arange(cells) - (cells - 1) / 2
    return torch.exp(-0.5 * (distance / (cells / 8)) ** 2).clamp(min=1e-3)
