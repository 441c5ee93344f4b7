"""TensorFlow's DeepLab (`research/deeplab` of tensorflow/models) under our names, from checkpoints of TensorFlow 1.

What differs silently is carried over: an epsilon of 1e-3 in the backbone and 1e-5 in the head, slow running
statistics, image-level features before the other branches of the pyramid, dropout of single values after it, aligned
corners, and pictures scaled to [-1, 1]. The names of the variables are those of `deeplab/model.py`,
`deeplab/core/xception.py` and `slim/nets/mobilenet/mobilenet_v2.py`.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from .conversion import BACKBONE, HEAD, Conversion, Tensors, checked, rename, require
from .modeling_deeplabv3 import DeepLabV3Config
from .modeling_deeplabv3plus import DeepLabV3PlusConfig
from .tf_checkpoint import TFCheckpoint
from .tf_mobilenet import TF_MOBILENET, fit_channels
from .tf_xception import XCEPTIONS

_NAME = "TensorFlow's DeepLab"
_RATES = (6, 12, 18)  # at output stride 16, in all published models that have dilated branches

# What optimizers save beside a variable, and counters of the training loop.
_AVERAGE = "ExponentialMovingAverage"
_LEFTOVERS = re.compile(rf"(^|/)(global_step|beta[12]_power|Momentum|Adam(_1)?|RMSProp(_1)?|Adagrad|{_AVERAGE})$")

_LEAVES = {
    "weights": "weight",
    "depthwise_weights": "weight",
    "biases": "bias",
    "gamma": "weight",
    "beta": "bias",
    "moving_mean": "running_mean",
    "moving_variance": "running_var",
}
# Blocks of MobileNetV2's stages, which TensorFlow counts through.
_MOBILENET_STAGES = (1, 2, 3, 4, 3, 3, 1)


def from_tf_checkpoint(
    path: str | Path,
    *,
    output_stride: int | None = None,
    atrous_rates: Sequence[int] | None = None,
    image_pooling_crop_size: Sequence[int] | int | None = None,
    multi_grid: Sequence[int] | None = None,
) -> Conversion:
    """Convert a checkpoint with the backbone Xception-41, -65, -71 or MobileNetV2.

    With the variables of a decoder it becomes DeepLabv3+, else DeepLabv3. The arguments bear the names of the flags
    that the network was trained with; the tensors tell none of them.

    Args:
        path: Prefix of the checkpoint (`…/model.ckpt-30000`), one of its files, or its folder.
        output_stride: 8, 16 or 32; None: 16.
        atrous_rates: Rates of the dilated branches at this output stride; None: 6, 12, 18 at 16, and 12, 24, 36 at 8.
        image_pooling_crop_size: Height and width, or side, in pixels of the window that image-level features average;
            None: the whole picture, as in evaluation on crops that hold it.
        multi_grid: Factors of the rates in Xception's last block.

    Raises:
        ValueError: If the checkpoint is damaged, or is not that of such a network, with the list of what differs.
    """
    checkpoint = TFCheckpoint(path)
    names = [name for name in checkpoint if not _LEFTOVERS.search(name)]
    tensors = {}
    for name in names:
        key, tensor = _to_torch(name, checkpoint[name])
        tensors[key] = tensor
    fields, modules = _backbone(tensors)
    stride = output_stride or 16
    fields |= {"output_stride": stride, "align_corners": True, "pooling_window": image_pooling_crop_size}
    fields |= {"norm_eps": 1e-5, "norm_momentum": 0.0003, "multi_grid": multi_grid}
    fields |= {"aspp_dropout": 0.1, "classifier_dropout": 0.0}
    config_class, head_fields, head_modules = _head(tensors)
    branches = _count_branches(tensors)
    if atrous_rates is None and branches not in (0, len(_RATES)):
        raise ValueError(f"{_NAME} of {path} has {branches} dilated branches: give their atrous_rates.")
    rates = [rate * 16 // stride for rate in _RATES[:branches]] if atrous_rates is None else list(atrous_rates)
    if len(rates) != branches:
        raise ValueError(f"{_NAME} was given the atrous rates {rates}, but has {branches} dilated branches.")
    config = config_class(**fields, **head_fields, atrous_rates=rates, absolute_rates=True)
    renamed = rename(tensors, modules | head_modules, f"{_NAME} of {path}")
    config, converted = checked(config, _pooling_last(_with_counters(renamed)), f"{_NAME} of {path}")
    preprocessing = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "align_corners": True, "do_resize": False}
    return Conversion(config, converted, preprocessing, _notes(checkpoint, config, output_stride, atrous_rates))


def _to_torch(name: str, tensor: torch.Tensor) -> tuple[str, torch.Tensor]:
    """Give a variable in PyTorch's layout and, behind its scope, PyTorch's name."""
    scope, _, leaf = name.rpartition("/")
    if leaf in ("weights", "depthwise_weights"):
        if tensor.dim() != 4:
            raise ValueError(f"{_NAME} has {name!r} of shape {list(tensor.shape)}: expected four dimensions.")
        # (h, w, in, out) to (out, in, h, w), and (h, w, in, multiplier) to (in * multiplier, 1, h, w)
        tensor = tensor.permute(3, 2, 0, 1) if leaf == "weights" else tensor.permute(2, 3, 0, 1).flatten(0, 1)[:, None]
    if tensor.is_floating_point():
        tensor = tensor.float()
    return f"{scope}.{_LEAVES.get(leaf, leaf)}", tensor.contiguous()


def _backbone(tensors: Tensors) -> tuple[dict[str, Any], dict[str, str]]:
    """Fields of the configuration, and our names of the backbone's modules."""
    scopes = sorted({re.split(r"[/.]", key)[0] for key in tensors})
    for name in XCEPTIONS:
        scope = name.replace("xception", "xception_").removesuffix("_tf")
        if scope in scopes:
            return {"backbone": name}, _xception_modules(scope, *XCEPTIONS[name])
    if "MobilenetV2" in scopes:
        blocks = [f"MobilenetV2/{name}" for name in ("Conv", *(f"{block}/project" for block in _mobilenet_blocks()))]
        outputs = [blocks[0], *(blocks[sum(_MOBILENET_STAGES[: i + 1])] for i in range(len(_MOBILENET_STAGES)))]
        widths = [require(tensors, f"{scope}.weight", _NAME).shape[0] for scope in outputs]
        return {"backbone": TF_MOBILENET, "backbone_kwargs": fit_channels(widths)}, _mobilenet_modules()
    raise ValueError(
        f"The checkpoint has variables in the scopes {', '.join(scopes[:20])}: expected those of {_NAME} with the "
        "backbone xception_41, xception_65, xception_71 or MobilenetV2. (Its ResNets stride in the last unit of a "
        "block, which no backbone of timm does; MobileNetV3, PNASNet and HNASNet are not read either.)"
    )


