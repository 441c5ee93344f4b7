"""What a model says of a picture: mask, areas, overlay."""

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from PIL import Image

from .visualization import class_counts, mask_to_image, overlay, with_legend

# Overlays of pictures with more pixels than these are drawn smaller, at this edge.
_LARGE, _LARGE_EDGE = 1 << 24, 4096
_NOTHING = -1  # a model ignores no pixel


@dataclass
class Prediction:
    """The segmentation of one picture.

    Args:
        mask: Class index of each pixel, (H, W) of the picture's own size; uint8, of more than 256 classes uint16.
        names: Name of each class.
        palette: Colour of each class.
        picture: The picture, upright and RGB.
        how: How it was looked at, in words.
        probabilities: Probability of each class, float16 (H, W, K), where they were asked for.
    """

    mask: np.ndarray
    names: tuple[str, ...]
    palette: tuple[tuple[int, int, int], ...]
    picture: Image.Image = field(repr=False)
    how: str = "whole"
    probabilities: np.ndarray | None = field(default=None, repr=False)

    @cached_property
    def pixels(self) -> dict[str, int]:
        """Number of pixels of each class that occurs, the largest first."""
        counts = class_counts(self.mask, len(self.names), _NOTHING)[:-1]
        order = [int(index) for index in np.argsort(-counts, kind="stable") if counts[index]]
        return {self.names[index]: int(counts[index]) for index in order}

    @property
    def areas(self) -> dict[str, float]:
        """Share of the picture, 0 to 1, of each class that occurs, the largest first."""
        return {name: pixels / self.mask.size for name, pixels in self.pixels.items()}

    @property
    def is_large(self) -> bool:
        """Whether its overlay is scaled down: above 2^24 pixels."""
        return self.mask.size > _LARGE

    @property
    def overlay(self) -> Image.Image:
        """The classes laid over the picture, with a legend; a large picture scaled down to 4096 pixels."""
        picture, mask = self.picture, self.mask
        if self.is_large:
            scale = _LARGE_EDGE / max(picture.size)
            size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
            picture = picture.resize(size, Image.Resampling.BOX)
            mask = np.asarray(Image.fromarray(mask).resize(size, Image.Resampling.NEAREST))
        drawn = overlay(picture, mask, self.palette, ignore_index=_NOTHING)
        return with_legend(drawn, self.mask, self.names, self.palette, ignore_index=_NOTHING)

    @property
    def mask_image(self) -> Image.Image:
        """The mask as an indexed picture with the palette: pixel values are class indices."""
        return mask_to_image(self.mask, self.palette)


def mask_type(num_labels: int) -> type[np.unsignedinteger]:
    """The type of a mask's values."""
    return np.uint8 if num_labels <= 256 else np.uint16
