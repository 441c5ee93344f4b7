"""Segment pictures with a trained model: `hf_ctxseg.predict`, and the `Predictor` behind all that predicts."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForSemanticSegmentation, PreTrainedConfig

from .attention import heat_map
from .crf import DenseCRF, as_crf
from .hub_models import model_folder
from .image_processing_ctxseg import CtxSegImageProcessor
from .memory_budget import parse_bytes
from .modeling_ctxseg import CtxSegForSemanticSegmentation
from .prediction import Prediction
from .progress import Progress, terminal_bar
from .registry import MODELS
from .segmenting import Plan, Segmenter, Sink
from .sliding import Blend
from .views import PLAIN, Views
from .visualization import default_palette

__all__ = ["Prediction", "Predictor", "attention_map", "load_run", "predict", "predict_mask"]


class Predictor:
    """A model with its image processor, ready to segment pictures one after another.

    Args:
        model: A run folder, the name of a model on the Hub, or a segmentation model of this package.
        processor: Its image processor; by default the one saved beside the weights, for a model that was never saved
            one that normalises as its backbone was pretrained.
        device: Where to compute; by default a GPU if there is one. A model object stays where it is.
        window: Edge of sliding windows in pixels. By default a picture is segmented as a whole if that fits into the
            memory, else by windows of 1024 pixels, or of half, a quarter … of it where these do not fit either.
        overlap: Share of a window that the next one covers too.
        blend: Weights of overlapping windows: gaussian or constant.
        scales: Factors of the picture's size; the probabilities of several are averaged.
        flip: Whether to segment each mirrored left to right, too, and average.
        memory: What may be taken beside the model and the picture: bytes, or a text such as "2GiB". By default
            pictures up to 4 megapixels (2^22) are segmented as a whole, and others may take 2 GiB, or half of what is
            free where that is less; of a GPU four fifths of what is free. Give more to have larger ones whole.
        crf: What refines the probabilities: a `DenseCRF`, or the name of its preset, such as "deeplabv2".
        progress: Called with the windows looked at and their number; by default a bar, on a terminal only.

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
        memory: int | str | None = None,
        crf: DenseCRF | str | None = None,
        progress: Progress | None = None,
    ) -> None:
        self.views = Views(window, overlap, blend, tuple(scales), flip)
        self.crf = None if crf is None else as_crf(crf)
        self.memory = None if memory is None else parse_bytes(memory)
        self.progress = progress
        if isinstance(model, (str, Path)):
            self.model, saved = load_run(model)
            self.processor = processor or saved
            self._move(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        else:
            self.model = model
            if device is not None:
                self._move(device)
            self.processor = processor or _processor_of(model)
        config = self.model.config
        self.names = tuple(config.id2label[index] for index in range(config.num_labels))
        fits = config.palette is not None and len(config.palette) == config.num_labels
        palette = config.palette if fits else default_palette(config.num_labels)
        self.palette = tuple((int(red), int(green), int(blue)) for red, green, blue in palette)

        self._segmenter = Segmenter(self.model, self.processor, self.views, self.memory, self.crf)

    def _move(self, device: str | torch.device) -> None:
        try:
            self.model.to(device)
        except (RuntimeError, AssertionError) as error:  # the latter of a PyTorch without CUDA
            reason = str(error).splitlines()[0]
            raise ValueError(
                f"device {str(device)!r} cannot be used ({reason}): give cpu, or leave it out."
            ) from error

    def __call__(
        self, image: str | Path | Image.Image | np.ndarray, *, probabilities: bool = False, sink: Sink | None = None
    ) -> Prediction:
        """Segment one picture.

        Args:
            image: A path, a Pillow picture, or an array (H, W), (H, W, 3) or (3, H, W).
            probabilities: Whether to give the probability of each class, float16 (H, W, K), too.
            sink: Called with some rows and their probabilities (rows, K, W), from the top down; the tensor is
                overwritten afterwards.

        Raises:
            ValueError: If the picture cannot be read, the memory does not suffice, or both a sink and probabilities
                are asked for.
            FileNotFoundError: If there is no such picture.
        """
        if probabilities and sink is not None:
            raise ValueError("Probabilities go to the sink, or into the result: leave out probabilities, or the sink.")
        picture = self.open(image)
        plan = self.plan(picture)
        kept: np.ndarray | None = None
        if probabilities:
            kept = np.empty((picture.height, picture.width, len(self.names)), np.float16)
            sink = _into(kept)
        with terminal_bar(self.progress) as progress:
            mask = self._segmenter.mask(picture, plan.views, sink, progress)
        return self._prediction(mask, picture, plan, kept)

    def plan(self, picture: Image.Image) -> Plan:
        """Choose how a picture is looked at: as a whole, or by windows and why.

        Raises:
            ValueError: If the memory does not suffice.
        """
        return self._segmenter.plan(*picture.size)

    def several(self, pictures: Sequence[Image.Image]) -> list[Prediction]:
        """Segment several RGB pictures of one size, in one forward pass where the memory takes all as wholes."""
        plan = self.plan(pictures[0])
        together = len(pictures) > 1 and self.crf is None and plan.views.window is None
        if not together or not self._segmenter.allows(sum(each.width * each.height for each in pictures)):
            return [self(picture) for picture in pictures]
        masks = self._segmenter.masks(pictures, plan.views)
        return [self._prediction(mask, each, plan) for mask, each in zip(masks, pictures, strict=True)]

    def _prediction(
        self, mask: np.ndarray, picture: Image.Image, plan: Plan, probabilities: np.ndarray | None = None
    ) -> Prediction:
        return Prediction(mask, self.names, self.palette, picture, plan.describe(), probabilities)

    def attention(self, image: str | Path | Image.Image | np.ndarray, query: tuple[int, int]) -> np.ndarray:
        """Give the attention weights (H, W) of the pixel `query` (x, y); see `attention_map`."""
        return heat_map(self.model, self.processor, self.open(image), query)

    def open(self, image: str | Path | Image.Image | np.ndarray) -> Image.Image:
        """Read a picture: upright, RGB."""
        return self.processor.picture(image)


def _into(kept: np.ndarray) -> Sink:
    def sink(rows: slice, values: torch.Tensor) -> None:
        kept[rows] = values.transpose(1, 2).half().cpu().numpy()

    return sink


def predict(
    model: str | Path | CtxSegForSemanticSegmentation,
    image: str | Path | Image.Image | np.ndarray,
    processor: CtxSegImageProcessor | None = None,
    device: str | torch.device | None = None,
    *,
    probabilities: bool = False,
    **options: Any,
) -> Prediction:
    """Segment one picture; for many, make a `Predictor` once.

    Args:
        model: A run folder, the name of a model on the Hub, or a segmentation model of this package.
        image: A path, a Pillow picture, or an array (H, W), (H, W, 3) or (3, H, W).
        processor: The image processor; by default the model's own.
        device: Where to compute; by default a GPU if there is one.
        probabilities: Whether to give the probability of each class, too.
        **options: `window`, `overlap`, `blend`, `scales`, `flip`, `memory`, `crf` and `progress` of `Predictor`.

    Returns:
        An object with `mask` (H, W), `overlay` (a picture with legend) and `areas` (share by class name).

    Raises:
        ValueError: If the model or the picture cannot be read, or an option is out of range.
        FileNotFoundError: If there is no such picture.
    """
    return Predictor(model, processor, device, **options)(image, probabilities=probabilities)


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
    """Segment one RGB picture, the model in evaluation mode: class indices (H, W) at its own size."""
    return Segmenter(model, processor, views).mask(picture, views)


def _processor_of(model: CtxSegForSemanticSegmentation) -> CtxSegImageProcessor:
    if model.name_or_path:
        try:
            return AutoImageProcessor.from_pretrained(model.name_or_path, trust_remote_code=False)
        except OSError:  # built from a config of that name, not saved there
            pass
    return CtxSegImageProcessor.for_backbone(model.config.backbone, align_corners=model.config.align_corners)


def load_run(name: str | Path) -> tuple[CtxSegForSemanticSegmentation, CtxSegImageProcessor]:
    """Open a run folder or a model of the Hub: model in evaluation mode, and its image processor.

    Args:
        name: A folder, `namespace/name` or `namespace/name@revision`. Code in a repository is never run.

    Raises:
        ValueError: If it is not a finished segmentation model of this package.
        FileNotFoundError, PermissionError, ConnectionError: As `hub_models.model_folder` raises them.
    """
    folder = model_folder(name)
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"{name} holds no finished model: continue its training with --resume, or give another folder."
        )
    try:
        kind = PreTrainedConfig.get_config_dict(str(folder))[0].get("model_type")
        if kind not in {config_class.model_type for config_class, _, _ in MODELS}:
            raise ValueError(f"its type is {kind!r}, which is none of this package.")
        model, loaded = AutoModelForSemanticSegmentation.from_pretrained(
            str(folder), use_safetensors=True, output_loading_info=True, trust_remote_code=False
        )
        processor = AutoImageProcessor.from_pretrained(str(folder), trust_remote_code=False)
    except OSError as error:
        raise ValueError(
            f"{name} holds no finished model ({str(error).splitlines()[0]}): give the folder that training wrote, or "
            "org/name."
        ) from error
    except (ValueError, RuntimeError) as error:  # a foreign or torn file
        raise ValueError(f"{name} is no readable model: {str(error).splitlines()[0]}") from error
    if not isinstance(model, CtxSegForSemanticSegmentation):
        raise ValueError(f"{name} holds a {type(model).__name__}, which is not a model of this package.")
    if loaded["missing_keys"]:
        first = ", ".join(sorted(loaded["missing_keys"])[:3])
        raise ValueError(f"{name} lacks {len(loaded['missing_keys'])} tensors (first: {first}): train it first.")
    return model, processor
