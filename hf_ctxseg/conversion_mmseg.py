"""mmsegmentation's DeepLabv3, DeepLabv3+ and non-local network, and mmcv's non-local blocks, under our names.

Their heads differ from the papers' in what our variant `mmseg` states (512 wide, a 3×3 projection of the pyramid).
They join the pyramid as [pooling, 1×1, rates …], ours as [1×1, rates …, pooling]: the projection's input channels are
permuted, which no shape would tell. Rates are absolute.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from .configuration_ctxseg import CtxSegConfig, check_choice
from .conversion import BACKBONE, HEAD, Tensors, checked, rename, require
from .modeling_deeplabv3 import DeepLabV3Config
from .modeling_deeplabv3plus import DeepLabV3PlusConfig
from .modeling_nonlocal import NonLocalConfig
from .nonlocal_block import NonLocal1d, NonLocal2d, NonLocal3d, NonLocalBlock

_NAME = "mmsegmentation's model"
_HEADS: dict[str, type[CtxSegConfig]] = {
    "ASPPHead": DeepLabV3Config,
    "DepthwiseSeparableASPPHead": DeepLabV3PlusConfig,
    "NLHead": NonLocalConfig,
}
# What serves training alone, or is told by the tensors' shapes.
_NO_MATTER = {"type", "init_cfg", "pretrained", "with_cp", "norm_eval", "frozen_stages", "zero_init_residual"}
_NO_MATTER |= {"loss_decode", "sampler", "ignore_index", "in_channels", "channels", "num_classes", "threshold"}
# What mmsegmentation takes where its config says nothing, and what alone ours can do.
_BACKBONE_FIXED = {"stem_channels": 64, "base_channels": 64, "num_stages": 4, "style": "pytorch", "dcn": None}
_BACKBONE_FIXED |= {"plugins": None, "conv_cfg": None, "stage_with_dcn": (False,) * 4, "out_indices": (0, 1, 2, 3)}
_HEAD_FIXED = {"conv_cfg": None, "act_cfg": {"type": "ReLU"}, "input_transform": None, "kernel_size": 3, "dilation": 1}
_NORM = {"type": "BN", "eps": 1e-5, "momentum": 0.1}


def from_mmseg(state_dict: Tensors, model: Mapping[str, Any]) -> tuple[CtxSegConfig, dict[str, torch.Tensor]]:
    """Convert an `EncoderDecoder` with `ASPPHead`, `DepthwiseSeparableASPPHead` or `NLHead`.

    Backbones are `ResNetV1c`, `ResNetV1d` and `ResNet`. Refused, since timm computes otherwise: depths 18 and 34, in
    whose blocks mmsegmentation dilates the first convolution only, and dilated stages of `ResNetV1d`, where timm
    averages before the convolution of the shortcut and mmsegmentation does not.

    Args:
        state_dict: The peer's tensors.
        model: The `model` dict of its config; `backbone`, `decode_head` and `auxiliary_head` are read.

    Raises:
        ValueError: If the model does what ours cannot, with what was found, or the tensors do not fit, with the list.
    """
    head = _section(model, "decode_head")
    fields, backbone_modules = _backbone(_section(model, "backbone"))
    head_fields, head_modules = _head(_part(state_dict, "decode_head."), head)
    modules = {f"backbone.{theirs}": f"{BACKBONE}.{ours}" for theirs, ours in backbone_modules.items()}
    modules |= {f"decode_head.{theirs}": f"{HEAD}.{ours}" for theirs, ours in head_modules.items()}
    modules["decode_head.conv_seg"] = "classifier"
    if model.get("auxiliary_head") is not None:
        auxiliary = _section(model, "auxiliary_head")
        fields |= _auxiliary_fields(auxiliary, _part(state_dict, "auxiliary_head."))
        modules |= _conv("auxiliary_head.convs.0", "auxiliary_head.conv")
        modules["auxiliary_head.conv_seg"] = "auxiliary_head.classifier"
    config = _HEADS[head["type"]](**fields, **head_fields)
    tensors = _pooling_last(rename(state_dict, modules, _NAME), f"{HEAD}.")
    return checked(config, tensors, _NAME)


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
    fields, modules = _head(state_dict, head)
    return fields, _pooling_last(rename(state_dict, modules | {"conv_seg": "classifier"}, _NAME), "")


def _head(tensors: Tensors, head: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """Fields of the configuration, and our names of the head's modules but for its classifier."""
    check_choice("the type of mmsegmentation's decode_head", head.get("type"), list(_HEADS))
    name = f"mmsegmentation's {head['type']}"
    given = dict(head)
    fields = _norm_fields(given.pop("norm_cfg", None), name)
    fields["classifier_dropout"] = given.pop("dropout_ratio", 0.1)
    fields["align_corners"] = given.pop("align_corners", False)
    fields["num_labels"] = classes = require(tensors, "conv_seg.weight", name).shape[0]
    _expect(given, "in_index", (-1, 3), name)
    _expect(given, "out_channels", (None, classes), name)
    convert = _nonlocal_head if head["type"] == "NLHead" else _aspp_head
    head_fields, modules = convert(tensors, given, name)
    _expect_fixed(given, _HEAD_FIXED, name)
    return fields | head_fields, modules


