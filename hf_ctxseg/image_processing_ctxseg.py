"""Any picture to `pixel_values` (and `labels`), and logits to masks at the picture's own size.

The processor is saved beside the weights, so that the normalisation the backbone was trained with travels with them.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image, ImageOps
from torchvision.transforms.v2 import functional as tvF
from transformers.image_processing_backends import TorchvisionBackend
from transformers.image_processing_utils import BatchFeature
from transformers.image_utils import (
    ChannelDimension,
    ImageInput,
    PILImageResampling,
    infer_channel_dimension_format,
)
from transformers.processing_utils import ImagesKwargs, Unpack
from typing_extensions import Self

from .upsampling import upsample, upsampled_argmax


class CtxSegImageProcessorKwargs(ImagesKwargs, total=False):  # type: ignore[call-arg]
    """Arguments of the image processor beside transformers' own.

    align_corners (`bool`, *optional*, defaults to `self.align_corners`):
        How logits are upsampled to the picture's size; the model's config has the same field.
    """

    align_corners: bool


class CtxSegImageProcessor(TorchvisionBackend):
    """Image processor of every model of the package.

    Pictures of any Pillow mode become 8-bit RGB: alpha is dropped, 16-bit and floating-point values are brought to
    0 … 255, an EXIF rotation is applied, an animation gives its first frame. By default they keep their size;
    `size={"max_height": n, "max_width": n}` with `do_resize=True` scales them to fit.

    Args:
        image_mean: Mean of each channel after rescaling.
        image_std: Standard deviation of each channel after rescaling.
        do_resize: Whether pictures are resized to `size`.
        size: Target size, in transformers' forms.
        align_corners: How logits are upsampled.
    """

    valid_kwargs = CtxSegImageProcessorKwargs
    model_input_names = ["pixel_values"]  # noqa: RUF012 (declared so by the base class)
    resample = PILImageResampling.BILINEAR
    image_mean = (0.485, 0.456, 0.406)
    image_std = (0.229, 0.224, 0.225)
    size = None
    do_resize = False
    do_rescale = True
    do_normalize = True
    do_convert_rgb = True
    rescale_factor = 1 / 255
    align_corners = False

    def __init__(self, **kwargs: Unpack[CtxSegImageProcessorKwargs]) -> None:
        super().__init__(**kwargs)

    @classmethod
    def for_backbone(cls, backbone: str, **kwargs: Any) -> Self:
        """Make a processor with the mean and standard deviation that a timm backbone was pretrained with."""
        pretrained = timm.get_pretrained_cfg(backbone, allow_unregistered=True)
        if pretrained is not None:
            kwargs.setdefault("image_mean", list(pretrained.mean))
            kwargs.setdefault("image_std", list(pretrained.std))
        return cls(**kwargs)

    def fetch_images(self, image_url_or_urls: Any) -> Any:
        """Open file names with Pillow; URLs are not fetched."""
        if isinstance(image_url_or_urls, (list, tuple)):
            return [self.fetch_images(image) for image in image_url_or_urls]
        if isinstance(image_url_or_urls, (str, Path)):
            return open_image(str(image_url_or_urls))
        return super().fetch_images(image_url_or_urls)

    def process_image(self, image: ImageInput, do_convert_rgb: bool | None = None, **kwargs: Any) -> torch.Tensor:
        """Give one picture as a tensor (C, H, W); pictures, unlike label maps, come as `do_convert_rgb=True`."""
        if do_convert_rgb:
            if isinstance(image, Image.Image):
                image = to_rgb(image)
            elif image.dtype in (np.uint16, torch.uint16, np.bool_, torch.bool):
                image = to_8_bit(np.asarray(image))
            elif isinstance(image, np.ndarray) and not image.flags.writeable:
                image = image.copy()  # torch warns about the views that Pillow gives
            if kwargs.get("input_data_format") is None and getattr(image, "ndim", 2) == 3:  # an array, not grey
                kwargs["input_data_format"] = infer_channel_dimension_format(image, num_channels=(1, 3, 4))
        # Releases of transformers convert to RGB before or after making a tensor: here it is after, in all of them.
        tensor: torch.Tensor = super().process_image(image, do_convert_rgb=False, **kwargs)
        if not do_convert_rgb:
            return tensor
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise ValueError("The picture holds NaN or infinite values: give finite pixel values.")
        return tensor.expand(3, -1, -1) if tensor.shape[0] == 1 else tensor[:3]  # (3, H, W), without alpha

    def _prepare_images_structure(self, images: Any, expected_ndims: int = 3) -> Any:
        images = self.fetch_images(images)
        several = isinstance(images, (list, tuple))
        if several and not images:
            raise ValueError("The list of pictures is empty: give at least one.")
        if expected_ndims == 3:  # grey arrays (H, W)
            images = [_with_channel(image) for image in images] if several else _with_channel(images)
        return super()._prepare_images_structure(images, expected_ndims)

    def preprocess(
        self,
        images: ImageInput,
        segmentation_maps: ImageInput | None = None,
        **kwargs: Unpack[CtxSegImageProcessorKwargs],
    ) -> BatchFeature:
        """Give `pixel_values` (B, 3, H, W) and, with label maps (H, W) of the pictures' sizes, `labels` (B, H, W).

        Raises:
            ValueError: If a picture cannot be read, or a label map has another size than its picture.
        """
        return super().preprocess(images, segmentation_maps, **kwargs)

    def _preprocess_image_like_inputs(
        self,
        images: ImageInput,
        segmentation_maps: ImageInput | None,
        do_convert_rgb: bool,
        input_data_format: ChannelDimension | None,
        return_tensors: Any = None,
        device: Any = None,
        **kwargs: Any,
    ) -> BatchFeature:
        kwargs.pop("align_corners", None)
        pictures = self._prepare_image_like_inputs(
            images=images, do_convert_rgb=do_convert_rgb, input_data_format=input_data_format, device=device
        )
        if kwargs.get("do_rescale"):
            pictures = [_to_byte_range(picture) for picture in pictures]
        data = {"pixel_values": self._tensors(pictures, kwargs)}
        if segmentation_maps is not None:
            maps = self._prepare_image_like_inputs(
                images=segmentation_maps,
                expected_ndims=2,
                do_convert_rgb=False,
                input_data_format=ChannelDimension.FIRST,
            )
            _check_sizes(pictures, maps)
            exact = {"do_normalize": False, "do_rescale": False, "resample": tvF.InterpolationMode.NEAREST_EXACT}
            labels = self._tensors(maps, kwargs | exact)
            data["labels"] = [label.squeeze(0).to(torch.int64) for label in labels]  # (H, W) each
        sizes = {tuple(picture.shape[-2:]) for picture in data["pixel_values"]}
        if return_tensors is not None and len(sizes) > 1:
            raise ValueError(
                f"The pictures have {len(sizes)} sizes and cannot be one tensor: process them one by one, or give a "
                'size, for example do_resize=True, size={"height": 512, "width": 512}.'
            )
        return BatchFeature(data=data, tensor_type=return_tensors)

    def _tensors(self, images: list[torch.Tensor], arguments: dict[str, Any]) -> list[torch.Tensor]:
        # The base class returns a BatchFeature; its tensors are wanted, not yet stacked.
        processed = self._preprocess(images, **arguments, return_tensors=None)
        return list(processed["pixel_values"])

    def post_process_semantic_segmentation(
        self,
        outputs: Any,
        target_sizes: Sequence[tuple[int, int]] | torch.Tensor | None = None,
        return_segmentation_scores: bool = False,
    ) -> list[Any]:
        """Turn logits into masks.

        Args:
            outputs: The output of a segmentation model, `logits` (B, K, h, w).
            target_sizes: One (height, width) per picture; None leaves the logits' size.
            return_segmentation_scores: Whether to give the upsampled logits too.

        Returns:
            For each picture a mask (height, width) of class indices; with scores an object with `segmentation` and
            `segmentation_scores` (K, height, width).

        Raises:
            ValueError: If there is not one target size for each picture.
        """
        logits = outputs.logits
        if target_sizes is not None and len(target_sizes) != len(logits):
            raise ValueError(
                f"There are {len(target_sizes)} target_sizes for {len(logits)} pictures: "
                "give one (height, width) for each."
            )
        results: list[Any] = []
        for index, scores in enumerate(logits):
            size = None if target_sizes is None else (int(target_sizes[index][0]), int(target_sizes[index][1]))
            if size is not None and not return_segmentation_scores:
                results.append(upsampled_argmax(scores[None], size, self.align_corners)[0])
                continue
            if size is not None:
                scores = upsample(scores[None].float(), size, self.align_corners)[0]  # (K, height, width)
            mask = scores.argmax(dim=0)
            if return_segmentation_scores:
                results.append(BatchFeature({"segmentation": mask, "segmentation_scores": scores}))
            else:
                results.append(mask)
        return results


def open_image(path: str) -> Image.Image:
    """Open a picture file and decode it, upright.

    Raises:
        ValueError: If the name is a URL, or the file is no readable picture.
        FileNotFoundError: If there is no such file.
    """
    if path.startswith(("http://", "https://")):
        raise ValueError(f"{path} is a URL, which is not fetched unasked: download it and give the file's path.")
    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image)  # decoded, and independent of the file
    except FileNotFoundError as error:
        raise FileNotFoundError(f"There is no picture {path}: check the path.") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} is not a readable picture ({error}): replace or remove the file.") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """Give a picture of any Pillow mode upright and as 8-bit RGB; alpha is dropped.

    Raises:
        ValueError: If floating-point or 32-bit values lie in no known range.
    """
    image = ImageOps.exif_transpose(image)
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        image = Image.fromarray(to_8_bit(np.asarray(image)))
    elif image.mode == "P":
        image = image.convert("RGBA")  # a palette may hold transparency, which a direct conversion warns about
    return image if image.mode == "RGB" else image.convert("RGB")


def to_8_bit(values: np.ndarray) -> np.ndarray:
    """Bring values of a known range (bool, 0 … 1, 0 … 255, 16-bit) to uint8.

    Raises:
        ValueError: If they are not finite, or in no known range.
    """
    if values.dtype == np.bool_:
        return values.astype(np.uint8) * 255
    if values.dtype.kind == "u" and values.dtype.itemsize == 2:  # of either byte order
        return (values.astype(np.uint32) * 255 // 65535).astype(np.uint8)
    if not np.isfinite(values).all():
        raise ValueError("The picture holds NaN or infinite values: give finite pixel values.")
    low, high = float(values.min()), float(values.max())
    if low < 0 or high > 65535:
        raise ValueError(
            f"The picture's values run from {low:g} to {high:g}, a range of unknown meaning: convert it to 8 bit, or "
            "give an array scaled by yourself with do_rescale=False."
        )
    scale = 255.0 if values.dtype.kind == "f" and high <= 1 else 1.0 if high <= 255 else 255 / 65535
    return np.rint(values * scale).astype(np.uint8)


def _with_channel(image: Any) -> Any:
    return image[None] if getattr(image, "ndim", 3) == 2 else image


def _to_byte_range(picture: torch.Tensor) -> torch.Tensor:
    if picture.dtype == torch.uint8:
        return picture
    values = picture.float() if picture.is_floating_point() else picture
    return torch.from_numpy(to_8_bit(values.cpu().numpy())).to(picture.device)


def _check_sizes(pictures: Sequence[torch.Tensor], maps: Sequence[torch.Tensor]) -> None:
    if len(pictures) != len(maps):
        raise ValueError(f"There are {len(maps)} label maps for {len(pictures)} pictures: give one each.")
    for picture, label in zip(pictures, maps, strict=True):
        if label.shape[0] != 1 or (label.is_floating_point() and not torch.equal(label, label.round())):
            raise ValueError(
                f"A label map is a {label.dtype} array with {label.shape[0]} channels, but must hold one class index "
                "per pixel, (height, width): turn colours into indices first."
            )
        if picture.shape[-2:] != label.shape[-2:]:
            raise ValueError(
                f"A label map of size {tuple(label.shape[-2:])} was given for a picture of size "
                f"{tuple(picture.shape[-2:])} (height, width): both must be the same."
            )
