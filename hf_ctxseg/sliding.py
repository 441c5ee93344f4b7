"""Logits of a picture from overlapping windows, in memory that grows with the logits and not with the picture.

Other code upsamples each window and averages at the picture's size. Windows here start at multiples of the output
stride, so that their logits fall on one grid and are blended there: at stride 16 in a 256th of the memory. Bilinear
upsampling being linear, the result is the same but at the windows' rims.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from math import ceil, prod
from typing import Literal

import torch

from .upsampling import computing_type

Blend = Literal["gaussian", "constant"]
Forward = Callable[[torch.Tensor], torch.Tensor]

# Sums of more values than these (256 MB) are kept in the memory of the CPU.
DEVICE_VALUES = 1 << 26


def sliding_logits(
    forward: Forward,
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
    size = (pixels.shape[-2], pixels.shape[-1])
    rows = SlidingRows(
        forward, lambda *box: pixels[(..., *box)], size, window, overlap, blend, multiple=multiple, batch=batch
    )
    large = prod(rows.shape) > DEVICE_VALUES
    parts = [part.cpu() if large else part for part in rows]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


class SlidingRows:
    """The same logits, row by row from the top: those of one row of windows are held and no more.

    Two windows in opposite corners are looked at when it is made, which tells the size of the whole.

    Args:
        forward: As above.
        read: Gives the pixels (B, 3, h, w) of a window, two slices of rows and columns.
        size: (H, W) of the picture.
        window: As above.
        overlap: As above.
        blend: As above.
        multiple: As above.
        batch: As above.
        seen: Called with the number of windows after each forward pass.

    Attributes:
        shape: (B, K, h, w) of all logits.
        count: Number of windows.

    Raises:
        ValueError: If the network's logits do not divide the window evenly.
    """

    def __init__(
        self,
        forward: Forward,
        read: Callable[[slice, slice], torch.Tensor],
        size: tuple[int, int],
        window: int,
        overlap: float = 0.5,
        blend: Blend = "gaussian",
        *,
        multiple: int = 1,
        batch: int = 4,
        seen: Callable[[int], None] = lambda windows: None,
    ) -> None:
        self._forward, self._read, self._seen = forward, read, seen
        self._blend, self._batch = blend, batch
        self._rows, self._columns = (window_spans(edge, window, overlap, multiple) for edge in size)
        self.count = len(self._rows) * len(self._columns)
        first = last = self._look(self._rows[0], self._columns[:1])
        if self.count > 1:
            last = self._look(self._rows[-1], self._columns[-1:])
        self._corners = {(0, 0): first, (self._rows[-1].start, self._columns[-1].start): last}
        self._strides = [
            _stride(spans, cells) for spans, cells in zip((self._rows, self._columns), first.shape[-2:], strict=True)
        ]
        starts = (self._rows[-1].start // self._strides[0], self._columns[-1].start // self._strides[1])
        self.shape = (*first.shape[:2], starts[0] + last.shape[-2], starts[1] + last.shape[-1])

    def __iter__(self) -> Iterator[torch.Tensor]:
        """Yield rows (B, K, n, w) that no later window reaches; once."""
        first = self._corners[0, 0]
        if self.count == 1:
            yield first
            return
        cells, width = first.shape[-2], self.shape[-1]
        values = first.shape[0] * first.shape[1] * cells * width
        place = first.device if values <= DEVICE_VALUES else torch.device("cpu")
        sums = torch.zeros(*first.shape[:2], cells, width, dtype=computing_type(first), device=place)
        mass = sums.new_zeros(cells, width)
        tops = [rows.start // self._strides[0] for rows in self._rows]
        for rows, top, below in zip(self._rows, tops, [*tops[1:], self.shape[-2]], strict=True):
            for column, logits in self._windows(rows):
                left = column // self._strides[1]
                weights = (
                    _weights(logits.shape[-2], self._blend)[:, None] * _weights(logits.shape[-1], self._blend)
                ).to(sums)
                where = (..., slice(logits.shape[-2]), slice(left, left + logits.shape[-1]))
                sums[where] += logits.to(sums) * weights
                mass[where] += weights
            done = below - top
            yield sums[:, :, :done] / mass[:done]
            sums = torch.cat([sums[:, :, done:], torch.zeros_like(sums[:, :, :done])], dim=2)
            mass = torch.cat([mass[done:], torch.zeros_like(mass[:done])])

    def _windows(self, rows: slice) -> Iterator[tuple[int, torch.Tensor]]:
        """First column and logits (B, K, h, w) of each window of a row."""
        left = []
        for columns in self._columns:
            corner = self._corners.pop((rows.start, columns.start), None)
            if corner is None:
                left.append(columns)
            else:
                yield columns.start, corner
        for _, group in groupby(left, key=lambda columns: columns.stop - columns.start):
            same = list(group)
            for start in range(0, len(same), self._batch):
                chosen = same[start : start + self._batch]
                logits = self._look(rows, chosen)
                parts = logits.view(len(chosen), -1, *logits.shape[1:])
                yield from zip((columns.start for columns in chosen), parts, strict=True)

    def _look(self, rows: slice, several: Sequence[slice]) -> torch.Tensor:
        logits = self._forward(torch.cat([self._read(rows, columns) for columns in several]))
        self._seen(len(several))
        return logits


def window_spans(edge: int, window: int, overlap: float, multiple: int) -> list[slice]:
    """Where windows lie along an edge; see `sliding_logits`."""
    window = ceil(window / multiple) * multiple
    if edge <= window:
        return [slice(0, edge)]
    step = max(multiple, int(window * (1 - overlap)) // multiple * multiple)
    last = ceil((edge - window) / multiple) * multiple
    return [slice(start, min(start + window, edge)) for start in [*range(0, last, step), last]]


def _stride(spans: list[slice], cells: int) -> int:
    """Pixels for each of a window's logits along an edge."""
    edge = spans[0].stop
    if len(spans) == 1:
        return edge  # it lies at 0, whatever its stride
    if edge % cells:
        raise ValueError(
            f"The model gives {cells} logits for a window of {edge} pixels, which do not divide it evenly: give a "
            "window that is a multiple of the model's output stride."
        )
    return edge // cells


def _weights(cells: int, blend: Blend) -> torch.Tensor:
    if blend == "constant":
        return torch.ones(cells)
    distance = torch.arange(cells) - (cells - 1) / 2
    return torch.exp(-0.5 * (distance / (cells / 8)) ** 2).clamp(min=1e-3)
