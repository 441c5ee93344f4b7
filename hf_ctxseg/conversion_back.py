"""Our models under the names of other code bases: torchvision, segmentation_models_pytorch, mmsegmentation.

Each goes back by the table that the converter came by. What is given is converted forth again, and refused unless the
same model comes out: then the other code base has no equal of it.
"""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import torch
from transformers import PreTrainedConfig

from .configuration_ctxseg import CtxSegConfig
from .conversion import HEAD, Tensors, rename
from .conversion_mmseg import from_mmseg, mmseg_modules, turn_pooling
from .conversion_mmseg_backbone import backbone_section
from .conversion_smp import encoder_name_of, from_smp, smp_modules
from .conversion_torchvision import from_torchvision, torchvision_modules
from .modeling_deeplabv3 import DeepLabV3Config
from .modeling_deeplabv3plus import DeepLabV3PlusConfig
from .modeling_nonlocal import NonLocalConfig

# Fields that do not change what a trained model computes, or that the code bases keep outside their models.
_OF_TRAINING = {"classifier_dropout", "aspp_dropout", "auxiliary_dropout", "auxiliary_loss_weight", "norm_momentum"}
_OF_TRAINING |= {"semantic_loss_ignore_index", "palette", "zeros_init", "backbone_nonlocal_mode"}
_RATES = {"atrous_rates", "absolute_rates"}  # compared as they are applied


def to_torchvision(config: CtxSegConfig, tensors: Tensors) -> dict[str, torch.Tensor]:
    """Give the state dict of torchvision's DeepLabv3 that computes what a model of ours does.

    It fits `deeplabv3_resnet50`, `deeplabv3_resnet101` or `deeplabv3_mobilenet_v3_large`, where stride and rates are
    those of that function, and otherwise a `torchvision.models.segmentation.DeepLabV3` built with them.

    Args:
        config: The model's configuration: DeepLabv3 of the variant `torchvision`.
        tensors: Its state dict.

    Raises:
        ValueError: If torchvision has no such model, with what differs.
    """
    peer = "torchvision"
    if not isinstance(config, DeepLabV3Config) or config.variant != "torchvision":
        raise _refusal(peer, config, "it has DeepLabv3 of the variant 'torchvision' only")
    try:
        renamed = _renamed(tensors, torchvision_modules(config), peer)
        again = from_torchvision(renamed, atrous_rates=config.effective_rates, output_stride=config.output_stride)[0]
    except ValueError as error:
        raise _refusal(peer, config, str(error)) from error
    _check_same(config, again, peer)
    return renamed


def to_smp(config: CtxSegConfig, tensors: Tensors) -> dict[str, torch.Tensor]:
    """Give the state dict of smp's DeepLabV3 or DeepLabV3Plus that computes what a model of ours does.

    Args:
        config: The model's configuration: DeepLabv3 of the variant `torchvision` or DeepLabv3+ of the variant `smp`,
            with `align_corners`.
        tensors: Its state dict.

    Raises:
        ValueError: If smp has no such model, with what differs.
    """
    peer = "segmentation_models_pytorch"
    given = smp_arguments(config)
    try:
        renamed = _renamed(tensors, smp_modules(_deeplabv3(config, peer), given["encoder_name"]), peer)
        told = ("encoder_name", "encoder_output_stride", "decoder_atrous_rates", "decoder_aspp_dropout", "in_channels")
        known = {key: given[key] for key in told}
        again = from_smp(renamed, **known, encoder_kwargs=config.backbone_kwargs)[0]
    except ValueError as error:
        raise _refusal(peer, config, str(error)) from error
    _check_same(config, again, peer)
    return renamed


def smp_arguments(config: CtxSegConfig) -> dict[str, Any]:
    """Give the arguments of smp's `DeepLabV3` or, for a configuration of DeepLabv3+, `DeepLabV3Plus`.

    Further arguments of timm, which smp passes on, are among them.

    Raises:
        ValueError: If smp has no such model.
    """
    peer = "segmentation_models_pytorch"
    config = _deeplabv3(config, peer)
    if config.output_stride not in (8, 16):
        raise _refusal(peer, config, f"it has the output strides 8 and 16 only, not {config.output_stride}")
    if isinstance(config, DeepLabV3PlusConfig) and (config.low_level_channels != 48 or not config.separable):
        raise _refusal(peer, config, "its DeepLabV3Plus has 48 low_level_channels and separable convolutions only")
    name = encoder_name_of(config)
    return {
        "encoder_name": name,
        "encoder_output_stride": config.output_stride,
        "decoder_channels": config.hidden_size,
        "decoder_atrous_rates": tuple(config.effective_rates),
        "decoder_aspp_dropout": config.aspp_dropout,
        "in_channels": config.num_channels,
        "classes": config.num_labels,
        **(config.backbone_kwargs or {}),
    }


