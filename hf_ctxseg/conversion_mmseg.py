"""mmsegmentation's DeepLabv3, DeepLabv3+ and non-local network under our names, and back.

Their heads differ from the papers' in what our variant `mmseg` states (512 wide, a 3×3 projection of the pyramid).
They join the pyramid as [pooling, 1×1, rates …], ours as [1×1, rates …, pooling]: the projection's input channels are
permuted, which no shape would tell. Rates are absolute.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from .configuration_ctxseg import CtxSegConfig, check_choice
from .conversion import BACKBONE, HEAD, Tensors, checked, rename, require
from .conversion_mmseg_backbone import backbone_fields, expect_fixed, norm_fields
from .modeling_deeplabv3 import DeepLabV3Config
from .modeling_deeplabv3plus import DeepLabV3PlusConfig
from .modeling_nonlocal import NonLocalConfig

_NAME = "mmsegmentation's model"
_HEADS: dict[str, type[CtxSegConfig]] = {
    "ASPPHead": DeepLabV3Config,
    "DepthwiseSeparableASPPHead": DeepLabV3PlusConfig,
    "NLHead": NonLocalConfig,
}
_DILATIONS = (1, 6, 12, 18)
_HEAD_FIXED = {"conv_cfg": None, "act_cfg": {"type": "ReLU"}, "input_transform": None, "kernel_size": 3, "dilation": 1}


def from_mmseg(state_dict: Tensors, model: Mapping[str, Any]) -> tuple[CtxSegConfig, dict[str, torch.Tensor]]:
    """Convert an `EncoderDecoder` with `ASPPHead`, `DepthwiseSeparableASPPHead` or `NLHead`.

    Backbones are `ResNetV1c`, `ResNetV1d`, `ResNet` and `MobileNetV2`. Of auxiliary heads, which serve training only,
    a single one is kept; a list of them is left out with its tensors.

    Args:
        state_dict: The peer's tensors.
        model: The `model` dict of its config; `backbone`, `decode_head` and `auxiliary_head` are read.

    Raises:
        ValueError: If the model does what ours cannot, with what was found, or the tensors do not fit, with the list.
    """
    fields, _ = backbone_fields(_section(model, "backbone"))
    head = _section(model, "decode_head")
    fields |= _head_fields(part(state_dict, "decode_head."), head)
    if isinstance(model.get("auxiliary_head"), (list, tuple)):
        state_dict = {key: value for key, value in state_dict.items() if not key.startswith("auxiliary_head.")}
    elif model.get("auxiliary_head") is not None:
        fields |= _auxiliary_fields(_section(model, "auxiliary_head"), part(state_dict, "auxiliary_head."))
    tensors = rename(state_dict, mmseg_modules(model), _NAME)
    return checked(_HEADS[head["type"]](**fields), turn_pooling(tensors, f"{HEAD}."), _NAME)


def mmseg_modules(model: Mapping[str, Any]) -> dict[str, str]:
    """Give our name of each of mmsegmentation's modules, for the `model` dict of its config."""
    _, backbone = backbone_fields(model["backbone"])
    modules = {f"backbone.{theirs}": f"{BACKBONE}.{ours}" for theirs, ours in backbone.items()}
    head = _head_modules(model["decode_head"])
    modules |= {f"decode_head.{theirs}": f"{HEAD}.{ours}" for theirs, ours in head.items()}
    modules["decode_head.conv_seg"] = "classifier"
    modules |= _conv("auxiliary_head.convs.0", "auxiliary_head.conv")
    return modules | {"auxiliary_head.conv_seg": "auxiliary_head.classifier"}


