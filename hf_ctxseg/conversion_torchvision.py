"""torchvision's DeepLabv3 under our names.

Its mathematics differ from the paper's in what our variant `torchvision` states (a further 3×3 convolution after the
ASPP), in rates that are doubled at output stride 16 too, and, for MobileNetV3, in an epsilon of 1e-3 and a dilated
first block of the last stage, which timm leaves at the rate of the stage before.
"""

from collections.abc import Sequence
from typing import Any

import torch
from transformers.utils import logging

from .conversion import BACKBONE, HEAD, Tensors, aspp_modules, check_rates, checked, rename, require
from .modeling_deeplabv3 import DeepLabV3Config

logger = logging.get_logger(__name__)

_NAME = "torchvision's DeepLabv3"
_RESNETS = {(3, 4, 6, 3): "resnet50", (3, 4, 23, 3): "resnet101", (3, 8, 36, 3): "resnet152"}
# timm's stages of MobileNetV3-Large: inverted residual blocks of each; torchvision counts them through from 1.
_MOBILENET_STAGES = (1, 2, 3, 4, 2, 3)
_SQUEEZED_STAGES = (2, 4, 5)  # those with squeeze-and-excitation


def from_torchvision(
    state_dict: Tensors, *, atrous_rates: Sequence[int] = (12, 24, 36), output_stride: int | None = None
) -> tuple[DeepLabV3Config, dict[str, torch.Tensor]]:
    """Convert `deeplabv3_resnet50`, `deeplabv3_resnet101` or `deeplabv3_mobilenet_v3_large`.

    The auxiliary classifier of a ResNet becomes ours. That of MobileNetV3 looks at the map of stride 8 instead of the
    last but one stage; it serves training only and is left out, with a warning.

    Args:
        state_dict: The peer's tensors.
        atrous_rates: Rates of the ASPP, which the tensors do not tell.
        output_stride: Stride the network was built for; None: torchvision's own, 8 for ResNets and 16 for MobileNetV3.

    Raises:
        ValueError: If the tensors are not those of such a network, with the list.
    """
    rates = check_rates(atrous_rates, require(state_dict, "classifier.0.project.0.weight", _NAME), _NAME)
    tensors = dict(state_dict)
    mobilenet = "backbone.16.0.weight" in tensors
    fields: dict[str, Any] = _mobilenet_fields() if mobilenet else {"backbone": _resnet_name(tensors)}
    auxiliary = [key for key in tensors if key.startswith("aux_classifier.")]
    if auxiliary and mobilenet:
        logger.warning("The auxiliary classifier of MobileNetV3 looks at a map that ours does not take: left out.")
        for key in auxiliary:
            del tensors[key]
    elif auxiliary:
        fields["use_auxiliary_head"] = True
        fields["auxiliary_hidden_size"] = require(tensors, "aux_classifier.0.weight", _NAME).shape[0]
    config = DeepLabV3Config(
        **fields,
        variant="torchvision",
        output_stride=output_stride or (16 if mobilenet else 8),
        atrous_rates=rates,
        absolute_rates=True,
        hidden_size=require(tensors, "classifier.1.weight", _NAME).shape[0],
        num_labels=require(tensors, "classifier.4.weight", _NAME).shape[0],
        align_corners=False,
    )
    return checked(config, rename(tensors, torchvision_modules(config), _NAME), _NAME)


def torchvision_modules(config: DeepLabV3Config) -> dict[str, str]:
    """Give our name of each of torchvision's modules, for a configuration of ours."""
    mobilenet = config.backbone.startswith("mobilenetv3")
    modules = _mobilenet_modules() if mobilenet else {"backbone": BACKBONE}
    modules |= aspp_modules("classifier.0", f"{HEAD}.aspp", len(config.atrous_rates))
    return modules | {
        "classifier.1": f"{HEAD}.refinement.conv",
        "classifier.2": f"{HEAD}.refinement.norm",
        "classifier.4": "classifier",
        "aux_classifier.0": "auxiliary_head.conv.conv",
        "aux_classifier.1": "auxiliary_head.conv.norm",
        "aux_classifier.4": "auxiliary_head.classifier",
    }


def _resnet_name(tensors: Tensors) -> str:
    blocks = {tuple(key.split(".")[1:3]) for key in tensors if key.startswith("backbone.layer")}
    depths = tuple(sum(stage == f"layer{number}" for stage, *_ in blocks) for number in (1, 2, 3, 4))
    if depths not in _RESNETS:
        raise ValueError(
            f"The backbone of {_NAME} must be MobileNetV3-Large or a ResNet with blocks as in "
            f"{', '.join(f'{name} {list(blocks)}' for blocks, name in _RESNETS.items())}, but it has {list(depths)}."
        )
    return _RESNETS[depths]


def _mobilenet_fields() -> dict[str, Any]:
    return {
        "backbone": "mobilenetv3_large_100",
        "backbone_kwargs": {"bn_eps": 1e-3, "bn_momentum": 0.01},
        "dilate_first_block": True,
    }


def _mobilenet_modules() -> dict[str, str]:
    """Our names of the layers, which torchvision counts; a block may lack expansion or squeeze-and-excitation."""
    modules = {"backbone.0.0": f"{BACKBONE}.conv_stem", "backbone.0.1": f"{BACKBONE}.bn1"}
    modules |= {"backbone.16.0": f"{BACKBONE}.blocks.6.0.conv", "backbone.16.1": f"{BACKBONE}.blocks.6.0.bn1"}
    places = [(stage, block) for stage, depth in enumerate(_MOBILENET_STAGES) for block in range(depth)]
    for number, (stage, block) in enumerate(places, start=1):
        theirs, ours = f"backbone.{number}.block", f"{BACKBONE}.blocks.{stage}.{block}"
        layers = ["conv_dw", "conv_pw"] if number == 1 else ["conv_pw", "conv_dw", "conv_pwl"]
        places_of_layers = list(range(len(layers)))
        if stage in _SQUEEZED_STAGES:
            modules |= {f"{theirs}.2.fc1": f"{ours}.se.conv_reduce", f"{theirs}.2.fc2": f"{ours}.se.conv_expand"}
            places_of_layers[-1] += 1
        for norm, (place, layer) in enumerate(zip(places_of_layers, layers, strict=True), start=1):
            modules |= {f"{theirs}.{place}.0": f"{ours}.{layer}", f"{theirs}.{place}.1": f"{ours}.bn{norm}"}
    return modules