def _layer(theirs: str, conv: str, norm: str) -> dict[str, str]:
    return {theirs: conv, f"{theirs}/BatchNorm": norm}


def _xception_modules(scope: str, entry: Sequence[Any], middle: int) -> dict[str, str]:
    blocks = [f"entry_flow/block{number}/unit_1" for number in range(1, len(entry) + 1)]
    blocks += [f"middle_flow/block1/unit_{number}" for number in range(1, middle + 1)]
    blocks += [f"exit_flow/block{number}/unit_1" for number in (1, 2)]
    modules: dict[str, str] = {}
    for number in (1, 2):
        ours = f"{BACKBONE}.stem_{number - 1}"
        modules |= _layer(f"{scope}/entry_flow/conv1_{number}", f"{ours}.conv", f"{ours}.bn")
    for number, block in enumerate(blocks):
        theirs, ours = f"{scope}/{block}/xception_module", f"{BACKBONE}.blocks_{number}"
        modules |= _layer(f"{theirs}/shortcut", f"{ours}.shortcut.conv", f"{ours}.shortcut.bn")
        for unit in (1, 2, 3):
            conv = f"{ours}.stack.conv{unit}"
            for kind, short in (("depthwise", "dw"), ("pointwise", "pw")):
                modules |= _layer(
                    f"{theirs}/separable_conv{unit}_{kind}", f"{conv}.conv_{short}", f"{conv}.bn_{short}"
                )
    return modules


def _mobilenet_blocks() -> list[str]:
    return ["expanded_conv", *(f"expanded_conv_{number}" for number in range(1, sum(_MOBILENET_STAGES)))]


def _mobilenet_modules() -> dict[str, str]:
    modules = _layer("MobilenetV2/Conv", f"{BACKBONE}.conv_stem", f"{BACKBONE}.bn1")
    places = [f"blocks.{stage}.{block}" for stage, depth in enumerate(_MOBILENET_STAGES) for block in range(depth)]
    for block, place in zip(_mobilenet_blocks(), places, strict=True):
        layers = {"expand": "conv_pw", "depthwise": "conv_dw", "project": "conv_pwl"}
        if place == places[0]:  # which does not expand
            layers = {"depthwise": "conv_dw", "project": "conv_pw"}
        for number, (theirs, ours) in enumerate(layers.items(), start=1):
            place_of_layer = f"{BACKBONE}.{place}"
            modules |= _layer(
                f"MobilenetV2/{block}/{theirs}", f"{place_of_layer}.{ours}", f"{place_of_layer}.bn{number}"
            )
    return modules


def _count_branches(tensors: Tensors) -> int:
    scopes = {re.sub(r"_(depthwise|pointwise)$", "", key.rpartition(".")[0]) for key in tensors}
    return sum(re.fullmatch(r"aspp[1-9]\d*", scope) is not None for scope in scopes)