def convert_mmseg_head(state_dict: Tensors, head: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Convert a decode head by itself.

    Args:
        state_dict: Tensors of the head, named from within it.
        head: Its part of mmsegmentation's config: `type` and what it was built with.

    Returns:
        Fields for the configuration of ours, and tensors named from within our head, but for those of `classifier.`.

    Raises:
        ValueError: If the head does what ours cannot, or tensors are unknown.
    """
    fields = _head_fields(state_dict, head)
    modules = _head_modules(head) | {"conv_seg": "classifier"}
    return fields, turn_pooling(rename(state_dict, modules, _NAME), "")


def _head_fields(tensors: Tensors, head: Mapping[str, Any]) -> dict[str, Any]:
    check_choice("the type of mmsegmentation's decode_head", head.get("type"), list(_HEADS))
    name = f"mmsegmentation's {head['type']}"
    given = dict(head)
    fields = norm_fields(given.pop("norm_cfg", None), name)
    fields["classifier_dropout"] = given.pop("dropout_ratio", 0.1)
    fields["align_corners"] = given.pop("align_corners", False)
    fields["num_labels"] = classes = require(tensors, "conv_seg.weight", name).shape[0]
    _expect(given, "in_index", (-1, 3), name)
    if given.get("out_channels") == 1 and given.get("num_classes") == 2:
        raise ValueError(
            f"{name} tells two classes apart by a threshold on one channel (out_channels=1, num_classes=2), but "
            "ours has one channel per class: train it with out_channels=2."
        )
    _expect(given, "out_channels", (None, classes), name)
    fields |= (_nonlocal_fields if head["type"] == "NLHead" else _aspp_fields)(tensors, given, name)
    expect_fixed(given, _HEAD_FIXED, name)
    return fields


def _aspp_fields(tensors: Tensors, given: dict[str, Any], name: str) -> dict[str, Any]:
    first, *rates = given.pop("dilations", _DILATIONS)
    if first != 1 or 1 in rates:
        raise ValueError(f"{name} has the dilations {[first, *rates]}, but ours takes a 1 first, and no other.")
    width = require(tensors, "bottleneck.conv.weight", name).shape[0]
    fields: dict[str, Any] = {"variant": "mmseg", "hidden_size": width, "atrous_rates": rates, "absolute_rates": True}
    if given["type"] == "DepthwiseSeparableASPPHead":
        for key in ("c1_in_channels", "c1_channels"):
            given.pop(key, None)
        fields["low_level_channels"] = require(tensors, "c1_bottleneck.conv.weight", name).shape[0]
    return fields


def _nonlocal_fields(tensors: Tensors, given: dict[str, Any], name: str) -> dict[str, Any]:
    fields = {"nonlocal_mode": given.pop("mode", "embedded_gaussian"), "reduction": given.pop("reduction", 2)}
    fields |= {"use_scale": given.pop("use_scale", True), "concat_input": given.pop("concat_input", True)}
    return fields | {"hidden_size": require(tensors, "convs.0.conv.weight", name).shape[0]}


def _head_modules(head: Mapping[str, Any]) -> dict[str, str]:
    """Our names of the head's modules but for its classifier."""
    if head["type"] == "NLHead":
        modules = _conv("convs.0", "conv_in") | _conv("convs.1", "conv_out") | _conv("conv_cat", "fusion")
        layers = ("g", "theta", "phi", "concat_project", "conv_out")
        modules |= {f"nl_block.{layer}.conv": f"nonlocal_block.{layer}" for layer in layers}
        return modules | {"nl_block.conv_out.bn": "nonlocal_block.norm"}
    modules = _conv("image_pool.1", "aspp.image_pooling") | _conv("bottleneck", "aspp.projection")
    modules |= _conv("aspp_modules.0", "aspp.branches.0")
    branches = range(1, len(head.get("dilations", _DILATIONS)))
    dilated = [(f"aspp_modules.{branch}", f"aspp.branches.{branch}") for branch in branches]
    if head["type"] == "ASPPHead":
        for theirs, ours in dilated:
            modules |= _conv(theirs, ours)
        return modules
    modules |= _conv("c1_bottleneck", "low_level_projection")
    for theirs, ours in [*dilated, *((f"sep_bottleneck.{layer}", f"refinement.{layer}") for layer in (0, 1))]:
        modules |= _conv(f"{theirs}.pointwise_conv", f"{ours}.pointwise")
        modules[f"{theirs}.depthwise_conv.conv"] = f"{ours}.depthwise"
        modules[f"{theirs}.depthwise_conv.bn"] = f"{ours}.depthwise_norm"
    return modules


def _auxiliary_fields(given: Mapping[str, Any], tensors: Tensors) -> dict[str, Any]:
    name = "mmsegmentation's auxiliary head"
    given = {"num_convs": 2, "concat_input": True, "in_index": -1, **given}  # mmsegmentation's defaults, not ours
    check_choice(f"the type of {name}", given.get("type"), ["FCNHead"])
    for key in ("norm_cfg", "align_corners"):  # ours shares those of the decode head
        given.pop(key, None)
    fields: dict[str, Any] = {"use_auxiliary_head": True, "auxiliary_dropout": given.pop("dropout_ratio", 0.1)}
    if isinstance(loss := given.get("loss_decode"), Mapping):
        fields["auxiliary_loss_weight"] = loss.get("loss_weight", 1.0)
    expect_fixed(given, {**_HEAD_FIXED, "num_convs": 1, "concat_input": False, "in_index": 2}, name)
    width = require(tensors, "convs.0.conv.weight", name).shape[0]
    return fields | {"auxiliary_hidden_size": width}


def _section(model: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    section = model.get(key)
    if not isinstance(section, Mapping):
        raise ValueError(f"{_NAME} must have one {key}, described by a dict, but it is {section!r}.")
    return section


def _expect(given: dict[str, Any], key: str, allowed: Sequence[Any], name: str) -> None:
    value = given.pop(key, allowed[0])
    if value not in allowed:
        raise ValueError(f"{name} has {key}={value!r}, but ours takes {' or '.join(map(repr, allowed))}.")


def _conv(theirs: str, ours: str) -> dict[str, str]:
    return {f"{theirs}.conv": f"{ours}.conv", f"{theirs}.bn": f"{ours}.norm"}


def turn_pooling(tensors: dict[str, torch.Tensor], prefix: str, *, back: bool = False) -> dict[str, torch.Tensor]:
    """Move the pooled branch from the first input channels of the projection to the last, or back.

    Args:
        tensors: State dict in our names.
        prefix: What stands before the head's names.
        back: Whether to move it from the last to the first.
    """
    key = f"{prefix}aspp.projection.conv.weight"
    if key not in tensors:  # no pyramid
        return tensors
    weight = tensors[key]  # (C, C * branches, 3, 3)
    width = weight.shape[0]  # of every branch
    return {**tensors, key: weight.roll(width if back else -width, dims=1)}


def part(tensors: Tensors, prefix: str) -> dict[str, torch.Tensor]:
    """Give the tensors whose names begin with the prefix, without it."""
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