def _aspp_head(tensors: Tensors, given: dict[str, Any], name: str) -> tuple[dict[str, Any], dict[str, str]]:
    first, *rates = given.pop("dilations", (1, 6, 12, 18))
    if first != 1 or 1 in rates:
        raise ValueError(f"{name} has the dilations {[first, *rates]}, but ours takes a 1 first, and no other.")
    width = require(tensors, "bottleneck.conv.weight", name).shape[0]
    fields: dict[str, Any] = {"variant": "mmseg", "hidden_size": width, "atrous_rates": rates, "absolute_rates": True}
    modules = _conv("image_pool.1", "aspp.image_pooling") | _conv("bottleneck", "aspp.projection")
    modules |= _conv("aspp_modules.0", "aspp.branches.0")
    dilated = [(f"aspp_modules.{i}", f"aspp.branches.{i}") for i in range(1, len(rates) + 1)]
    if name.endswith("DepthwiseSeparableASPPHead"):
        for key in ("c1_in_channels", "c1_channels"):
            given.pop(key, None)
        fields["low_level_channels"] = require(tensors, "c1_bottleneck.conv.weight", name).shape[0]
        modules |= _conv("c1_bottleneck", "low_level_projection")
        for theirs, ours in [*dilated, *((f"sep_bottleneck.{i}", f"refinement.{i}") for i in (0, 1))]:
            modules |= _conv(f"{theirs}.pointwise_conv", f"{ours}.pointwise")
            modules[f"{theirs}.depthwise_conv.conv"] = f"{ours}.depthwise"
            modules[f"{theirs}.depthwise_conv.bn"] = f"{ours}.depthwise_norm"
    else:
        for theirs, ours in dilated:
            modules |= _conv(theirs, ours)
    return fields, modules


def _nonlocal_head(tensors: Tensors, given: dict[str, Any], name: str) -> tuple[dict[str, Any], dict[str, str]]:
    fields = {"nonlocal_mode": given.pop("mode", "embedded_gaussian"), "reduction": given.pop("reduction", 2)}
    fields |= {"use_scale": given.pop("use_scale", True), "concat_input": given.pop("concat_input", True)}
    fields["hidden_size"] = require(tensors, "convs.0.conv.weight", name).shape[0]
    modules = _conv("convs.0", "conv_in") | _conv("convs.1", "conv_out") | _conv("conv_cat", "fusion")
    return fields, modules | _nonlocal_modules("nl_block.", "nonlocal_block.")


