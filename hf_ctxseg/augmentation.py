"""Training augmentation of an image with its label map: random scale, crop, flip and photometric distortion.

The recipe of the DeepLab papers (v3, section 4.1: scale 0.5 to 2, crop, flip), with the crop drawn again where one
class covers nearly all of it. All randomness comes from torch's generator.
"""

from typing import Any

import torch
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

CROP_TRIES = 10


def resize_pair(
    image: torch.Tensor, mask: torch.Tensor, size: tuple[int, int]
) -> tuple[tv_tensors.Image, tv_tensors.Mask]:
    """Resize image (3, H, W) bilinearly with antialiasing and mask (H, W) to the nearest pixel, on the same grid.

    torchvision's own nearest for masks samples the corner of a pixel: when shrinking, off the bilinear grid.
    """
    plain = image.as_subclass(torch.Tensor)
    if tuple(size) == (1, 1):  # torch's uint8 kernel fails for this one size unless channels are last in memory
        plain = plain.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    scaled = F.resize_image(plain, list(size), v2.InterpolationMode.BILINEAR, antialias=True)
    rows, columns = (_nearest(old, new) for old, new in zip(mask.shape, size, strict=True))
    return tv_tensors.Image(scaled), tv_tensors.Mask(mask.as_subclass(torch.Tensor)[rows][:, columns])


def _nearest(old: int, new: int) -> torch.Tensor:
    """Index of the source pixel under the centre of each of `new` pixels: floor((i + 1/2) · old / new), exactly."""
    return (2 * torch.arange(new) + 1) * old // (2 * new)


class RandomScaledCrop(v2.Transform):
    """Scale an image and its mask at random, then crop (and, if too small, pad right and below) to one size.

    The window is cut out before it is resized, which spares resizing what the crop would throw away. The scale is
    exact to half a source pixel per window.

    Args:
        crop_size: Height and width of the result.
        scale: Lowest and highest scale, drawn uniformly.
        max_class_ratio: The crop is drawn again, up to 10 times, while one class covers more of its valid pixels; if
            all do, the one with the lowest share is taken.
        ignore_index: Mask value of padding; such pixels count for no class.
        image_fill: Colour of padding.

    Shape:
        Image uint8 (3, H, W) and Mask (H, W) → (3, *crop_size) and (*crop_size).
    """

    def __init__(
        self,
        crop_size: tuple[int, int],
        scale: tuple[float, float],
        max_class_ratio: float,
        ignore_index: int,
        image_fill: tuple[int, int, int],
    ) -> None:
        super().__init__()
        if len(crop_size) != 2 or min(crop_size) < 1:
            raise ValueError(f"crop_size is {crop_size}, but it must be a height and a width of at least 1.")
        if len(scale) != 2 or not 0 < scale[0] <= scale[1]:
            raise ValueError(f"scale is {scale}, but it must be a lowest and a highest factor, 0 < lowest <= highest.")
        if not 0 < max_class_ratio <= 1:
            raise ValueError(f"max_class_ratio is {max_class_ratio}, but it must be above 0 and at most 1.")
        self.crop_size = tuple(crop_size)
        self.scale = tuple(scale)
        self.max_class_ratio = max_class_ratio
        self.ignore_index = ignore_index
        self.image_fill = image_fill

    def forward(self, image: tv_tensors.Image, mask: tv_tensors.Mask) -> tuple[tv_tensors.Image, tv_tensors.Mask]:
        """Scale and crop both alike."""
        height, width = mask.shape
        low, high = self.scale
        factor = low + (high - low) * float(torch.rand(()))
        (tall, out_height), (wide, out_width) = (
            _window(length, crop, factor) for length, crop in zip((height, width), self.crop_size, strict=True)
        )
        grid = _nearest(tall, out_height), _nearest(wide, out_width)
        plain = mask.as_subclass(torch.Tensor)
        best, best_ratio = (0, 0), float("inf")
        for _ in range(CROP_TRIES if (tall, wide) != (height, width) else 1):
            top, left = _below(height - tall + 1), _below(width - wide + 1)
            ratio = self._class_ratio(plain[grid[0] + top][:, grid[1] + left])
            if ratio < best_ratio:
                best, best_ratio = (top, left), ratio
            if ratio <= self.max_class_ratio:
                break
        top, left = best
        window = slice(top, top + tall), slice(left, left + wide)
        image, mask = resize_pair(image[(slice(None), *window)], mask[window], (out_height, out_width))
        return self._pad(image, mask)

    def _class_ratio(self, mask: torch.Tensor) -> float:
        """Share of the commonest class among the valid pixels; 1 where none is valid."""
        if self.max_class_ratio == 1:
            return 0.0
        valid = mask[mask != self.ignore_index]
        if not valid.numel():
            return 1.0
        return int(torch.bincount(valid - valid.min()).max()) / valid.numel()

    def _pad(self, image: tv_tensors.Image, mask: tv_tensors.Mask) -> tuple[tv_tensors.Image, tv_tensors.Mask]:
        height, width = mask.shape
        right, below = self.crop_size[1] - width, self.crop_size[0] - height
        if not right and not below:
            return image, mask
        if not torch.iinfo(mask.dtype).min <= self.ignore_index <= torch.iinfo(mask.dtype).max:
            mask = mask.to(torch.int64)
        padded = torch.nn.functional.pad(mask.as_subclass(torch.Tensor), (0, right, 0, below), value=self.ignore_index)
        filled = F.pad_image(image, [0, 0, right, below], fill=list(self.image_fill))
        return tv_tensors.Image(filled), tv_tensors.Mask(padded)


