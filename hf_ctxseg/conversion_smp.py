"""DeepLabv3 and DeepLabv3+ of segmentation_models_pytorch (smp) under our names.

Their mathematics differ from the papers': corners are aligned, a further convolution follows the ASPP, the separable
convolutions have nothing between depthwise and pointwise, the decoder has one convolution instead of two, and the
rates of DeepLabv3+ at output stride 16 are twice the paper's. smp's own encoders give every block of a dilated stage
the stage's rate; its `tu-` encoders are timm's networks as they are. Its MobileNetV2 ends with a 1×1 convolution to
1280 channels, which timm's maps lack.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from .configuration_ctxseg import check_choice
from .conversion import (
    BACKBONE,
    HEAD,
    Tensors,
    aspp_modules,
    check_rates,
    checked,
    rename,
    require,
    separable_modules,
)
from .modeling_deeplabv3 import DeepLabV3Config
from .modeling_deeplabv3plus import DeepLabV3PlusConfig

_NAME = "smp's DeepLab"
# smp's own encoders that are torchvision's ResNets, whose names and tensors are those of timm.
_RESNETS = (
    *("resnet18", "resnet34", "resnet50", "resnet101", "resnet152"),
    *("resnext50_32x4d", "resnext101_32x4d", "resnext101_32x8d", "resnext101_32x16d"),
)
_MOBILENET = "mobilenet_v2"
_MOBILENET_STAGES = (1, 2, 3, 4, 3, 3, 1)  # blocks of each of timm's stages


def from_smp(
    state_dict: Tensors,
    encoder_name: str,
    *,
    encoder_output_stride: int | None = None,
    decoder_atrous_rates: Sequence[int] = (12, 24, 36),
    decoder_aspp_dropout: float = 0.5,
    in_channels: int = 3,
    encoder_kwargs: Mapping[str, Any] | None = None,
) -> tuple[DeepLabV3Config, dict[str, torch.Tensor]]:
    """Convert `DeepLabV3` or `DeepLabV3Plus` with a ResNet, ResNeXt, `mobilenet_v2` or `tu-` encoder of full depth.

    The arguments bear the names of smp's. Its models refuse pictures whose sides are not multiples of the output
    stride; ours take them.

    Args:
        state_dict: The peer's tensors.
        encoder_name: smp's name of the encoder; `tu-NAME` is timm's network NAME.
        encoder_output_stride: None: smp's default, 8 for DeepLabV3 and 16 for DeepLabV3Plus.
        decoder_atrous_rates: Rates of the ASPP, which the tensors do not tell.
        decoder_aspp_dropout: Probability of the dropout within the ASPP.
        in_channels: Channels of the input picture.
        encoder_kwargs: Further arguments of timm for a `tu-` encoder.

    Raises:
        ValueError: If the encoder has no equal in timm, or the tensors are not those of such a network, with the list.
    """
    state_dict = _present_names(state_dict)
    plus = "decoder.block1.0.weight" in state_dict
    aspp = "decoder.aspp.0" if plus else "decoder.aspp"
    projection = require(state_dict, f"{aspp}.project.0.weight", _NAME)
    rates = check_rates(decoder_atrous_rates, projection, _NAME)
    separable = f"{aspp}.convs.1.0.0.weight" in state_dict
    if separable != plus:
        raise ValueError(
            f"{_NAME}V3{'Plus' if plus else ''} has {'separable' if separable else 'dense'} convolutions in its ASPP, "
            f"but ours takes decoder_aspp_separable={plus} there only."
        )
    fields: dict[str, Any] = {
        **_encoder_fields(encoder_name, encoder_kwargs),
        "num_channels": in_channels,
        "output_stride": encoder_output_stride or (16 if plus else 8),
        "atrous_rates": rates,
        "absolute_rates": True,
        "aspp_dropout": decoder_aspp_dropout,
        "hidden_size": projection.shape[0],
        "num_labels": require(state_dict, "segmentation_head.0.weight", _NAME).shape[0],
        "align_corners": True,
    }
    config: DeepLabV3Config
    if plus:
        low_level_channels = state_dict["decoder.block1.0.weight"].shape[0]
        config = DeepLabV3PlusConfig(variant="smp", low_level_channels=low_level_channels, **fields)
    else:
        config = DeepLabV3Config(variant="torchvision", **fields)
    return checked(config, rename(state_dict, smp_modules(config, encoder_name), _NAME), _NAME)


def smp_modules(config: DeepLabV3Config, encoder_name: str) -> dict[str, str]:
    """Give our name of each of smp's modules, for a configuration of ours and smp's name of the encoder."""
    plus = isinstance(config, DeepLabV3PlusConfig)
    modules = {"encoder.model" if encoder_name.startswith("tu-") else "encoder": BACKBONE}
    if encoder_name == _MOBILENET:
        modules = _mobilenet_modules()
    aspp = "decoder.aspp.0" if plus else "decoder.aspp"
    modules |= aspp_modules(aspp, f"{HEAD}.aspp", len(config.atrous_rates), separable=plus)
    modules["segmentation_head.0"] = "classifier"
    if plus:
        return modules | _decoder_modules()
    return modules | {"decoder.conv": f"{HEAD}.refinement.conv", "decoder.bn": f"{HEAD}.refinement.norm"}


def encoder_name_of(config: DeepLabV3Config) -> str:
    """Give smp's name of the encoder that is a configuration's backbone."""
    own = {**{name: name for name in _RESNETS}, "mobilenetv2_100_smp": _MOBILENET}
    name = config.backbone.partition(".")[0]
    return own[name] if config.dilate_first_block and name in own else f"tu-{config.backbone}"


def _present_names(tensors: Tensors) -> dict[str, torch.Tensor]:
    """Name the layers of DeepLabV3's decoder, which older releases counted, as the present one does."""
    counted = {"decoder.0": "decoder.aspp", "decoder.1": "decoder.conv", "decoder.2": "decoder.bn"}
    present = {}
    for key, value in tensors.items():
        layer = ".".join(key.split(".")[:2])
        present[counted.get(layer, layer) + key.removeprefix(layer)] = value
    return present