def nonlocal_from_mmcv(
    state_dict: Tensors,
    *,
    mode: str = "embedded_gaussian",
    use_scale: bool = True,
    norm_eps: float = 1e-5,
    norm_momentum: float = 0.1,
) -> NonLocalBlock:
    """Build a `NonLocal1d`, `NonLocal2d` or `NonLocal3d` of ours from mmcv's.

    The tensors tell dimensions, width, reduction, sub-sampling and norm, and contradict a wrong `mode` where they can:
    `embedded_gaussian` and `dot_product` have the same.

    Args:
        state_dict: The peer's tensors.
        mode: Pairwise function the block was built with.
        use_scale: Whether embedded Gaussian logits are scaled.
        norm_eps: Epsilon of the normalisation, where there is one.
        norm_momentum: Its momentum.

    Raises:
        ValueError: If tensors are missing, surplus or of another shape.
    """
    name = "mmcv's non-local block"
    tensors = rename(state_dict, _nonlocal_modules("", ""), name)
    value = require(tensors, "g.weight", name)
    block_class = {3: NonLocal1d, 4: NonLocal2d, 5: NonLocal3d}.get(value.dim())
    if block_class is None:
        raise ValueError(f"{name} has a g.conv.weight of shape {list(value.shape)}: expected 3 to 5 dimensions.")
    block = block_class(
        in_channels=value.shape[1],
        reduction=value.shape[1] // value.shape[0],
        use_scale=use_scale,
        mode=mode,
        sub_sample="g.0.conv.weight" in state_dict,
        norm="batch" if "norm.weight" in tensors else None,
        norm_eps=norm_eps,
        norm_momentum=norm_momentum,
    )
    try:
        block.load_state_dict(tensors)
    except RuntimeError as error:
        raise ValueError(f"{name} is not one of mode {mode!r}: {error}") from error
    return block


def _nonlocal_modules(theirs: str, ours: str) -> dict[str, str]:
    """Sub-sampling puts g and phi into a sequence with the pooling, which renames their tensors."""
    layers = ("g", "theta", "phi", "concat_project", "conv_out")
    modules = {f"{theirs}{layer}.conv": f"{ours}{layer}" for layer in layers}
    modules |= {f"{theirs}{layer}.0.conv": f"{ours}{layer}" for layer in ("g", "phi")}
    return modules | {f"{theirs}conv_out.bn": f"{ours}norm"}


