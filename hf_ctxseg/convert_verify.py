"""A converted model against its source on one picture: the source's own code where it is installed, or its logits.

Both get the same `pixel_values`. The measures are the largest difference of the logits in parts of their range, and
the share of pixels on which the arg-max agrees.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

from .checkpoint_source import Source
from .configuration_ctxseg import CtxSegConfig
from .conversion import Conversion
from .conversion_back import smp_arguments
from .convert_mmseg_config import mmseg_preprocessing
from .image_processing_ctxseg import CtxSegImageProcessor
from .modeling_ctxseg import CtxSegForSemanticSegmentation
from .picture_reading import open_image
from .tflite_reader import read_tflite

# Gives logits (1, K, h, w), or class indices (1, h, w), for pixel_values (1, 3, H, W).
Peer = Callable[[torch.Tensor], torch.Tensor]


@dataclass
class Comparison:
    """What was compared and how it came out.

    Args:
        with_what: What the converted model was compared with.
        difference: Largest difference of the logits in parts of their range; None: only classes were compared.
        agreement: Share of pixels with the same arg-max, 0 to 1; None: nothing was compared.
        size: Height and width of the logits that were compared.
    """

    with_what: str
    difference: float | None = None
    agreement: float | None = None
    size: tuple[int, int] | None = None

    def __str__(self) -> str:
        if self.agreement is None or self.size is None:
            return f"not compared: {self.with_what}"
        where = f"at {self.size[0]}×{self.size[1]}"
        logits = "" if self.difference is None else f"largest difference {self.difference:.2g} of the logits' range, "
        return f"with {self.with_what} {where}: {logits}arg-max equal on {100 * self.agreement:.4f} % of the pixels"


def verify_conversion(
    model: CtxSegForSemanticSegmentation,
    processor: CtxSegImageProcessor,
    source: Source,
    picture: str | Path,
    stored: str | Path | None,
    conversion: Conversion,
) -> Comparison:
    """Compare a converted model with its source on a picture.

    Args:
        model: The converted model.
        processor: Its image processor.
        source: What it was converted from.
        picture: File of the picture.
        stored: The source's logits of it as `.npy`, (K, h, w), (1, K, h, w) or (1, h, w, K), or its arg-max map (h, w)
            as `.npy` or `.png`; None: computed by the source's own code.
        conversion: What the converter gave.

    Raises:
        ValueError: If a file cannot be read, or the stored logits have another number of classes.
        FileNotFoundError: If a file is not there.
    """
    image = open_image(picture)
    if source.kind == "tflite":  # takes pictures of one size
        image = image.resize(_tflite_size(source), Image.Resampling.BILINEAR)
    pixels = processor(image, return_tensors="pt")["pixel_values"]
    if stored is not None:
        return compare(model, pixels, _stored(Path(stored), model.config.num_labels), f"stored {Path(stored).name}")
    make = {"torchvision": _torchvision, "smp": _smp, "mmseg": _mmseg, "tflite": _tflite}.get(source.kind)
    package = {"torchvision": "torchvision", "smp": "segmentation_models_pytorch", "mmseg": "mmseg"}.get(source.kind)
    package = "ai_edge_litert" if source.kind == "tflite" else package
    if make is None or package is None:
        return Comparison(f"there is no installable code for {source.kind} here; give its logits with --logits")
    if find_spec(package) is None:
        return Comparison(f"{package} is not installed; give the source's logits with --logits")
    try:
        name, peer = make(source, conversion)
        if source.kind == "smp":  # takes multiples of its output stride only
            height, width = (edge // 32 * 32 for edge in pixels.shape[-2:])
            pixels = pixels[..., :height, :width]
        with torch.inference_mode():
            expected = peer(pixels)
    except Exception as error:  # whatever another code base raises is no fault of the conversion
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        return Comparison(f"{package} does not run this network ({reason})")
    return compare(model, pixels, expected, name)


def compare(
    model: CtxSegForSemanticSegmentation, pixels: torch.Tensor, expected: torch.Tensor, with_what: str
) -> Comparison:
    """Compare the model's logits, brought to the size of what is expected, with it.

    Args:
        model: The converted model.
        pixels: (1, 3, H, W) as its processor makes them.
        expected: Logits (1, K, h, w) or class indices (1, h, w).
        with_what: What is expected.
    """
    with torch.inference_mode():
        logits = model(pixels).logits
    if expected.dim() == 4 and expected.shape[1] == 1:  # one logit, of class 1 against class 0
        expected = torch.cat([torch.zeros_like(expected), expected], dim=1)
    size = (int(expected.shape[-2]), int(expected.shape[-1]))
    if tuple(logits.shape[-2:]) != size:
        logits = F.interpolate(logits, size, mode="bilinear", align_corners=model.config.align_corners)
    indices = expected if expected.dim() == 3 else expected.argmax(dim=1)
    valid = indices != model.config.semantic_loss_ignore_index
    if not valid.any():
        raise ValueError("No pixel of the map to compare with has a class: give another.")
    agreement = (logits.argmax(dim=1) == indices)[valid].double().mean().item()
    difference = None
    if expected.dim() == 4:
        spread = (expected.max() - expected.min()).clamp(min=torch.finfo(torch.float32).tiny)
        difference = ((logits - expected).abs().max() / spread).item()
    return Comparison(with_what, difference, agreement, size)


def _stored(path: Path, classes: int) -> torch.Tensor:
    if path.suffix == ".png":
        with Image.open(path) as picture:
            values = np.asarray(picture)
    else:
        try:
            values = np.load(path, allow_pickle=False)
        except (ValueError, EOFError) as error:
            raise ValueError(f"{path} is no readable .npy file ({error}): save the logits with numpy.save.") from error
    if not isinstance(values, np.ndarray) or values.dtype.kind not in "iuf":
        raise ValueError(f"{path} holds no numbers: save the logits with numpy.save.")
    if not values.size or not np.isfinite(values).all():
        raise ValueError(f"{path} holds no values, or some that are not finite: nothing can be compared with it.")
    if values.ndim == 2:
        return torch.from_numpy(values.astype(np.int64))[None]
    values = values[None] if values.ndim == 3 else values
    if values.ndim == 4 and values.shape[1] != classes and values.shape[3] == classes:
        values = values.transpose(0, 3, 1, 2)
    if values.ndim != 4 or values.shape[:2] != (1, classes):
        raise ValueError(
            f"{path} holds an array of shape {values.shape}, but the logits of one picture are (1, {classes}, h, w), "
            f"({classes}, h, w) or (1, h, w, {classes}), its classes (h, w)."
        )
    return torch.from_numpy(values.astype(np.float32))


def has_published_form(config: CtxSegConfig) -> bool:
    """Whether torchvision's functions build this DeepLabv3: its own strides and rates."""
    stride = 16 if config.backbone.startswith("mobilenet") else 8
    return config.output_stride == stride and list(getattr(config, "effective_rates", ())) == [12, 24, 36]


