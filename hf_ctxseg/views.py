"""How a picture is looked at: whole or by windows, at several scales, mirrored; prediction and scoring share it.

Each view leaves class maps at the network's own stride. Several are joined while they are upsampled, by blocks of
output rows: the mean of their softmax probabilities at the picture's own size, as DeepLab's test-time augmentation
has it (arXiv 1706.05587, section 4). Probabilities of the whole picture are never held.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import get_args

import torch
from torch.nn import functional as F

from .sliding import Blend, sliding_logits
from .upsampling import place_of, upsampled_argmax, upsampled_blocks


@dataclass(frozen=True)
class Views:
    """Views of a picture; by default one, of the whole picture as it is.

    Args:
        window: Edge of sliding windows, in pixels of the scaled picture; None looks at the whole.
        overlap: Share of a window that the next one covers too.
        blend: Weights of overlapping windows: gaussian or constant.
        scales: Factors of the picture's size as the image processor gives it; each edge becomes a whole number of
            pixels, halves up.
        flip: Whether each is looked at mirrored left to right, too.
        batch: Windows in one forward pass.

    Raises:
        ValueError: If one of them is out of range.
    """

    window: int | None = None
    overlap: float = 0.5
    blend: Blend = "gaussian"
    scales: tuple[float, ...] = (1.0,)
    flip: bool = False
    batch: int = 4

    def __post_init__(self) -> None:
        object.__setattr__(self, "scales", tuple(float(scale) for scale in self.scales))
        if self.window is not None and self.window < 1:
            raise ValueError(f"window is {self.window}, but must be an edge of 1 pixel or more: 512 is usual.")
        if not 0 <= self.overlap < 1:
            raise ValueError(f"overlap is {self.overlap}, but must be a share from 0 to below 1: 0.5 is usual.")
        if self.blend not in get_args(Blend):
            raise ValueError(f"blend is {self.blend!r}, but must be one of {', '.join(get_args(Blend))}.")
        if not self.scales or not all(0.0 < scale <= 16 for scale in self.scales):
            raise ValueError(f"scales are {self.scales}, but must be factors above 0 and up to 16: 0.75 1 1.25.")
        if self.batch < 1:
            raise ValueError(f"batch is {self.batch}, but must be 1 window or more.")

    @property
    def is_plain(self) -> bool:
        """Whether there is one view: the whole picture as it is."""
        return self.window is None and self.scales == (1.0,) and not self.flip

    @property
    def is_single(self) -> bool:
        """Whether there is one view, of the picture at one scale and not mirrored."""
        return len(self.scales) == 1 and not self.flip

    def describe(self) -> tuple[str, str]:
        """What is looked at, and at which scales, for a report."""
        edge, share = self.window, f"{self.overlap:g}"
        what = (
            "whole pictures"
            if edge is None
            else f"windows of {edge} pixels (overlap {share}, {self.blend}) of pictures"
        )
        listed = ", ".join(f"{scale:g}" for scale in self.scales)
        scales = "single scale" if self.scales == (1.0,) else f"scale{'s' * (len(self.scales) > 1)} {listed}"
        return what, f"{scales}, {'flipped too' if self.flip else 'no flip'}"


PLAIN = Views()


def view_maps(
    forward: Callable[[torch.Tensor], torch.Tensor], pixels: torch.Tensor, views: Views, output_stride: int
) -> list[torch.Tensor]:
    """Logits of every view, all of them upright.

    Args:
        forward: Gives the logits (n, K, h, w) of pictures (n, 3, H, W).
        pixels: `pixel_values` (B, 3, H, W).
        views: The views.
        output_stride: Of the network; windows start at multiples of it.

    Returns:
        One tensor (B, K, h, w) for each view, of different h and w.
    """

    def look(pictures: torch.Tensor) -> torch.Tensor:
        if views.window is None:
            return forward(pictures)
        return sliding_logits(
            forward, pictures, views.window, views.overlap, views.blend, multiple=output_stride, batch=views.batch
        )

    maps = []
    for scale in views.scales:
        pictures = pixels if scale == 1 else _scaled(pixels, scale)
        maps.append(look(pictures))
        if views.flip:
            maps.append(look(pictures.flip(-1)).flip(-1))
    return maps


def scaled_edge(edge: int, scale: float) -> int:
    """An edge of a scaled picture, a whole number of pixels, halves up."""
    return max(1, int(edge * scale + 0.5))


def _scaled(pixels: torch.Tensor, scale: float) -> torch.Tensor:
    height, width = (scaled_edge(edge, scale) for edge in pixels.shape[-2:])
    scaled = F.interpolate(pixels.float(), (height, width), mode="bilinear", antialias=True)
    return scaled.to(pixels.dtype)


def segment(maps: Sequence[torch.Tensor], size: tuple[int, int], align_corners: bool = False) -> torch.Tensor:
    """Most likely class of each pixel by all views.

    Args:
        maps: Logits of each view, (B, K, h, w).
        size: (H, W) of the result.
        align_corners: How logits are upsampled.

    Returns:
        Class indices (B, H, W), int64.
    """
    if len(maps) == 1:
        return upsampled_argmax(maps[0], size, align_corners)
    classes = torch.empty((len(maps[0]), *size), dtype=torch.int64, device=maps[0].device)
    with torch.no_grad():
        for pictures, rows, values in probability_blocks(maps, size, align_corners):
            classes[pictures, rows] = place_of(values.amax(dim=2, keepdim=True), values).transpose(0, 1)
    return classes


def segment_with_loss(
    maps: Sequence[torch.Tensor], label: torch.Tensor, align_corners: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Classes and cross-entropy of one picture from the same blocks.

    Args:
        maps: Logits of each view, (1, K, h, w).
        label: Class indices (H, W); pixels of any value but 0 … K - 1 do not count in the loss.
        align_corners: How logits are upsampled.

    Returns:
        Class indices (H, W), and the sum over the pixels of -log of the label's probability (of several views: of
        its mean), a scalar.
    """
    size = (label.shape[0], label.shape[1])
    counted = (label >= 0) & (label < maps[0].shape[1])
    targets = label.masked_fill(~counted, 0)[:, None, None]  # (H, 1, 1, W)
    classes = torch.empty_like(label, dtype=torch.int64)
    row_sums = torch.zeros(size[0], device=label.device)
    several = len(maps) > 1
    blocks = (
        probability_blocks(maps, size, align_corners) if several else upsampled_blocks(maps[0], size, align_corners)
    )
    with torch.no_grad():
        for _, rows, values in blocks:  # (rows, 1, K, W)
            best = values.amax(dim=2, keepdim=True)
            log_chance = values.gather(2, targets[rows])
            if several:
                log_chance = log_chance.clamp(min=torch.finfo(values.dtype).tiny).log()
            else:
                log_chance = log_chance - best - (values - best).exp_().sum(dim=2, keepdim=True).log()
            row_sums[rows] = -torch.where(counted[rows], log_chance[:, 0, 0], 0).sum(dim=1)
            classes[rows] = place_of(best, values)[:, 0]
    return classes, row_sums.sum()


def probability_blocks(
    maps: Sequence[torch.Tensor], size: tuple[int, int], align_corners: bool = False
) -> Iterator[tuple[slice, slice, torch.Tensor]]:
    """Yield the views' mean softmax probabilities block by block.

    Args:
        maps: Logits of each view, (B, K, h, w).
        size: (H, W) of the whole.
        align_corners: How logits are upsampled.

    Yields:
        The pictures and the rows of a block, and its values (rows, pictures, K, W), which are the caller's.
    """
    for blocks in zip(*(upsampled_blocks(view, size, align_corners) for view in maps), strict=True):
        pictures, rows, values = blocks[0]  # blocks are cut by B, K and the size, which all views share
        mean = values.softmax(dim=2)
        for _, _, values in blocks[1:]:
            mean += values.softmax(dim=2)
        yield pictures, rows, mean.div_(len(blocks))
