"""A picture of any size, window by window: read, looked at, blended and given up from the top down.

What is held of the whole is the 8-bit picture and its mask. Pixels are normalised for one window at a time, logits
blended for one row of windows (`sliding`), and upsampled by a few rows of the picture, as `upsampling` does it for
logits that are there as a whole.
"""

from collections.abc import Callable, Iterator, Sequence
from math import ceil, floor
from typing import NamedTuple

import torch
from PIL import Image

from .image_processing_ctxseg import CtxSegImageProcessor
from .sliding import Forward, SlidingRows
from .upsampling import CPU_BLOCK, DEVICE_BLOCK, upsample
from .views import Views, scaled_edge

# Pictures are brought to another geometry as a whole, and are small after it.
_GEOMETRY = ("do_resize", "do_center_crop", "do_pad")


class Source(NamedTuple):
    """Where pixels come from.

    Args:
        size: (H, W).
        read: Gives `pixel_values` (1, 3, h, w) of a window, two slices of rows and columns.
    """

    size: tuple[int, int]
    read: Callable[[slice, slice], torch.Tensor]


def resizes(processor: CtxSegImageProcessor) -> bool:
    """Whether an image processor changes the size of pictures."""
    return any(getattr(processor, name, None) for name in _GEOMETRY)


def picture_source(picture: Image.Image, processor: CtxSegImageProcessor) -> Source:
    """Read a picture through its image processor, by windows unless it resizes."""
    if resizes(processor):
        pixels = processor(images=picture, return_tensors="pt")["pixel_values"]
        return Source((pixels.shape[-2], pixels.shape[-1]), lambda rows, columns: pixels[..., rows, columns])

    def read(rows: slice, columns: slice) -> torch.Tensor:
        window = picture.crop((columns.start, rows.start, columns.stop, rows.stop))
        return processor(images=window, return_tensors="pt")["pixel_values"]

    return Source((picture.height, picture.width), read)


def scaled_source(source: Source, scale: float) -> Source:
    """Read a picture at another scale: windows of what `F.interpolate(…, antialias=True)` makes of the whole."""
    if scale == 1:
        return source
    height, width = size = (scaled_edge(source.size[0], scale), scaled_edge(source.size[1], scale))

    def read(rows: slice, columns: slice) -> torch.Tensor:
        near_rows, row_weights = _triangles(source.size[0], height, rows)
        near_columns, column_weights = _triangles(source.size[1], width, columns)
        return row_weights @ source.read(near_rows, near_columns) @ column_weights.T

    return Source(size, read)


def mirrored_source(source: Source) -> Source:
    """Read a picture mirrored left to right."""
    width = source.size[1]

    def read(rows: slice, columns: slice) -> torch.Tensor:
        return source.read(rows, slice(width - columns.stop, width - columns.start)).flip(-1)

    return Source(source.size, read)


def _triangles(source: int, target: int, span: slice) -> tuple[slice, torch.Tensor]:
    """What pixels of a resized edge are made of: the source's pixels that count, and weights (span, these)."""
    ratio = source / target
    support = max(ratio, 1.0)
    centres = (torch.arange(span.start, span.stop, dtype=torch.float64) + 0.5) * ratio
    near = slice(max(0, floor(centres[0] - support)), min(source, ceil(centres[-1] + support)))
    places = torch.arange(near.start, near.stop, dtype=torch.float64) + 0.5
    weights = (1 - (places - centres[:, None]).abs() / support).clamp(min=0)
    return near, (weights / weights.sum(dim=1, keepdim=True)).float()


