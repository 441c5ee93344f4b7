"""Any picture to `pixel_values` (and `labels`), and logits to masks at the picture's own size.

The processor is saved beside the weights, so that the normalisation the backbone was trained with travels with them.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as tvF
from transformers.image_processing_backends import TorchvisionBackend
from transformers.image_processing_utils import BatchFeature
from transformers.image_utils import ChannelDimension, ImageInput, PILImageResampling
from transformers.processing_utils import ImagesKwargs, Unpack
from typing_extensions import Self

from .crf import DenseCRF, as_crf
from .picture_reading import open_stored, stored_to_rgb, to_8_bit, turned_upright
from .upsampling import upsample, upsampled_argmax

_CHANNELS = (1, 3, 4)
_ENCODED = (str, Path, bytes, bytearray, memoryview, Mapping)


class CtxSegImageProcessorKwargs(ImagesKwargs, total=False):  # type: ignore[call-arg]
    """Arguments of the image processor beside transformers' own.

    align_corners (`bool`, *optional*, defaults to `self.align_corners`):
        How logits are upsampled to the picture's size; the model's config has the same field.
    do_exif_transpose (`bool`, *optional*, defaults to `self.do_exif_transpose`):
        Whether pictures and label maps are turned upright as their EXIF data ask; TIFF files always are, by Pillow.
    """

    align_corners: bool
    do_exif_transpose: bool


class CtxSegImageProcessor(TorchvisionBackend):
    """Image processor of every model of the package.

    Pictures of any Pillow mode become 8-bit RGB: alpha is dropped, 16-bit and floating-point values are brought to
    0 … 255, an EXIF rotation is applied, a file of several frames gives its first. They come as path, encoded bytes,
    open file, `{"bytes": …, "path": …}`, Pillow picture, array or tensor. An array's shape that can be read in two
    ways, such as (3, 5, 3), has its channels last, a tensor's first; `input_data_format` says otherwise. By default
    they keep their size; `size={"max_height": n, "max_width": n}` with `do_resize=True` scales them to fit.

    Args:
        image_mean: Mean of each channel after rescaling.
        image_std: Standard deviation of each channel after rescaling.
        do_resize: Whether pictures are resized to `size`.
        size: Target size, in transformers' forms.
        align_corners: How logits are upsampled.
        do_exif_transpose: Whether pictures are turned upright; TIFF files always are, by Pillow.
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
    do_exif_transpose = True

    def __init__(self, **kwargs: Unpack[CtxSegImageProcessorKwargs]) -> None:
        if not type(self).__module__.startswith("transformers_modules."):
            kwargs.pop("auto_map", None)  # names code, which is not saved again
        super().__init__(**kwargs)

    @classmethod
    def for_backbone(cls, backbone: str, **kwargs: Any) -> Self:
        """Make a processor with the mean and standard deviation that a timm backbone was pretrained with."""
        pretrained = timm.get_pretrained_cfg(backbone, allow_unregistered=True)
        if pretrained is not None:
            kwargs.setdefault("image_mean", list(pretrained.mean))
            kwargs.setdefault("image_std", list(pretrained.std))
        return cls(**kwargs)

    def fetch_images(self, image_url_or_urls: Any, upright: bool = False) -> Any:
        """Open paths, encoded bytes, files and cells of data sets, and turn Pillow pictures; URLs are not fetched."""
        if isinstance(image_url_or_urls, (list, tuple)):
            return [self.fetch_images(image, upright) for image in image_url_or_urls]
        if isinstance(image_url_or_urls, np.ndarray | torch.Tensor):
            return image_url_or_urls
        if not isinstance(image_url_or_urls, Image.Image):
            if not isinstance(image_url_or_urls, _ENCODED) and not hasattr(image_url_or_urls, "read"):
                raise ValueError(
                    f"{type(image_url_or_urls).__name__} is no picture: give a path, encoded bytes, an open file, a "
                    "Pillow picture, or an array or tensor (H, W), (H, W, channels) or (channels, H, W)."
                )
            return open_stored(image_url_or_urls, turned_upright if upright else _as_stored)
        return turned_upright(image_url_or_urls) if upright else image_url_or_urls

    def process_image(
        self,
        image: ImageInput,
        do_convert_rgb: bool | None = None,
        input_data_format: str | ChannelDimension | None = None,
        device: torch.device | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Give one picture as a tensor (C, H, W); pictures, unlike label maps, come as `do_convert_rgb=True`."""
        if isinstance(image, np.ndarray):
            image = _plain_array(image)
        if not do_convert_rgb:
            tensor: torch.Tensor = super().process_image(
                image, do_convert_rgb=False, input_data_format=input_data_format, device=device
            )
            return tensor
        channels_last = not isinstance(image, torch.Tensor)
        if isinstance(image, Image.Image):
            image, input_data_format = np.array(stored_to_rgb(image)), ChannelDimension.LAST
        tensor = torch.from_numpy(image) if isinstance(image, np.ndarray) else image.detach()
        if tensor.is_complex():
            raise ValueError(f"The picture is a tensor of {tensor.dtype}: give whole or floating-point numbers.")
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise ValueError("The picture holds NaN or infinite values: give finite pixel values.")
        if tensor.dtype in (torch.bool, torch.uint16):
            tensor = _to_byte_range(tensor)
        tensor = _channels_first(tensor, input_data_format, channels_last)
        tensor = tensor.expand(3, -1, -1) if tensor.shape[0] == 1 else tensor[:3]  # (3, H, W), without alpha
        return tensor.contiguous().to(device)

    def picture(self, image: Any) -> Image.Image:
        """Give one picture, of any form that the processor takes, as 8-bit RGB at its own size and upright.

        Raises:
            ValueError: If it cannot be read, or is not one picture.
        """
        images = self._prepare_images_structure(self.fetch_images(image, self.do_exif_transpose))
        if len(images) != 1:
            raise ValueError(f"{len(images)} pictures were given where one is expected: give one after the other.")
        if isinstance(images[0], Image.Image):
            return stored_to_rgb(images[0])
        pixels = _to_byte_range(self.process_image(images[0], do_convert_rgb=True))  # (3, H, W)
        return Image.fromarray(np.ascontiguousarray(pixels.permute(1, 2, 0).cpu().numpy()))

    def _prepare_images_structure(self, images: Any, expected_ndims: int = 3) -> Any:
        images = self.fetch_images(images)
        if expected_ndims != 3:  # label maps
            return super()._prepare_images_structure(images, expected_ndims)
        flat = _flattened(images)
        if not flat:
            raise ValueError("The list of pictures is empty: give at least one.")
        return flat

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
        do_exif_transpose: bool,
        return_tensors: Any = None,
        device: Any = None,
        **kwargs: Any,
    ) -> BatchFeature:
        kwargs.pop("align_corners", None)
        pictures = self._prepare_image_like_inputs(
            images=self.fetch_images(images, do_exif_transpose),
            do_convert_rgb=do_convert_rgb,
            input_data_format=input_data_format,
            device=device,
        )
        if kwargs.get("do_rescale"):
            pictures = [_to_byte_range(picture) for picture in pictures]
        data = {"pixel_values": self._tensors(pictures, kwargs)}
        if segmentation_maps is not None:
            maps = self._prepare_image_like_inputs(
                images=self.fetch_images(segmentation_maps, do_exif_transpose),
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
        crf: DenseCRF | str | None = None,
        images: ImageInput | None = None,
    ) -> list[Any]:
        """Turn logits into masks.

        Args:
            outputs: The output of a segmentation model, `logits` (B, K, h, w).
            target_sizes: One (height, width) per picture; None leaves the logits' size, with a CRF the pictures'.
            return_segmentation_scores: Whether to give the upsampled logits too, with a CRF its probabilities.
            crf: A `DenseCRF`, or the name of one's parameters ("deeplabv2"), that refines the masks.
            images: The pictures themselves, as the processor takes them, for the CRF.

        Returns:
            For each picture a mask (height, width) of class indices; with scores an object with `segmentation` and
            `segmentation_scores` (K, height, width).

        Raises:
            ValueError: If there is not one target size for each picture; with a CRF, if there is not one picture for
                each, or one is not of its target size.
        """
        logits = outputs.logits
        refine = None if crf is None else as_crf(crf)
        pictures = [] if refine is None else self._pictures(images, len(logits))
        if refine is not None and target_sizes is None:
            target_sizes = [(picture.shape[1], picture.shape[2]) for picture in pictures]
        if target_sizes is not None and len(target_sizes) != len(logits):
            raise ValueError(
                f"There are {len(target_sizes)} target_sizes for {len(logits)} pictures: "
                "give one (height, width) for each."
            )
        results: list[Any] = []
        for index, scores in enumerate(logits):
            size = None if target_sizes is None else (int(target_sizes[index][0]), int(target_sizes[index][1]))
            if size is not None and refine is None and not return_segmentation_scores:
                results.append(upsampled_argmax(scores[None], size, self.align_corners)[0])
                continue
            if size is not None:
                scores = upsample(scores[None].float(), size, self.align_corners)[0]  # (K, height, width)
            if refine is not None:
                scores = refine(scores.softmax(dim=0)[None], pictures[index][None])[0]
            mask = scores.argmax(dim=0)
            if return_segmentation_scores:
                results.append(BatchFeature({"segmentation": mask, "segmentation_scores": scores}))
            else:
                results.append(mask)
        return results

    def _pictures(self, images: ImageInput | None, count: int) -> list[torch.Tensor]:
        """Pictures in RGB for a CRF, uint8 (3, H, W) each."""
        given = [] if images is None else [self.picture(image) for image in _flattened(images)]
        if len(given) != count:
            raise ValueError(
                f"There are {len(given)} images for the logits of {count} pictures, but a CRF looks at the pictures "
                "themselves: give images=[…], as many."
            )
        return [tvF.pil_to_tensor(picture) for picture in given]


def _as_stored(image: Image.Image) -> Image.Image:
    return image


def _flattened(images: Any) -> list[Any]:
    """Single pictures out of lists, of lists of lists, and of arrays of several."""
    if isinstance(images, (list, tuple)):
        return [picture for image in images for picture in _flattened(image)]
    return list(images) if getattr(images, "ndim", 3) == 4 else [images]


def _plain_array(array: np.ndarray) -> np.ndarray:
    """Give an array of numbers that torch takes: of this machine's byte order, writable, with positive strides."""
    if array.dtype.kind not in "biuf" or array.dtype.itemsize > 8:
        raise ValueError(f"The picture is an array of {array.dtype}: give whole or floating-point numbers.")
    plain = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("="))
    return plain if plain.flags.writeable and min(plain.strides, default=0) >= 0 else plain.copy()


def _channels_first(
    picture: torch.Tensor, input_data_format: str | ChannelDimension | None, channels_last: bool
) -> torch.Tensor:
    """Give a picture as (channels, H, W); where its shape can be read in both ways, `channels_last` says which."""
    if picture.dim() == 2:
        picture, input_data_format = picture[None], ChannelDimension.FIRST
    shape = tuple(picture.shape)
    if input_data_format is not None and len(shape) == 3:
        channels_last = input_data_format == ChannelDimension.LAST
    elif len(shape) == 3 and (shape[0] in _CHANNELS) != (shape[2] in _CHANNELS):
        channels_last = shape[2] in _CHANNELS
    if len(shape) != 3 or shape[2 if channels_last else 0] not in _CHANNELS or picture.numel() == 0:
        raise ValueError(
            f"A picture of shape {shape} was given, but (H, W), (H, W, channels) or (channels, H, W) with 1, 3 or 4 "
            "channels and at least one pixel is expected."
        )
    return picture.permute(2, 0, 1) if channels_last else picture


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