def _window(length: int, crop: int, factor: float) -> tuple[int, int]:
    """Length of the source window and of what it becomes, at most `crop`."""
    if length * factor >= crop:
        return min(length, max(1, round(crop / factor))), crop
    return length, max(1, round(length * factor))


def _below(limit: int) -> int:
    return int(torch.randint(limit, ()))


def training_transform(
    crop_size: tuple[int, int],
    scale: tuple[float, float] = (0.5, 2.0),
    flip: float = 0.5,
    max_class_ratio: float = 0.75,
    photometric: bool = True,
    ignore_index: int = 255,
    image_fill: tuple[int, int, int] = (124, 116, 104),
) -> v2.Transform:
    """Build the augmentation of one training sample.

    Args:
        crop_size: Height and width of the result.
        scale: Range of the random scale.
        flip: Probability of a horizontal flip.
        max_class_ratio: Highest share of the valid pixels of a crop that one class may cover, where such a crop is
            found in 10 tries; 1 turns this off.
        photometric: Whether to change brightness, contrast, saturation and hue, each with probability 1/2.
        ignore_index: Label of padded pixels.
        image_fill: Colour of padded pixels, best the mean colour that the image processor subtracts (here ImageNet's).

    Returns:
        A transform of (`tv_tensors.Image` uint8 (3, H, W), `tv_tensors.Mask` (H, W)) to the same types, of crop_size.

    Raises:
        ValueError: If an argument is out of range.
    """
    if not 0 <= flip <= 1:
        raise ValueError(f"flip is {flip}, but a probability from 0 to 1 is needed.")
    steps: list[Any] = [
        RandomScaledCrop(crop_size, scale, max_class_ratio, ignore_index, image_fill),
        v2.RandomHorizontalFlip(flip),
    ]
    if photometric:
        # The ranges of SSD (1512.02325), which segmentation took over, without its swapping of colour channels
        ranges = {"brightness": 0.125, "contrast": 0.5, "saturation": 0.5, "hue": 0.05}
        steps += [v2.RandomApply([v2.ColorJitter(**{name: spread})], p=0.5) for name, spread in ranges.items()]
    return v2.Compose(steps)