def _encoder_fields(name: str, kwargs: Mapping[str, Any] | None) -> dict[str, Any]:
    if name.startswith("tu-"):
        return {"backbone": name.removeprefix("tu-"), "backbone_kwargs": dict(kwargs) if kwargs else None}
    check_choice("encoder_name (other than tu-NAME)", name, (*_RESNETS, _MOBILENET))
    return {"backbone": "mobilenetv2_100_smp" if name == _MOBILENET else name, "dilate_first_block": True}


def _mobilenet_modules() -> dict[str, str]:
    """Our names of the layers of torchvision's MobileNetV2, whose blocks are counted through."""
    modules = {"encoder.features.0.0": f"{BACKBONE}.conv_stem", "encoder.features.0.1": f"{BACKBONE}.bn1"}
    places = [(stage, block) for stage, depth in enumerate(_MOBILENET_STAGES) for block in range(depth)]
    for number, (stage, block) in enumerate(places, start=1):
        theirs, ours = f"encoder.features.{number}.conv", f"{BACKBONE}.blocks.{stage}.{block}"
        *inner, last = ("conv_dw", "conv_pw") if number == 1 else ("conv_pw", "conv_dw", "conv_pwl")
        for place, layer in enumerate(inner):
            modules |= {f"{theirs}.{place}.0": f"{ours}.{layer}", f"{theirs}.{place}.1": f"{ours}.bn{place + 1}"}
        modules |= {
            f"{theirs}.{len(inner)}": f"{ours}.{last}",
            f"{theirs}.{len(inner) + 1}": f"{ours}.bn{len(inner) + 1}",
        }
    end = f"{BACKBONE}.blocks.7.0"
    return modules | {"encoder.features.18.0": f"{end}.conv", "encoder.features.18.1": f"{end}.bn1"}


def _decoder_modules() -> dict[str, str]:
    modules = {"decoder.block1.0": f"{HEAD}.low_level_projection.conv"}
    modules |= {"decoder.block1.1": f"{HEAD}.low_level_projection.norm"}
    # A separable convolution and its normalisation lie after the ASPP in one sequence, as layers 1 and 2.
    modules |= {
        "decoder.aspp.1.0": f"{HEAD}.context_refinement.depthwise",
        "decoder.aspp.1.1": f"{HEAD}.context_refinement.pointwise.conv",
        "decoder.aspp.2": f"{HEAD}.context_refinement.pointwise.norm",
    }
    return modules | separable_modules("decoder.block2", f"{HEAD}.refinement.0")
