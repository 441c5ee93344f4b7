"""Bilinear upsampling of class maps in blocks of output rows, and what needs no more than a block: the arg-max.

The logits of 150 classes at 1024×2048 pixels take 1.2 GB, and a loss or an arg-max looks at each pixel once. A block
is made, used while it lies in the processor's cache, and given up. Bilinear interpolation is separable: each source
row is widened once, by `F.interpolate` itself, and an output row is a mixture of two widened rows.
"""

from collections.abc import Iterator
from itertools import groupby
from typing import Literal, overload

import torch
from torch.nn import functional as F

from .plain_formulas import plain_formulas, product

# Values per block: what stays in a processor's cache; elsewhere enough to keep a device busy (128 MB in float32).
CPU_BLOCK = 1 << 20
DEVICE_BLOCK = 1 << 25


@overload
def upsampled_argmax(
    logits: torch.Tensor, size: tuple[int, int], align_corners: bool = False, return_scores: Literal[False] = False
) -> torch.Tensor: ...
@overload
def upsampled_argmax(
    logits: torch.Tensor, size: tuple[int, int], align_corners: bool = False, *, return_scores: Literal[True]
) -> tuple[torch.Tensor, torch.Tensor]: ...
def upsampled_argmax(
    logits: torch.Tensor, size: tuple[int, int], align_corners: bool = False, return_scores: bool = False
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Most likely class of each pixel of bilinearly upsampled logits, without the upsampled tensor.

    It equals `F.interpolate(logits, size, mode="bilinear").argmax(1)` but for pixels whose two best classes differ by
    no more than rounding. Half precision is computed in float32; nothing is recorded for autograd.

    Args:
        logits: (B, K, h, w).
        size: (H, W), larger or smaller.
        align_corners: How the logits are upsampled.
        return_scores: Whether to give the softmax probability of that class too.

    Returns:
        Class indices (B, H, W), int64, the first of equal ones; with scores also their probabilities (B, H, W).
    """
    shrinks = size[0] * size[1] <= logits.shape[2] * logits.shape[3]  # nothing large to avoid
    # A compiler plans its own loops.
    if shrinks or torch.compiler.is_compiling() or plain_formulas():
        upsampled = upsample(logits.detach(), size, align_corners)
        classes = upsampled.argmax(dim=1)
        return (classes, upsampled.softmax(dim=1).amax(dim=1)) if return_scores else classes
    with torch.no_grad():
        classes = logits.new_empty((len(logits), *size), dtype=torch.int64)
        scores = logits.new_empty(classes.shape if return_scores else 0, dtype=computing_type(logits))
        for pictures, rows, values in upsampled_blocks(logits, size, align_corners):
            best = values.amax(dim=2, keepdim=True)  # (rows, pictures, 1, W)
            if return_scores:
                scores[pictures, rows] = (values - best).exp_().sum(dim=2).reciprocal_().transpose(0, 1)
            classes[pictures, rows] = place_of(best, values).transpose(0, 1)
    return (classes, scores) if return_scores else classes


def upsampled_blocks(
    maps: torch.Tensor, size: tuple[int, int], align_corners: bool = False, gradient: torch.Tensor | None = None
) -> Iterator[tuple[slice, slice, torch.Tensor]]:
    """Yield bilinearly resized maps block by block; autograd does not see it.

    For a backward pass the caller gives `gradient` and overwrites the values of each block with the gradient with
    respect to them: it is carried back to the maps.

    Args:
        maps: (B, K, h, w); half precision is computed in float32, and minus infinity counts as -1e30.
        size: (H, W).
        align_corners: As in `F.interpolate`.
        gradient: Where the gradient with respect to the maps is written: (B, K, h, w), zeros, in the values' type.

    Yields:
        The pictures and the output rows of a block, and its values (rows, pictures, K, W), which are the caller's
        until the next block, made in the same memory. Several pictures where they fit, else some rows of one.
    """
    channels, height, width = maps.shape[1:]
    mixture = _RowMixture(height, size[0], align_corners, maps)
    column_weights = _weights(width, size[1], align_corners, maps).to(maps.device)  # (W, w)
    limit = CPU_BLOCK if maps.device.type == "cpu" else DEVICE_BLOCK
    row_step = min(size[0], max(1, limit // (channels * size[1])))
    for pictures in _steps(len(maps), max(1, limit // (channels * size[0] * size[1]))):
        source = maps.detach()[pictures].permute(2, 0, 1, 3)  # (h, pictures, K, w)
        target = None if gradient is None else gradient[pictures].permute(2, 0, 1, 3)
        memory = source.new_empty((row_step, *source.shape[1:3], size[1]), dtype=computing_type(maps))
        wide = pending = memory[:0]  # source rows `near` of the last block, widened, and the gradients of these
        near = slice(0, 0)
        for rows in _steps(size[0], row_step):
            previous, near = near, mixture.sources(rows)
            kept = max(0, previous.stop - near.start)
            wide = _with_rows(wide[len(wide) - kept :], source[near.start + kept : near.stop], size[1], align_corners)
            values = memory[: rows.stop - rows.start]
            mixture.mix(wide, near, rows, out=values)
            yield pictures, rows, values
            if target is not None:
                gathered = product(mixture.weights[rows, near].T, values.flatten(1)).view_as(wide)
                gathered[:kept] += pending[len(pending) - kept :]
                if len(pending) > kept:
                    done = slice(previous.start, previous.stop - kept)
                    target[done] = product(pending[: len(pending) - kept], column_weights)
                pending = gathered
        if target is not None:
            target[near] = product(pending, column_weights)


def upsample(maps: torch.Tensor, size: tuple[int, int], align_corners: bool = False) -> torch.Tensor:
    """Resize maps (B, K, h, w) to (B, K, H, W) whole, in float32 or float64; minus infinity counts as -1e30.

    Minus infinity, of a class that is left out, times a weight of 0 would be no number.
    """
    maps = maps.to(computing_type(maps)).clamp(min=-1e30)
    return F.interpolate(maps, size, mode="bilinear", align_corners=align_corners)


def computing_type(maps: torch.Tensor) -> torch.dtype:
    """Type in which maps are upsampled and summed: float64 for float64, float32 for all others."""
    return torch.float64 if maps.dtype == torch.float64 else torch.float32


class _RowMixture:
    """How output rows are made of source rows: each of a lower one and the next."""

    def __init__(self, source: int, target: int, align_corners: bool, like: torch.Tensor) -> None:
        weights = _weights(source, target, align_corners, like)
        lower = weights.ne(0).int().argmax(dim=1)
        upper = (lower + 1).clamp(max=source - 1)
        fraction = weights.gather(1, upper[:, None])[:, 0] * (upper > lower)
        self.lower, self.upper = lower.tolist(), upper.tolist()
        self.fraction, self.weights = fraction.to(like.device), weights.to(like.device)  # (target,), (target, source)

    def sources(self, rows: slice) -> slice:
        """Source rows that these output rows lie between."""
        return slice(self.lower[rows.start], self.upper[rows.stop - 1] + 1)

    def mix(self, wide: torch.Tensor, near: slice, rows: slice, out: torch.Tensor) -> None:
        """Write output rows (rows, …) from the widened source rows `near`: runs between the same two at once."""
        stop = rows.start
        for lower, run in groupby(self.lower[rows]):
            start, stop = stop, stop + len(list(run))
            upper = self.upper[start]
            torch.lerp(
                wide[lower - near.start][None],
                wide[upper - near.start][None],
                self.fraction[start:stop, None, None, None],
                out=out[start - rows.start : stop - rows.start],
            )


def _weights(source: int, target: int, align_corners: bool, like: torch.Tensor) -> torch.Tensor:
    """The matrix (target, source) of bilinear interpolation along one axis, on the CPU: what it makes of the unit."""
    unit = torch.eye(source, dtype=computing_type(like))
    return F.interpolate(unit[None, None], (target, source), mode="bilinear", align_corners=align_corners)[0, 0]


def _with_rows(wide: torch.Tensor, rows: torch.Tensor, width: int, align_corners: bool) -> torch.Tensor:
    """Append rows (n, pictures, K, w), widened, to wide ones (m, pictures, K, width)."""
    if not len(rows):
        return wide
    lines = rows.reshape(1, -1, 1, rows.shape[-1])
    added = upsample(lines, (1, width), align_corners)
    added = added.view(*rows.shape[:-1], width)
    return torch.cat([wide, added]) if len(wide) else added


def _steps(stop: int, step: int) -> Iterator[slice]:
    return (slice(start, min(start + step, stop)) for start in range(0, stop, step))


def place_of(best: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Index along dim 2 of the first value that equals `best`; on the CPU the values are overwritten.

    PyTorch's reductions that give an index are not vectorised there, at several times the cost of those that do not.
    """
    if values.device.type != "cpu":
        return values.argmax(dim=2)
    count = values.shape[2]
    codes = torch.arange(count, 2 * count, dtype=values.dtype)  # two of them sum to more than any one
    place = values.eq_(best).mul_(codes[:, None]).sum(dim=2).long() - count
    unclear = (place < 0) | (place >= count)  # not a number, or equal values
    if unclear.any():
        place[unclear] = values.movedim(2, -1)[unclear].ne(0).int().argmax(dim=-1)
    return place
