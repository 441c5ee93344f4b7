"""Segment pictures with a trained model: `hf_ctxseg.predict`, and what `ctxseg predict` does for files."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForSemanticSegmentation

from .attention import attention_picture, check_has_block, heat_map
from .image_processing_ctxseg import CtxSegImageProcessor, open_image, to_8_bit, to_rgb
from .modeling_ctxseg import CtxSegForSemanticSegmentation
from .sliding import Blend
from .views import PLAIN, Views, segment, view_maps
from .visualization import default_palette, mask_to_image, overlay, with_legend

IMAGE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")


@dataclass
class Prediction:
    """The segmentation of one picture.

    Args:
        mask: Class index of each pixel, (H, W) of the picture's own size.
        names: Name of each class.
        palette: Colour of each class.
        picture: The picture, upright and RGB.
    """

    mask: np.ndarray
    names: tuple[str, ...]
    palette: tuple[tuple[int, int, int], ...]
    picture: Image.Image = field(repr=False)

    @property
    def areas(self) -> dict[str, float]:
        """Share of the picture, 0 to 1, of each class that occurs, the largest first."""
        counts = np.bincount(self.mask.ravel(), minlength=len(self.names))
        order = [int(index) for index in np.argsort(-counts, kind="stable") if counts[index]]
        return {self.names[index]: float(counts[index]) / self.mask.size for index in order}

    @property
    def overlay(self) -> Image.Image:
        """The classes laid over the picture, with a legend."""
        return with_legend(overlay(self.picture, self.mask, self.palette), self.mask, self.names, self.palette)

    @property
    def mask_image(self) -> Image.Image:
        """The mask as an indexed picture with the palette: pixel values are class indices."""
        return mask_to_image(self.mask, self.palette)


class Predictor:
    """A model with its image processor, ready to segment pictures one after another.

    Args:
        model: A run folder, the name of a model on the Hub, or a segmentation model of this package.
        processor: Its image processor; by default the one saved beside the weights, for a model that was never saved
            one that normalises as its backbone was pretrained.
        device: Where to compute; by default a GPU if there is one. A model object stays where it is.
        window: Edge of sliding windows in pixels; None segments the whole picture at once.
        overlap: Share of a window that the next one covers too.
        blend: Weights of overlapping windows: gaussian or constant.
        scales: Factors of the picture's size; the probabilities of several are averaged.
        flip: Whether to segment each mirrored left to right, too, and average.

    Raises:
        ValueError: If the model cannot be found or is no segmentation model of this package, or an option is out of
            range.
    """

    def __init__(
        self,
        model: str | Path | CtxSegForSemanticSegmentation,
        processor: CtxSegImageProcessor | None = None,
        device: str | torch.device | None = None,
        *,
        window: int | None = None,
        overlap: float = 0.5,
        blend: Blend = "gaussian",
        scales: Sequence[float] = (1.0,),
        flip: bool = False,
    ) -> None:
        self.views = Views(window, overlap, blend, tuple(scales), flip)
        if isinstance(model, (str, Path)):
            self.model, saved = load_run(model)
            self.processor = processor or saved
            self.model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        else:
            self.model = model if device is None else model.to(device)
            self.processor = processor or _processor_of(model)
        config = self.model.config
        self.names = tuple(config.id2label[index] for index in range(config.num_labels))
        fits = config.palette is not None and len(config.palette) == config.num_labels
        palette = config.palette if fits else default_palette(config.num_labels)
        self.palette = tuple((int(red), int(green), int(blue)) for red, green, blue in palette)

    def __call__(self, image: str | Path | Image.Image | np.ndarray) -> Prediction:
        """Segment one picture: a path, a Pillow picture, or an array (H, W), (H, W, 3) or (3, H, W)."""
        picture = self._open(image)
        mask = predict_mask(self.model, self.processor, picture, self.views)
        return Prediction(mask, self.names, self.palette, picture)

    def attention(self, image: str | Path | Image.Image | np.ndarray, query: tuple[int, int]) -> np.ndarray:
        """Give the attention weights (H, W) of the pixel `query` (x, y); see `attention_map`."""
        return heat_map(self.model, self.processor, self._open(image), query)

    def _open(self, image: str | Path | Image.Image | np.ndarray) -> Image.Image:
        if isinstance(image, (str, Path)):
            image = open_image(str(image))
        if isinstance(image, np.ndarray):
            pixels = self.processor.process_image(image, do_convert_rgb=True)  # (3, H, W)
            image = Image.fromarray(to_8_bit(pixels.permute(1, 2, 0).numpy()))
        return to_rgb(image)


def predict(
    model: str | Path | CtxSegForSemanticSegmentation,
    image: str | Path | Image.Image | np.ndarray,
    processor: CtxSegImageProcessor | None = None,
    device: str | torch.device | None = None,
    **views: Any,
) -> Prediction:
    """Segment one picture; for many, make a `Predictor` once.

    Args:
        model: A run folder, the name of a model on the Hub, or a segmentation model of this package.
        image: A path, a Pillow picture, or an array (H, W), (H, W, 3) or (3, H, W).
        processor: The image processor; by default the model's own.
        device: Where to compute; by default a GPU if there is one.
        **views: `window`, `overlap`, `blend`, `scales` and `flip` of `Predictor`.

    Returns:
        An object with `mask` (H, W), `overlay` (a picture with legend) and `areas` (share by class name).

    Raises:
        ValueError: If the model or the picture cannot be read, or an option is out of range.
        FileNotFoundError: If there is no such picture.
    """
    return Predictor(model, processor, device, **views)(image)


def attention_map(
    model: str | Path | CtxSegForSemanticSegmentation,
    image: str | Path | Image.Image | np.ndarray,
    query: tuple[int, int],
    processor: CtxSegImageProcessor | None = None,
    device: str | torch.device | None = None,
) -> np.ndarray:
    """Show what weights a model's last non-local block gives to the parts of a picture, seen from one pixel.

    Args:
        model: A run folder, the name of a model on the Hub, or a segmentation model of this package, in any case with
            a non-local block: in its head, after its ASPP or in its backbone.
        image: A path, a Pillow picture, or an array (H, W), (H, W, 3) or (3, H, W).
        query: The pixel (x to the right, y down), counted from 0.
        processor: The image processor; by default the model's own.
        device: Where to compute; by default a GPU if there is one.

    Returns:
        float32 (H, W) of the picture's size: weights of the block's keys, interpolated. Softmax modes give shares of
        1, `dot_product` gives any sign, `concatenation` values from 0.

    Raises:
        ValueError: If the model or the picture cannot be read, the model has no non-local block, or the pixel lies
            outside the picture.
        FileNotFoundError: If there is no such picture.
    """
    return Predictor(model, processor, device).attention(image, query)


def predict_mask(
    model: CtxSegForSemanticSegmentation,
    processor: CtxSegImageProcessor,
    picture: Image.Image,
    views: Views = PLAIN,
) -> np.ndarray:
    """Segment one RGB picture: class indices (H, W) at its own size, the model in evaluation mode."""
    was_training = model.training
    model.eval()

    def forward(pixels: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = model(pixels.to(model.device, model.dtype)).logits
        return logits

    pixels = processor(images=picture, return_tensors="pt")["pixel_values"]
    with torch.inference_mode():
        maps = view_maps(forward, pixels, views, model.config.output_stride)
        mask = segment(maps, (picture.height, picture.width), processor.align_corners)[0]
    model.train(was_training)
    return mask.cpu().numpy()


def _processor_of(model: CtxSegForSemanticSegmentation) -> CtxSegImageProcessor:
    if model.name_or_path:
        try:
            return AutoImageProcessor.from_pretrained(model.name_or_path)
        except OSError:  # built from a config of that name, not saved there
            pass
    return CtxSegImageProcessor.for_backbone(model.config.backbone, align_corners=model.config.align_corners)


def load_run(name: str | Path) -> tuple[CtxSegForSemanticSegmentation, CtxSegImageProcessor]:
    """Open a run folder or a model of the Hub: model in evaluation mode, and its image processor.

    Raises:
        ValueError: If it is not there, or not a segmentation model of this package.
    """
    if Path(name).is_dir() and not (Path(name) / "config.json").is_file():
        raise ValueError(
            f"{name} holds no finished model: continue its training with --resume, or give another folder."
        )
    try:
        model, loaded = AutoModelForSemanticSegmentation.from_pretrained(
            str(name), use_safetensors=True, output_loading_info=True
        )
        processor = AutoImageProcessor.from_pretrained(str(name))
    except OSError as error:
        what = "holds no finished model" if Path(name).is_dir() else "is neither a run folder nor a model on the Hub"
        raise ValueError(
            f"{name} {what} ({str(error).splitlines()[0]}): give the folder that training wrote, or org/name."
        ) from error
    except (ValueError, RuntimeError) as error:  # a foreign or torn file
        raise ValueError(f"{name} is no readable model: {str(error).splitlines()[0]}") from error
    if not isinstance(model, CtxSegForSemanticSegmentation):
        raise ValueError(f"{name} holds a {type(model).__name__}, which is not a model of this package.")
    if loaded["missing_keys"]:
        first = ", ".join(sorted(loaded["missing_keys"])[:3])
        raise ValueError(f"{name} lacks {len(loaded['missing_keys'])} tensors (first: {first}): train it first.")
    return model, processor


def find_pictures(inputs: Sequence[str | Path]) -> Iterator[tuple[Path, Path]]:
    """List picture files with the name under which their results are written.

    Args:
        inputs: Files, and folders that are searched through; a folder's structure is kept.

    Raises:
        FileNotFoundError: If one does not exist.
        ValueError: If a folder holds no picture.
    """
    for item in map(Path, inputs):
        if item.is_dir():
            named = (path for path in item.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
            found = sorted(path for path in named if not path.is_dir())
            if not found:
                raise ValueError(f"{item} holds no picture ({', '.join(IMAGE_SUFFIXES)}): give another folder.")
            yield from ((path, path.relative_to(item)) for path in found)
        elif item.is_file():
            yield item, Path(item.name)
        else:
            raise FileNotFoundError(f"There is no picture or folder {item}: check the path.")


def predict_files(
    predictor: Predictor, inputs: Sequence[str | Path], out: Path, query: tuple[int, int] | None = None
) -> tuple[list[Path], list[str]]:
    """Segment picture files; each gives `<name>_mask.png` (class indices) and `<name>_overlay.png` (with legend).

    Args:
        predictor: The model.
        inputs: Files and folders.
        out: Folder for the results.
        query: A pixel (x, y) whose attention weights are drawn too, as `<name>_attention.png`.

    Returns:
        The overlays written, and one sentence for each picture that could not be read.

    Raises:
        ValueError: If a query is given and the model has no non-local block.
    """
    if query is not None:
        check_has_block(predictor.model)
    # an earlier call's results may lie in a folder below the pictures
    pictures = [pair for pair in find_pictures(inputs) if out.resolve() not in pair[0].resolve().parents]
    written: list[Path] = []
    failed: list[str] = []
    taken: set[Path] = set()
    for path, name in pictures:
        stem = _free_stem(name, taken)
        taken.add(stem)
        try:
            prediction = predictor(path)
            weights = None if query is None else predictor.attention(prediction.picture, query)
        except (ValueError, OSError) as error:
            failed.append(str(error) if str(path) in str(error) else f"{path}: {error}")
            continue
        target = out / stem
        target.parent.mkdir(parents=True, exist_ok=True)
        prediction.mask_image.save(target.with_name(f"{stem.name}_mask.png"))
        written.append(target.with_name(f"{stem.name}_overlay.png"))
        prediction.overlay.save(written[-1])
        if query is not None and weights is not None:
            attention_picture(prediction.picture, weights, query).save(target.with_name(f"{stem.name}_attention.png"))
    return written, failed


def _free_stem(name: Path, taken: set[Path]) -> Path:
    # a.jpg and a.png side by side: the second becomes a_png, a third of the name a_png_2
    stem = name.with_suffix("")
    second = f"{stem.name}_{name.suffix[1:]}"
    numbered = (stem.with_name(f"{second}_{number}") for number in count(2))
    return next(path for path in chain([stem, stem.with_name(second)], numbered) if path not in taken)
