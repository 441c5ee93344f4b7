"""Models by name: the combinations of head and backbone that papers and well-known code bases report.

A preset holds the fields of its head's configuration that make it, and where the combination is reported. Every
registered head is a preset too, of its defaults.
"""

import copy
import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from .configuration_ctxseg import NONLOCAL_MODES, CtxSegConfig
from .registry import MODELS, find_head, head_name


@dataclass(frozen=True)
class Preset:
    """A model with a name.

    Attributes:
        name: What users type.
        head: Name of its registered head.
        fields: The fields of its configuration that are stated; the others are the head's defaults.
        reported: Paper and section, or code base, that report the combination; empty for a head with its defaults.
    """

    name: str
    head: str
    fields: Mapping[str, Any]
    reported: str


_V1, _V2 = "arXiv 1412.7062, section 5", "arXiv 1606.00915, section"
_V3, _V3PLUS = "arXiv 1706.05587", "arXiv 1802.02611"
_NONLOCAL = "arXiv 1711.07971"

# Trained at output stride 16, evaluated at 8: from_pretrained(…, output_stride=8).
_MULTI_GRID = {"multi_grid": [1, 2, 4], "output_stride": 16}
_RESNET_V2 = {"backbone": "resnet101", "output_stride": 8, "input_scales": [0.5, 0.75, 1.0]}
# The papers' VGG-16 cannot dilate in timm: its form of the head stands on ResNet-101.
_VGG_FORM = {"backbone": "resnet101", "output_stride": 8, "branch_channels": 1024}
_IN_PLACE = "(there on VGG-16, which cannot dilate in timm)"
_MMSEG = {"output_stride": 8, "use_auxiliary_head": True}
# Its MobileNetV2 dilates the first block of a stage alone; here the whole stage is dilated, as for every backbone.
_MMSEG_HEAD = {"variant": "mmseg", **_MMSEG}
_TORCHVISION = {
    "variant": "torchvision",
    "output_stride": 8,
    "use_auxiliary_head": True,
    "auxiliary_loss_weight": 0.5,
}
# Its rates are those of output stride 8, at 16; its own auxiliary classifier looks at a map that ours does not take.
_TORCHVISION_MOBILE = {
    "variant": "torchvision",
    "backbone": "mobilenetv3_large_100",
    "backbone_kwargs": {"bn_eps": 1e-3, "bn_momentum": 0.01},
    "dilate_first_block": True,
    "output_stride": 16,
    "atrous_rates": [12, 24, 36],
}

_DEEPLAB_V1_V2 = (
    Preset("deeplabv1-largefov", "deeplabv2", {**_VGG_FORM, "atrous_rates": [12]}, f"{_V1} {_IN_PLACE}"),
    Preset("deeplabv2-aspp-s", "deeplabv2", {**_VGG_FORM, "atrous_rates": [2, 4, 8, 12]}, f"{_V2} 3.2 {_IN_PLACE}"),
    Preset("deeplabv2-aspp-l", "deeplabv2", {**_VGG_FORM, "atrous_rates": [6, 12, 18, 24]}, f"{_V2} 3.2 {_IN_PLACE}"),
    Preset(
        "deeplabv2-resnet101-largefov",
        "deeplabv2",
        {**_RESNET_V2, "atrous_rates": [12]},
        f"{_V2} 4.1, VOC 2012",
    ),
    Preset(
        "deeplabv2-resnet101", "deeplabv2", {**_RESNET_V2, "atrous_rates": [6, 12, 18, 24]}, f"{_V2} 4.1, VOC 2012"
    ),
)