def to_mmseg(config: CtxSegConfig, tensors: Tensors) -> dict[str, torch.Tensor]:
    """Give the state dict of mmsegmentation's `EncoderDecoder` that computes what a model of ours does.

    Args:
        config: The model's configuration: DeepLabv3 or DeepLabv3+ of the variant `mmseg`, or a non-local network.
        tensors: Its state dict.

    Raises:
        ValueError: If mmsegmentation has no such model, with what differs.
    """
    peer = "mmsegmentation"
    model = mmseg_model(config, tensors)
    try:
        renamed = _renamed(turn_pooling(dict(tensors), f"{HEAD}.", back=True), mmseg_modules(model), peer)
        again = from_mmseg(renamed, model)[0]
    except ValueError as error:
        raise _refusal(peer, config, str(error)) from error
    _check_same(config, again, peer)
    return renamed


def mmseg_model(config: CtxSegConfig, tensors: Tensors) -> dict[str, Any]:
    """Give the `model` dict of an mmsegmentation config for a model of ours.

    Args:
        config: The model's configuration.
        tensors: Its state dict.

    Raises:
        ValueError: If mmsegmentation has no such model.
    """
    norm = {"type": "BN", "eps": config.norm_eps, "momentum": config.norm_momentum}
    shared = {"num_classes": config.num_labels, "norm_cfg": norm, "align_corners": config.align_corners}
    head: dict[str, Any] = {"in_index": 3, "channels": config.hidden_size, "dropout_ratio": config.classifier_dropout}
    if isinstance(config, NonLocalConfig):
        head |= {"type": "NLHead", "mode": config.nonlocal_mode, "reduction": config.reduction}
        head |= {"use_scale": config.use_scale, "concat_input": config.concat_input}
        first = "conv_in"
    elif isinstance(config, DeepLabV3Config) and config.variant == "mmseg":
        head |= {"type": "ASPPHead", "dilations": (1, *config.effective_rates)}
        first = "aspp.branches.0"
        if isinstance(config, DeepLabV3PlusConfig):
            low = tensors[f"{HEAD}.low_level_projection.conv.weight"]
            head |= {"type": "DepthwiseSeparableASPPHead", "c1_channels": low.shape[0], "c1_in_channels": low.shape[1]}
    else:
        raise _refusal("mmsegmentation", config, "it has DeepLabv3 and v3+ of the variant 'mmseg' and NonLocal only")
    head["in_channels"] = tensors[f"{HEAD}.{first}.conv.weight"].shape[1]
    try:
        backbone = backbone_section(config)
    except ValueError as error:
        raise _refusal("mmsegmentation", config, str(error)) from error
    model: dict[str, Any] = {"type": "EncoderDecoder", "backbone": backbone, "decode_head": {**head, **shared}}
    model["decode_head"]["loss_decode"] = {"type": "CrossEntropyLoss", "loss_weight": 1.0}
    if config.use_auxiliary_head:
        loss = {"type": "CrossEntropyLoss", "loss_weight": config.auxiliary_loss_weight}
        auxiliary: dict[str, Any] = {
            "type": "FCNHead",
            "in_index": 2,
            "num_convs": 1,
            "concat_input": False,
            "loss_decode": loss,
        }
        auxiliary["in_channels"] = tensors["auxiliary_head.conv.conv.weight"].shape[1]
        auxiliary |= {"channels": config.auxiliary_hidden_size, "dropout_ratio": config.auxiliary_dropout}
        model["auxiliary_head"] = {**auxiliary, **shared}
    return model


def _deeplabv3(config: CtxSegConfig, peer: str) -> DeepLabV3Config:
    if not isinstance(config, DeepLabV3Config):
        raise _refusal(peer, config, "it has DeepLabv3 and DeepLabv3+ only")
    return config


def _renamed(tensors: Tensors, modules: Mapping[str, str], peer: str) -> dict[str, torch.Tensor]:
    return rename(tensors, {ours: theirs for theirs, ours in modules.items()}, peer)


def _check_same(config: CtxSegConfig, again: CtxSegConfig, peer: str) -> None:
    """Raise `ValueError` where the peer's model, seen from here, is another one."""
    own = {field.name for field in fields(config)} - {field.name for field in fields(PreTrainedConfig)}
    for name in [*sorted(own - _OF_TRAINING - _RATES), "effective_rates"]:
        here, there = _comparable(config, name), _comparable(again, name)
        if here != there:
            raise _refusal(peer, config, f"with these tensors it computes as ours with {name}={there!r}, not {here!r}")


def _comparable(config: CtxSegConfig, name: str) -> Any:
    value = getattr(config, name, None)
    if name == "backbone":
        return config.backbone.partition(".")[0]
    return value or None if name in ("backbone_kwargs", "backbone_rates", "backbone_nonlocal_stages") else value


def _refusal(peer: str, config: CtxSegConfig, reason: str) -> ValueError:
    return ValueError(
        f"{peer} has no equal of this {config.model_type} model on {config.backbone!r}: {reason.rstrip('.')}."
    )