def _backbone(given: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """The configuration's fields for a ResNet of mmsegmentation, and our names of its modules."""
    given = dict(given)
    kind, depth = given.get("type"), given.pop("depth", None)
    name = f"mmsegmentation's {kind}-{depth}"
    check_choice("the type of mmsegmentation's backbone", kind, ["ResNet", "ResNetV1c", "ResNetV1d"])
    if depth not in (50, 101, 152):
        raise ValueError(
            f"{name} must have depth 50, 101 or 152: with 18 and 34, mmsegmentation dilates the first convolution of "
            "a block only, timm both."
        )
    norm = _norm_fields(given.pop("norm_cfg", _NORM), name)
    if norm != {"norm_eps": _NORM["eps"], "norm_momentum": _NORM["momentum"]}:
        raise ValueError(f"{name} has the normalisation {norm}, but ours takes {_NORM} in the backbone.")
    deep_stem = given.pop("deep_stem", kind != "ResNet")
    averaged = given.pop("avg_down", kind == "ResNetV1d")
    stride, rates = _dilation(given.pop("strides", (1, 2, 2, 2)), given.pop("dilations", (1, 1, 1, 1)), name)
    dilated = rates[-1] > 1
    if averaged and (dilated or not deep_stem):
        raise ValueError(
            f"{name} has avg_down with the dilations {rates} and deep_stem={deep_stem}: ours takes it undilated and "
            "with a deep stem only, since timm averages before the shortcut of a dilated stage too."
        )
    fields: dict[str, Any] = {
        "backbone": f"resnet{depth}{'d' if averaged else 'c' if deep_stem else ''}",
        "num_channels": given.pop("in_channels", 3),
        "output_stride": stride,
    }
    if not given.pop("contract_dilation", False) and dilated:
        fields["dilate_first_block"] = True
    if (multi_grid := given.pop("multi_grid", None)) is not None:
        fields["multi_grid"] = _multi_grid(multi_grid, rates[-1], name)
    _expect_fixed(given, _BACKBONE_FIXED, name)
    parts = ("conv1", "bn1", "layer1", "layer2", "layer3", "layer4")
    stem = {f"stem.{layer}": f"conv1.{layer}" for layer in (0, 1, 3, 4, 6)} | {"stem.7": "bn1"}
    return fields, {part: part for part in parts} | (stem if deep_stem else {})


def _dilation(strides: Sequence[int], dilations: Sequence[int], name: str) -> tuple[int, list[int]]:
    """The output stride, and the rate of each stage, which must make up for the strides left out."""
    native = (1, 2, 4, 8)
    rates = [wanted // math.prod(strides[: i + 1]) for i, wanted in enumerate(native)]
    if len(strides) != 4 or list(dilations) != rates or any(stride not in (1, 2) for stride in strides):
        raise ValueError(
            f"{name} has the strides {list(strides)} and the dilations {list(dilations)}: expected are four of each, "
            f"and dilations that make up for the strides left out ({rates})."
        )
    return 4 * math.prod(strides), rates


def _multi_grid(absolute: Sequence[int], rate: int, name: str) -> list[int]:
    """Give factors of the stage's rate, as the paper and ours do; mmsegmentation gives the rates themselves."""
    if any(value % rate for value in absolute):
        raise ValueError(
            f"{name} has the multi-grid rates {list(absolute)}, used as they are, in a stage of rate {rate}: ours "
            "takes whole factors of the stage's rate (arXiv 1706.05587, section 3.1.1)."
        )
    return [value // rate for value in absolute]


def _auxiliary_fields(given: Mapping[str, Any], tensors: Tensors) -> dict[str, Any]:
    name = "mmsegmentation's auxiliary head"
    given = {"num_convs": 2, "concat_input": True, "in_index": -1, **given}  # mmsegmentation's defaults, not ours
    check_choice(f"the type of {name}", given.get("type"), ["FCNHead"])
    for key in ("norm_cfg", "dropout_ratio", "align_corners"):  # ours shares those of the decode head
        given.pop(key, None)
    _expect_fixed(given, {**_HEAD_FIXED, "num_convs": 1, "concat_input": False, "in_index": 2}, name)
    width = require(tensors, "convs.0.conv.weight", name).shape[0]
    return {"use_auxiliary_head": True, "auxiliary_hidden_size": width}


def _norm_fields(given: Mapping[str, Any] | None, name: str) -> dict[str, Any]:
    if given is None or given.get("type") not in ("BN", "SyncBN"):
        raise ValueError(f"{name} has the norm_cfg {given}, but ours takes batch normalisation (BN or SyncBN).")
    return {"norm_eps": given.get("eps", _NORM["eps"]), "norm_momentum": given.get("momentum", _NORM["momentum"])}


def _section(model: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    section = model.get(key)
    if not isinstance(section, Mapping):
        raise ValueError(f"{_NAME} must have one {key}, described by a dict, but it is {section!r}.")
    return section


def _expect(given: dict[str, Any], key: str, allowed: Sequence[Any], name: str) -> None:
    value = given.pop(key, allowed[0])
    if value not in allowed:
        raise ValueError(f"{name} has {key}={value!r}, but ours takes {' or '.join(map(repr, allowed))}.")


def _expect_fixed(given: dict[str, Any], fixed: Mapping[str, Any], name: str) -> None:
    """Refuse what is set to another value than ours takes, and what is not known."""
    for key, value in fixed.items():
        value = list(value) if isinstance(value, tuple) else value
        found = given.pop(key, value)
        found = list(found) if isinstance(found, tuple) else found
        if found != value:
            raise ValueError(f"{name} has {key}={found!r}, but ours takes {value!r}.")
    if unknown := sorted(set(given) - _NO_MATTER):
        raise ValueError(f"{name} has the settings {', '.join(unknown)}, of which ours knows nothing.")


def _conv(theirs: str, ours: str) -> dict[str, str]:
    return {f"{theirs}.conv": f"{ours}.conv", f"{theirs}.bn": f"{ours}.norm"}


def _pooling_last(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """Move the pooled branch from the first input channels of the projection to the last."""
    key = f"{prefix}aspp.projection.conv.weight"
    if key not in tensors:  # no pyramid
        return tensors
    weight = tensors[key]
    width = weight.shape[0]  # of every branch
    return {**tensors, key: torch.cat([weight[:, width:], weight[:, :width]], dim=1)}  # (C, C * branches, 3, 3)


def _part(tensors: Tensors, prefix: str) -> dict[str, torch.Tensor]:
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