_DEEPLAB_V3 = (
    Preset("deeplabv3-aspp", "deeplabv3", {"backbone": "resnet101", **_MULTI_GRID}, f"{_V3}, table 5, VOC 2012"),
    Preset(
        "deeplabv3-resnet50",
        "deeplabv3",
        {"backbone": "resnet50", **_MULTI_GRID},
        f"{_V3}, table 5 (there ResNet-101)",
    ),
    Preset("deeplabv3-resnet101", "deeplabv3", {"backbone": "resnet101", **_MULTI_GRID}, "the same as deeplabv3-aspp"),
    Preset(
        "deeplabv3-mobilenetv2",
        "deeplabv3",
        {"backbone": "mobilenetv2_100", "output_stride": 16, "atrous_rates": []},
        "arXiv 1801.04381, section 6.3, VOC 2012",
    ),
    Preset(
        "deeplabv3-resnet50-torchvision",
        "deeplabv3",
        {"backbone": "resnet50", **_TORCHVISION},
        "torchvision deeplabv3_resnet50, COCO",
    ),
    Preset(
        "deeplabv3-resnet101-torchvision",
        "deeplabv3",
        {"backbone": "resnet101", **_TORCHVISION},
        "torchvision deeplabv3_resnet101, COCO",
    ),
    Preset(
        "deeplabv3-mobilenetv3-torchvision",
        "deeplabv3",
        _TORCHVISION_MOBILE,
        "torchvision deeplabv3_mobilenet_v3_large, COCO",
    ),
    Preset(
        "deeplabv3-resnet50-mmseg",
        "deeplabv3",
        {"backbone": "resnet50c", **_MMSEG_HEAD},
        "mmsegmentation deeplabv3_r50-d8, Cityscapes, ADE20K, VOC 2012",
    ),
    Preset(
        "deeplabv3-resnet101-mmseg",
        "deeplabv3",
        {"backbone": "resnet101c", **_MMSEG_HEAD},
        "mmsegmentation deeplabv3_r101-d8, Cityscapes, ADE20K, VOC 2012",
    ),
    Preset(
        "deeplabv3-mobilenetv2-mmseg",
        "deeplabv3",
        {"backbone": "mobilenetv2_100", **_MMSEG_HEAD},
        "mmsegmentation mobilenet-v2-d8_deeplabv3, Cityscapes, ADE20K",
    ),
)

_DEEPLAB_V3PLUS = (
    Preset(
        "deeplabv3plus-resnet50",
        "deeplabv3plus",
        {"backbone": "resnet50", **_MULTI_GRID},
        f"{_V3PLUS}, section 4.2 (there ResNet-101)",
    ),
    Preset(
        "deeplabv3plus-resnet101",
        "deeplabv3plus",
        {"backbone": "resnet101", **_MULTI_GRID},
        f"{_V3PLUS}, section 4.2, VOC 2012",
    ),
    Preset(
        "deeplabv3plus-xception41",
        "deeplabv3plus",
        {"backbone": "xception41", "output_stride": 16},
        f"{_V3PLUS}, section 4.3 (there Xception-65)",
    ),
    Preset(
        "deeplabv3plus-xception65",
        "deeplabv3plus",
        {"backbone": "xception65", "output_stride": 16},
        f"{_V3PLUS}, section 4.3, VOC 2012",
    ),
    # Image-level features lowered the score on Cityscapes.
    Preset(
        "deeplabv3plus-xception71",
        "deeplabv3plus",
        {"backbone": "xception71", "output_stride": 16, "use_image_pooling": False},
        f"{_V3PLUS}, results on Cityscapes",
    ),
    Preset(
        "deeplabv3plus-mobilenetv2",
        "deeplabv3plus",
        {"backbone": "mobilenetv2_100", "output_stride": 16},
        f"{_V3PLUS}, section 3.1 (there other backbones)",
    ),
    Preset(
        "deeplabv3plus-resnet50-mmseg",
        "deeplabv3plus",
        {"backbone": "resnet50c", **_MMSEG_HEAD},
        "mmsegmentation deeplabv3plus_r50-d8, Cityscapes, ADE20K, VOC 2012",
    ),
    Preset(
        "deeplabv3plus-resnet101-mmseg",
        "deeplabv3plus",
        {"backbone": "resnet101c", **_MMSEG_HEAD},
        "mmsegmentation deeplabv3plus_r101-d8, Cityscapes, ADE20K, VOC 2012",
    ),
    Preset(
        "deeplabv3plus-mobilenetv2-mmseg",
        "deeplabv3plus",
        {"backbone": "mobilenetv2_100", **_MMSEG_HEAD},
        "mmsegmentation mobilenet-v2-d8_deeplabv3plus, Cityscapes, ADE20K",
    ),
)


