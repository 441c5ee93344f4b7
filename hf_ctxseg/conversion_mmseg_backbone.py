"""mmsegmentation's backbones as timm's networks: `ResNet`, `ResNetV1c`, `ResNetV1d` and `MobileNetV2`.

They dilate otherwise than timm. In blocks of two 3×3 convolutions (depths 18 and 34) only the first is dilated; in a
stage of MobileNetV2 only the first block is; multi-grid rates are taken as they are; the average pooling in the
shortcut of ResNetV1d is left out of dilated stages. `backbone_rates` and networks of our own carry that.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from .configuration_ctxseg import CtxSegConfig, check_choice

NORM = {"type": "BN", "eps": 1e-5, "momentum": 0.1}
# What serves training alone, or is told by the tensors' shapes.
_NO_MATTER = {"type", "init_cfg", "pretrained", "with_cp", "norm_eval", "frozen_stages", "zero_init_residual"}
_NO_MATTER |= {"loss_decode", "sampler", "ignore_index", "in_channels", "channels", "num_classes", "threshold"}
# What mmsegmentation takes where its config says nothing, and what alone ours can do.
_RESNET_FIXED = {"stem_channels": 64, "base_channels": 64, "num_stages": 4, "style": "pytorch", "dcn": None}
_RESNET_FIXED |= {"plugins": None, "conv_cfg": None, "stage_with_dcn": (False,) * 4, "out_indices": (0, 1, 2, 3)}
_MOBILENET_FIXED = {"out_indices": (1, 2, 4, 6), "conv_cfg": None, "act_cfg": {"type": "ReLU6"}}
_BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}
_BASIC = (18, 34)
_DEEP_STEM = {"stem_type": "deep", "stem_width": 32}  # of ResNet-18 and 34, for which timm has no name
_WIDTHS = {width: f"mobilenetv2_{round(100 * width):03d}" for width in (0.35, 0.5, 0.75, 1.0, 1.4)}
_MOBILENET_BLOCKS = (1, 2, 3, 4, 3, 3, 1)
_MOBILENET_STRIDES = (1, 2, 2, 2, 1, 2, 1)


def backbone_fields(given: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """Give the configuration's fields for a backbone of mmsegmentation, and our names of its modules.

    Args:
        given: The `backbone` dict of its config.

    Raises:
        ValueError: If timm has no such network, with what was found.
    """
    kinds = ["ResNet", "ResNetV1c", "ResNetV1d", "MobileNetV2"]
    check_choice("the type of mmsegmentation's backbone", given.get("type"), kinds)
    return _mobilenet(dict(given)) if given["type"] == "MobileNetV2" else _resnet(dict(given))


def _resnet(given: dict[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    kind, depth = given["type"], given.pop("depth", None)
    name = f"mmsegmentation's {kind}-{depth}"
    if depth not in _BLOCKS:
        raise ValueError(f"{name} must have one of the depths {', '.join(map(str, _BLOCKS))}.")
    norm = norm_fields(given.pop("norm_cfg", NORM), name)
    if norm != {"norm_eps": NORM["eps"], "norm_momentum": NORM["momentum"]}:
        raise ValueError(f"{name} has the normalisation {norm}, but ours takes {NORM} in the backbone.")
    deep_stem = given.pop("deep_stem", kind != "ResNet")
    averaged = given.pop("avg_down", kind == "ResNetV1d")
    stride, rates = _dilation(given.pop("strides", (1, 2, 2, 2)), given.pop("dilations", (1, 1, 1, 1)), name)
    if averaged and not deep_stem:
        raise ValueError(f"{name} has avg_down without deep_stem, which timm has not: ours takes both or none.")
    fields: dict[str, Any] = {
        "backbone": f"resnet{depth}{'d' if averaged else 'c' if deep_stem and depth not in _BASIC else ''}",
        "num_channels": given.pop("in_channels", 3),
        "output_stride": stride,
    }
    if averaged and rates[-1] > 1:
        fields["backbone"] += "_mmseg"
    if depth in _BASIC and deep_stem and not averaged:
        fields["backbone_kwargs"] = dict(_DEEP_STEM)
    if not given.pop("contract_dilation", False) and rates[-1] > 1:
        fields["dilate_first_block"] = True
    fields |= _exceptions(depth, rates, given.pop("multi_grid", None), name)
    expect_fixed(given, _RESNET_FIXED, name)
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


def _exceptions(depth: int, rates: Sequence[int], multi_grid: Sequence[int] | None, name: str) -> dict[str, Any]:
    """What of the rates must be said beside those of the stages."""
    fields: dict[str, Any] = {}
    exceptions = {}
    if multi_grid is not None:
        if len(multi_grid) != _BLOCKS[depth][-1]:
            raise ValueError(
                f"{name} has the multi-grid rates {list(multi_grid)}, but its last stage has {_BLOCKS[depth][-1]} "
                "blocks: one for each is expected."
            )
        if depth not in _BASIC and not any(rate % rates[-1] for rate in multi_grid):
            fields["multi_grid"] = [rate // rates[-1] for rate in multi_grid]  # factors, as the paper has them
        else:
            layer = "conv1" if depth in _BASIC else "conv2"
            exceptions = {f"layer4.{block}.{layer}": rate for block, rate in enumerate(multi_grid)}
    if depth in _BASIC:
        for stage, (blocks, rate) in enumerate(zip(_BLOCKS[depth], rates, strict=True), start=1):
            if rate > 1:
                exceptions |= {f"layer{stage}.{block}.conv2": 1 for block in range(blocks)}
    return fields | ({"backbone_rates": exceptions} if exceptions else {})


def _mobilenet(given: dict[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    name = "mmsegmentation's MobileNetV2"
    width = given.pop("widen_factor", 1.0)
    if width not in _WIDTHS:
        raise ValueError(f"{name} has widen_factor={width!r}, but timm has the widths {list(_WIDTHS)}.")
    norm = norm_fields(given.pop("norm_cfg", NORM), name)
    strides = given.pop("strides", _MOBILENET_STRIDES)
    dilations = given.pop("dilations", (1,) * 7)
    stride = 2 * math.prod(strides)
    expected = _mobilenet_strides(stride)
    if list(strides) != expected or len(dilations) != 7:
        raise ValueError(
            f"{name} has the strides {list(strides)} and the dilations {list(dilations)}: expected are seven of each, "
            f"and strides that are left out from the last on ({expected} for output stride {stride})."
        )
    rates: dict[str, int] = {}
    for stage, (blocks, rate) in enumerate(zip(_MOBILENET_BLOCKS, dilations, strict=True)):
        if rate > 1 or math.prod(_MOBILENET_STRIDES[: stage + 1]) > math.prod(strides[: stage + 1]):
            rates |= {f"blocks.{stage}.{block}.conv_dw": rate if block == 0 else 1 for block in range(blocks)}
    fields: dict[str, Any] = {"backbone": _WIDTHS[width], "output_stride": stride}
    if rates:
        fields["backbone_rates"] = rates
    if norm != {"norm_eps": NORM["eps"], "norm_momentum": NORM["momentum"]}:
        fields["backbone_kwargs"] = {"bn_eps": norm["norm_eps"], "bn_momentum": norm["norm_momentum"]}
    expect_fixed(given, _MOBILENET_FIXED, name)
    return fields, _mobilenet_modules()


def _mobilenet_strides(output_stride: int) -> list[int]:
    """The strides of the stages; those beyond the output stride are left out."""
    strides, reached = [], 2
    for stride in _MOBILENET_STRIDES:
        strides.append(stride if reached * stride <= output_stride else 1)
        reached *= strides[-1]
    return strides


def _mobilenet_modules() -> dict[str, str]:
    modules = {"conv1.conv": "conv_stem", "conv1.bn": "bn1"}
    for stage, blocks in enumerate(_MOBILENET_BLOCKS):
        layers = ("conv_dw", "conv_pw") if stage == 0 else ("conv_pw", "conv_dw", "conv_pwl")
        for block in range(blocks):
            for place, layer in enumerate(layers):
                theirs, ours = f"layer{stage + 1}.{block}.conv.{place}", f"blocks.{stage}.{block}"
                modules |= {f"{theirs}.conv": f"{ours}.{layer}", f"{theirs}.bn": f"{ours}.bn{place + 1}"}
    return modules


def backbone_section(config: CtxSegConfig) -> dict[str, Any]:
    """Describe the backbone of a configuration as mmsegmentation does, as far as it can be described there.

    Raises:
        ValueError: If mmsegmentation has no such network.
    """
    rates = config.backbone_rates or {}
    name = config.backbone.partition(".")[0]
    if name in _WIDTHS.values():
        kwargs = config.backbone_kwargs or {}
        norm = {"eps": kwargs.get("bn_eps", NORM["eps"]), "momentum": kwargs.get("bn_momentum", NORM["momentum"])}
        return {
            "type": "MobileNetV2",
            "widen_factor": next(width for width, known in _WIDTHS.items() if known == name),
            "strides": tuple(_mobilenet_strides(config.output_stride)),
            "dilations": tuple(rates.get(f"blocks.{stage}.0.conv_dw", 1) for stage in range(7)),
            "norm_cfg": {"type": "BN", **norm},
        }
    found = name.removesuffix("_mmseg").removeprefix("resnet")
    depth = int(found.rstrip("cd")) if found.rstrip("cd").isdigit() else 0
    if depth not in _BLOCKS or not name.startswith("resnet"):
        raise ValueError(
            f"its backbones are MobileNetV2 and the ResNets, also of types c and d, of the depths "
            f"{', '.join(map(str, _BLOCKS))}."
        )
    deep = found[-1] in "cd" or bool(config.backbone_kwargs)
    rate = 32 // config.output_stride
    layer = "conv1" if depth in _BASIC else "conv2"
    grid = [rates.get(f"layer4.{block}.{layer}") for block in range(_BLOCKS[depth][-1])]
    if config.multi_grid is not None:
        grid = [factor * rate for factor in config.multi_grid]
    return {
        "type": "ResNetV1d" if found[-1] == "d" else "ResNetV1c" if deep else "ResNet",
        "depth": depth,
        "in_channels": config.num_channels,
        "strides": (1, 2, 2 if config.output_stride > 8 else 1, 2 if config.output_stride > 16 else 1),
        "dilations": (1, 1, max(1, 16 // config.output_stride), rate),
        "contract_dilation": not config.dilate_first_block,
        "norm_cfg": dict(NORM),
        **({} if None in grid else {"multi_grid": tuple(grid)}),
    }


def norm_fields(given: Mapping[str, Any] | None, name: str) -> dict[str, Any]:
    """Give epsilon and momentum of a `norm_cfg`; raises `ValueError` where it is not batch normalisation."""
    if given is None or given.get("type") not in ("BN", "SyncBN"):
        raise ValueError(f"{name} has the norm_cfg {given}, but ours takes batch normalisation (BN or SyncBN).")
    return {"norm_eps": given.get("eps", NORM["eps"]), "norm_momentum": given.get("momentum", NORM["momentum"])}


def expect_fixed(given: dict[str, Any], fixed: Mapping[str, Any], name: str) -> None:
    """Raise `ValueError` where something is set to another value than ours takes, or is not known."""
    for key, value in fixed.items():
        value = list(value) if isinstance(value, tuple) else value
        found = given.pop(key, value)
        found = list(found) if isinstance(found, tuple) else found
        if found != value:
            raise ValueError(f"{name} has {key}={found!r}, but ours takes {value!r}.")
    if unknown := sorted(set(given) - _NO_MATTER):
        raise ValueError(f"{name} has the settings {', '.join(unknown)}, of which ours knows nothing.")