def _head(tensors: Tensors) -> tuple[type[DeepLabV3Config], dict[str, Any], dict[str, str]]:
    """Class and fields of the configuration, and our names of the head's modules."""
    if "concat_projection.weight" not in tensors:
        raise ValueError(
            f"{_NAME} needs the variables of a pyramid (aspp0, concat_projection), but was given those of "
            f"{', '.join(sorted({re.split('[/.]', key)[0] for key in tensors})[:10])}: logits straight from "
            "the backbone and searched cells (dense prediction cell) are not read."
        )
    outputs = sorted({key.rpartition(".")[0] for key in tensors if key.startswith("logits/")})
    if len(outputs) != 1:
        raise ValueError(f"{_NAME} has the outputs {', '.join(outputs) or 'none'}: expected one, logits/semantic.")
    branches = _count_branches(tensors)
    fields: dict[str, Any] = {
        "hidden_size": tensors["concat_projection.weight"].shape[0],
        "use_image_pooling": "image_pooling.weight" in tensors,
        "num_labels": require(tensors, f"{outputs[0]}.weight", _NAME).shape[0],
    }
    modules = {outputs[0]: "classifier"}
    for theirs, ours in {
        "image_pooling": "image_pooling",
        "aspp0": "branches.0",
        "concat_projection": "projection",
    }.items():
        modules |= _conv(theirs, f"{HEAD}.aspp.{ours}")
    dilated = {f"aspp{number}": f"{HEAD}.aspp.branches.{number}" for number in range(1, branches + 1)}
    separable = "aspp1_depthwise.weight" in tensors
    if not any(key.startswith("decoder/") for key in tensors):
        if separable:
            raise ValueError(f"{_NAME} has separable convolutions in its pyramid, which ours has with a decoder only.")
        for theirs, ours in dilated.items():
            modules |= _conv(theirs, ours)
        return DeepLabV3Config, fields, modules
    separable = "decoder/decoder_conv0_depthwise.weight" in tensors
    fields["separable"] = separable
    fields["low_level_channels"] = require(tensors, "decoder/feature_projection0.weight", _NAME).shape[0]
    modules |= _conv("decoder/feature_projection0", f"{HEAD}.low_level_projection")
    refining = [f"decoder/decoder_conv{number}" for number in (0, 1)]
    if not separable:
        refining = [f"decoder/decoder_conv0/decoder_conv0_{number}" for number in (1, 2)]
    dilated |= {theirs: f"{HEAD}.refinement.{number}" for number, theirs in enumerate(refining)}
    for theirs, ours in dilated.items():
        if separable:
            modules |= _layer(f"{theirs}_depthwise", f"{ours}.depthwise", f"{ours}.depthwise_norm")
            modules |= _conv(f"{theirs}_pointwise", f"{ours}.pointwise")
        else:
            modules |= _conv(theirs, ours)
    return DeepLabV3PlusConfig, fields, modules


def _conv(theirs: str, ours: str) -> dict[str, str]:
    return _layer(theirs, f"{ours}.conv", f"{ours}.norm")


def _with_counters(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Add the number of batches seen, which TensorFlow does not count."""
    counters = {
        key.replace("running_mean", "num_batches_tracked"): torch.tensor(0)
        for key in tensors
        if key.endswith(".running_mean")
    }
    return {**tensors, **counters}


def _pooling_last(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Move the image-level features from the first input channels of the projection to the last."""
    if f"{HEAD}.aspp.image_pooling.conv.weight" in tensors:
        width = tensors[f"{HEAD}.aspp.image_pooling.conv.weight"].shape[0]
        weight = tensors[f"{HEAD}.aspp.projection.conv.weight"]
        joined = torch.cat([weight[:, width:], weight[:, :width]], dim=1)  # (C, C * branches, 1, 1)
        tensors = {**tensors, f"{HEAD}.aspp.projection.conv.weight": joined}
    return tensors


def _notes(
    checkpoint: TFCheckpoint,
    config: DeepLabV3Config,
    output_stride: int | None,
    atrous_rates: Sequence[int] | None,
) -> list[str]:
    """Say what the checkpoint does not tell."""
    assumed = [
        f"{name} {value}"
        for name, value, given in (
            ("output stride", config.output_stride, output_stride),
            ("atrous rates", ", ".join(map(str, config.atrous_rates)), atrous_rates),
        )
        if given is None and value
    ]
    notes = []
    if assumed:
        notes.append(
            f"The tensors do not tell output stride and atrous rates: taken as published ({'; '.join(assumed)})."
        )
    if config.use_image_pooling and config.pooling_window is None:
        notes.append(
            "Image-level features average the whole picture; TensorFlow's averages a crop "
            "(image_pooling_crop_size, or the crop of the evaluation, to which smaller pictures are padded)."
        )
    notes.append("Names of the classes are not in the checkpoint.")
    if any(name.endswith(f"/{_AVERAGE}") for name in checkpoint):
        notes.append("The checkpoint holds moving averages of the weights too; the weights themselves were taken.")
    return notes