def _nonlocal_preset(depth: int, mode: str) -> Preset:
    """The model of mmsegmentation, with a mode; the paper reports the modes, of single blocks for video."""
    fields = {"backbone": f"resnet{depth}c", "nonlocal_mode": mode, **_MMSEG}
    if mode == "embedded_gaussian":
        reported = f"mmsegmentation nonlocal_r{depth}-d8, Cityscapes, ADE20K, VOC 2012"
        return Preset(f"nonlocal-resnet{depth}", "nonlocal", fields, reported)
    name = f"nonlocal-resnet{depth}-{mode.replace('_', '-')}"
    return Preset(name, "nonlocal", fields, f"{_NONLOCAL}, table 2a (there video)")


_NONLOCAL_DEEPLAB = (
    Preset(
        "deeplabv3-resnet50-nonlocal-backbone",
        "deeplabv3",
        {"backbone": "resnet50", "output_stride": 16, "backbone_nonlocal_stages": [8, 16]},
        f"{_NONLOCAL}, table 2c (five blocks; there video)",
    ),
    Preset(
        "deeplabv3-resnet50-nonlocal",
        "deeplabv3",
        {"backbone": "resnet50", **_MULTI_GRID, "nonlocal_mode": "embedded_gaussian"},
        "not yet: a block after the ASPP",
    ),
    Preset(
        "deeplabv3-resnet101-nonlocal",
        "deeplabv3",
        {"backbone": "resnet101", **_MULTI_GRID, "nonlocal_mode": "embedded_gaussian"},
        "not yet: a block after the ASPP",
    ),
)

PRESETS: tuple[Preset, ...] = (
    *_DEEPLAB_V1_V2,
    *_DEEPLAB_V3,
    *_DEEPLAB_V3PLUS,
    *(_nonlocal_preset(depth, mode) for depth in (50, 101) for mode in NONLOCAL_MODES),
    *_NONLOCAL_DEEPLAB,
)


def list_models(pattern: str = "*") -> list[Preset]:
    """List the registered heads, each with its defaults, and the presets, whose names match a pattern.

    Args:
        pattern: A name, with the wildcards `*`, `?` and `[…]`.

    Returns:
        What `preset` takes the names of.
    """
    heads = [Preset(head_name(classes[0]), head_name(classes[0]), {}, "") for classes in MODELS]
    return [entry for entry in [*heads, *PRESETS] if fnmatchcase(entry.name, pattern)]


def find_preset(name: str) -> Preset:
    """Give the preset of a name.

    Raises:
        ValueError: If there is none, with the nearest names.
    """
    known = {entry.name: entry for entry in list_models()}
    if name in known:
        return known[name]
    near = difflib.get_close_matches(name, known, n=3)
    hint = f"did you mean {' or '.join(near)}?" if near else f"it must be one of {', '.join(known)}."
    raise ValueError(f"There is no preset {name!r}: {hint}")


def preset(name: str, **overrides: Any) -> CtxSegConfig:
    """Give the configuration of a named model, for `AutoModelForSemanticSegmentation.from_config`.

    Args:
        name: One of `list_models()`, for example `"deeplabv3plus-xception65"`.
        overrides: Fields of the configuration that shall differ, for example `num_labels=11`. With another
            `backbone`, the preset's `multi_grid` and `backbone_kwargs`, which belong to its own, are left out.

    Raises:
        ValueError: If there is no such preset, or a field is unknown or out of range.
    """
    entry = find_preset(name)
    config_class = find_head(entry.head)[0]
    fields = copy.deepcopy(dict(entry.fields))
    if "backbone" in overrides:  # another network has another number of blocks, and other arguments
        fields = {key: value for key, value in fields.items() if key not in ("multi_grid", "backbone_kwargs")}
    return config_class(**{**fields, **overrides})