def _torchvision(source: Source, conversion: Conversion) -> tuple[str, Peer]:
    import torchvision
    from torchvision.models import segmentation

    config = conversion.config
    if not has_published_form(config):
        raise ValueError("torchvision builds its own stride and rates only")
    mobilenet = config.backbone.startswith("mobilenet")
    name = "deeplabv3_mobilenet_v3_large" if mobilenet else f"deeplabv3_{config.backbone}"
    auxiliary = any(key.startswith("aux_classifier.") for key in source.tensors)
    network = getattr(segmentation, name)(
        weights=None, weights_backbone=None, num_classes=len(source.tensors["classifier.4.weight"]), aux_loss=auxiliary
    )
    network.load_state_dict(source.tensors)
    network.eval()
    return f"torchvision {torchvision.__version__}", lambda pixels: network(pixels)["out"]


def _smp(source: Source, conversion: Conversion) -> tuple[str, Peer]:
    import segmentation_models_pytorch as smp

    config = conversion.config
    kind = smp.DeepLabV3Plus if config.model_type.endswith("plus") else smp.DeepLabV3
    classes = len(source.tensors["segmentation_head.0.weight"])
    network = kind(encoder_weights=None, **{**smp_arguments(config), "classes": classes}).eval()
    network.load_state_dict(source.tensors)
    return f"segmentation_models_pytorch {smp.__version__}", network


def _mmseg(source: Source, conversion: Conversion) -> tuple[str, Peer]:
    import mmseg
    from mmseg.registry import MODELS
    from mmseg.utils import register_all_modules

    register_all_modules()
    settings = {key: value for key, value in source.settings["model"].items() if key != "data_preprocessor"}
    network = MODELS.build({**_without_sync(settings), "pretrained": None, "test_cfg": {"mode": "whole"}}).eval()
    network.load_state_dict(source.tensors)
    bgr = mmseg_preprocessing(source.settings)[1]

    def logits(pixels: torch.Tensor) -> torch.Tensor:
        given = pixels.flip(1) if bgr else pixels
        size = tuple(given.shape[-2:])
        return network.encode_decode(given, [{"ori_shape": size, "img_shape": size, "pad_shape": size}])

    return f"mmsegmentation {mmseg.__version__}", logits


def _without_sync(value: Any) -> Any:
    """The settings with plain batch normalisation, which needs no group of processes."""
    if isinstance(value, dict):
        return {key: _without_sync(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_without_sync(item) for item in value)
    return "BN" if value == "SyncBN" else value


def _tflite_size(source: Source) -> tuple[int, int]:
    """Width and height of the pictures that a TensorFlow Lite model takes."""
    graph = read_tflite(source.path)
    _, height, width, _ = graph.tensors[graph.inputs[0]].shape
    return width, height


def _tflite(source: Source, conversion: Conversion) -> tuple[str, Peer]:
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(model_path=str(source.path))
    interpreter.allocate_tensors()
    given, result = interpreter.get_input_details()[0], interpreter.get_output_details()[0]

    def outputs(pixels: torch.Tensor) -> torch.Tensor:
        values = pixels.permute(0, 2, 3, 1).numpy()
        scale, zero = given["quantization"]
        if scale:
            values = np.rint(values / scale + zero)
        interpreter.set_tensor(given["index"], np.ascontiguousarray(values.astype(given["dtype"])))
        interpreter.invoke()
        found = interpreter.get_tensor(result["index"])
        if found.ndim < 4 or found.shape[-1] == 1:  # classes
            return torch.from_numpy(found.astype(np.int64)).reshape(1, *pixels.shape[-2:])
        scale, zero = result["quantization"]
        found = (found.astype(np.float32) - zero) * scale if scale else found
        return torch.from_numpy(found).permute(0, 3, 1, 2)

    return "the TFLite runtime", outputs