def tiled_blocks(
    forward: Forward,
    source: Source,
    views: Views,
    size: tuple[int, int],
    *,
    output_stride: int = 1,
    align_corners: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Iterator[tuple[slice, torch.Tensor]]:
    """Yield the views' mean softmax probabilities from the top down; of one view its logits, which say the same.

    Args:
        forward: Gives the logits (n, K, h, w) of windows (n, 3, H, W).
        source: The picture.
        views: How it is looked at; with a window.
        size: (H, W) of the result.
        output_stride: Of the network; windows start at multiples of it.
        align_corners: How logits are upsampled.
        progress: Called with the windows looked at and their number.

    Yields:
        Some rows, and their values (rows, 1, K, W), which are the caller's.

    Raises:
        ValueError: If a window does not fit the network.
    """
    if views.window is None:
        raise ValueError("window is None, but tiles need an edge in pixels: give 512, for example.")
    done, total = 0, 0

    def seen(windows: int) -> None:
        nonlocal done
        done += windows
        if total:
            progress(done, total)

    looks: list[_Upsampled] = []
    counts = []
    for scale in views.scales:
        for mirrored in (False, True)[: 1 + views.flip]:
            pixels = scaled_source(source, scale)
            rows = SlidingRows(
                forward,
                (mirrored_source(pixels) if mirrored else pixels).read,
                pixels.size,
                views.window,
                views.overlap,
                views.blend,
                multiple=output_stride,
                batch=views.batch,
                seen=seen,
            )
            counts.append(rows.count)
            looks.append(_Upsampled(rows, mirrored, size, align_corners))
    total = sum(counts)
    progress(done, total)
    yield from _joined(looks, size)


def _joined(looks: Sequence["_Upsampled"], size: tuple[int, int]) -> Iterator[tuple[slice, torch.Tensor]]:
    limit = CPU_BLOCK if looks[0].device.type == "cpu" else DEVICE_BLOCK
    step = max(1, limit // (looks[0].channels * size[1]))
    for start in range(0, size[0], step):
        rows = slice(start, min(start + step, size[0]))
        values = looks[0].rows(rows)
        if len(looks) > 1:
            values = values.softmax(dim=2)
            for look in looks[1:]:
                values += look.rows(rows).to(values.device).softmax(dim=2)
            values.div_(len(looks))
        yield rows, values


class _Upsampled:
    """Rows of a view's logits at the picture's size, asked for from the top down."""

    def __init__(self, logits: SlidingRows, mirrored: bool, size: tuple[int, int], align_corners: bool) -> None:
        self.channels, self.mirrored = logits.shape[1], mirrored
        self._blocks, self._width, self._align_corners = iter(logits), size[1], align_corners
        source, target = logits.shape[-2], size[0]
        places = torch.arange(target, dtype=torch.float64)
        if align_corners:
            places = places * ((source - 1) / max(target - 1, 1))
        else:
            places = ((places + 0.5) * (source / target) - 0.5).clamp(min=0)
        self._lower = places.long().clamp(max=source - 1)
        self._upper = (self._lower + 1).clamp(max=source - 1)
        self._fraction = (places - self._lower).float()
        self._narrow = next(self._blocks)  # logits (1, K, n, w) that are not widened yet
        self._wide = self._widened(0)  # rows (n, 1, K, W), the first of which is `_start`
        self._start = 0
        self.device = self._narrow.device

    def rows(self, rows: slice) -> torch.Tensor:
        """Values (rows, 1, K, W)."""
        lower, upper = self._lower[rows], self._upper[rows]
        first, stop = int(lower[0]), int(upper[-1]) + 1
        missing = stop - self._start - len(self._wide)  # with those that are skipped where the picture is smaller
        kept = self._wide[first - self._start :]
        self._wide = torch.cat([kept, self._widened(missing)])[first - stop :]
        self._start = first
        fraction = self._fraction[rows].to(self._wide)[:, None, None, None]
        return torch.lerp(self._wide[lower - first], self._wide[upper - first], fraction)

    def _widened(self, count: int) -> torch.Tensor:
        while self._narrow.shape[2] < count:
            self._narrow = torch.cat([self._narrow, next(self._blocks)], dim=2)
        part, self._narrow = self._narrow[:, :, :count], self._narrow[:, :, count:]
        if self.mirrored:
            part = part.flip(-1)
        lines = part.permute(2, 0, 1, 3).reshape(1, -1, 1, part.shape[-1])  # (1, n · K, 1, w)
        if not count:
            return lines.new_empty((0, 1, self.channels, self._width))
        return upsample(lines, (1, self._width), self._align_corners).view(count, 1, self.channels, self._width)
