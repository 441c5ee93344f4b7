"""TensorFlow Lite models of DeepLabv3 and DeepLabv3+ on MobileNetV2 under our names.

Exports of TensorFlow's DeepLab (research/deeplab in tensorflow/models): any width, output stride 8 to 32, with or
without atrous branches and decoder, in floating point or 8 bit. The graph is followed from the picture to the logits;
names in the file play no part. Batch normalisation is part of the convolutions there; here each gets back one that
multiplies by exactly 1 and adds the bias.
"""

import io
import struct
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .conversion import BACKBONE, HEAD, Conversion, checked
from .label_sets import VOC_CLASSES, voc_palette
from .modeling_deeplabv3 import DeepLabV3Config
from .modeling_deeplabv3plus import DeepLabV3PlusConfig
from .state_dict import plain_text
from .tf_mobilenet import TF_MOBILENET, fit_channels
from .tflite_layers import Layer, Network
from .tflite_reader import TfliteTensor, read_tflite

# Blocks of each stage of MobileNetV2 and the stride of its first one (arXiv 1801.04381, table 2).
_STAGES = ((1, 1), (2, 2), (3, 2), (4, 2), (3, 1), (3, 2), (1, 1))
_LOW_BLOCK = 2  # the map of stride 4 for a decoder is taken within the last block of the second stage
_BACKBONE_EPS, _HEAD_EPS, _HEAD_MOMENTUM = 1e-3, 1e-5, 3e-4  # of TensorFlow's DeepLab
_AFTER_LOGITS = ("resize", "arg_max", "softmax")
_LARGEST_LABEL_FILE = 1 << 16
_ARCHIVE_PART, _ARCHIVE_ENTRIES = 1 << 20, 32  # bytes at the end of the file and entries that are looked at
_BOUNDED = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # others inflate beyond what is asked for
_UNREADABLE = (
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
    ValueError,
    RuntimeError,
    OverflowError,
    OSError,
    EOFError,
)


@dataclass
class _Backbone:
    modules: dict[str, tuple[str, Layer]]  # our name of a convolution: that of its normalisation, and the layer
    fields: dict[str, Any]
    deepest: int
    low: int


@dataclass
class _Head:
    modules: dict[str, tuple[str, Layer]]
    fields: dict[str, Any]
    output: int
    resized: Layer | None = None  # what brings the context to the size of the map of stride 4


def from_tflite(source: str | Path | bytes, *, id2label: dict[int, str] | None = None) -> Conversion:
    """Convert a TensorFlow Lite model of DeepLabv3 or DeepLabv3+ on MobileNetV2.

    Args:
        source: A `.tflite` file or its content.
        id2label: Names of the classes; None: those of a label file within the model, else those of PASCAL VOC where
            there are 21 classes, which is stated in the notes.

    Raises:
        ValueError: If it is no such model, with what was found and what is expected.
        ImportError: If the package `tflite` is not installed.
    """
    data = source if isinstance(source, bytes) else Path(source).read_bytes()
    name = "The TensorFlow Lite model" if isinstance(source, bytes) else str(source)
    graph = read_tflite(source)
    try:
        network = Network(graph)
        backbone = _backbone(network)
        head = _head(network, backbone)
        logits, flags, tail = _logits(network, head)
    except ValueError as error:
        raise ValueError(f"{name} is no DeepLabv3 or DeepLabv3+ on MobileNetV2 that ours can do: {error}.") from error
    classes = len(logits.bias)
    labels, palette, label_note = _labels(data, classes, id2label)
    config = (DeepLabV3PlusConfig if head.resized else DeepLabV3Config)(
        backbone=TF_MOBILENET,
        **backbone.fields,
        **head.fields,
        **labels,
        palette=palette,
        variant="paper",
        absolute_rates=True,
        align_corners=flags["align_corners"],
        norm_eps=_HEAD_EPS,
        norm_momentum=_HEAD_MOMENTUM,
    )
    tensors = _tensors(backbone.modules | head.modules, logits)
    preprocessing, input_note = _preprocessing(network, graph.tensors[network.input])
    preprocessing["align_corners"] = config.align_corners
    notes = [label_note, input_note, *_notes(network, flags, tail, graph.tensors)]
    return Conversion(*checked(config, tensors, name), preprocessing, notes)


def _backbone(network: Network) -> _Backbone:
    """Follow the graph from the picture to the deepest map."""
    stem = _one(network, network.input, "conv", 3, "relu6")
    modules = {"conv_stem": ("bn1", stem)}
    widths, spatial, tensor, low, number = [len(stem.bias)], [stem], stem.output, -1, 0
    for stage, (depth, _) in enumerate(_STAGES):
        for block in range(depth):
            taken, place = tensor, f"blocks.{stage}.{block}"
            if stage > 0:
                modules[f"{place}.conv_pw"] = f"{place}.bn1", _one(network, tensor, "conv", 1, "relu6")
                tensor = modules[f"{place}.conv_pw"][1].output
            depthwise = _one(network, tensor, "depthwise", 3, "relu6")
            project = _one(network, depthwise.output, "conv", 1, "")
            first = 1 if stage == 0 else 2
            modules[f"{place}.conv_dw"] = f"{place}.bn{first}", depthwise
            modules[f"{place}.{'conv_pw' if stage == 0 else 'conv_pwl'}"] = f"{place}.bn{first + 1}", project
            spatial.append(depthwise)
            low = depthwise.output if number == _LOW_BLOCK else low
            tensor = project.output if block == 0 else _sum(network, taken, project)
            number += 1
        widths.append(len(project.bias))
    fields = {"backbone_kwargs": fit_channels(widths), **_strides(spatial)}
    named = {f"{BACKBONE}.{conv}": (f"{BACKBONE}.{norm}", layer) for conv, (norm, layer) in modules.items()}
    return _Backbone(named, fields, tensor, low)


def _one(network: Network, tensor: int, kind: str, size: int, activation: str) -> Layer:
    """Give the one convolution of this kind that takes a tensor."""
    users = network.users(tensor)
    fits = [
        user for user in users if user.kind == kind and user.weight.shape[2] == size and user.activation == activation
    ]
    if len(fits) != 1:
        found = "; ".join(map(str, users)) or "nothing"
        raise ValueError(
            f"after {network.graph.tensors[tensor].name!r} {found} was found, where one {size}×{size} {kind} "
            f"({activation or 'linear'}) is expected"
        )
    return fits[0]


def _sum(network: Network, taken: int, project: Layer) -> int:
    """Give the sum of a block's input and output."""
    for user in network.users(project.output):
        if user.kind == "add" and sorted(user.inputs) == sorted([taken, project.output]):
            return user.output
    raise ValueError(f"the block that ends in {network.graph.tensors[project.output].name!r} does not add its input")


def _strides(spatial: Sequence[Layer]) -> dict[str, Any]:
    """Find the output stride whose strides and rates these convolutions have."""
    found = [(layer.stride, layer.dilation) for layer in spatial]
    for output_stride in (8, 16, 32):
        for first in (False, True):
            expected, stride, rate = [(2, 1)], 2, 1
            for depth, native in _STAGES:
                before, dilated = rate, stride * native > output_stride
                rate, stride = (rate * native, stride) if dilated else (rate, stride * native)
                expected.append((1 if dilated else native, rate if first else before))
                expected += [(1, rate)] * (depth - 1)
            if found == expected:
                return {"output_stride": output_stride, "dilate_first_block": first}
    raise ValueError(f"its 3×3 convolutions have the strides and rates {found}, which are those of no output stride")


def _head(network: Network, backbone: _Backbone) -> _Head:
    """Follow the graph from the deepest map to what the classifier takes."""
    pyramid = _pyramid(network, backbone)
    resized = [user for user in network.users(pyramid.output) if user.kind == "resize"]
    if not resized:
        return pyramid
    low = _one(network, backbone.low, "conv", 1, "relu")
    joined = [user for user in network.users(low.output) if user.kind == "concat"]
    if len(joined) != 1 or joined[0].inputs != [resized[0].output, low.output]:
        raise ValueError("its decoder does not join the resized context and the map of stride 4, in this order")
    modules = pyramid.modules | _unit("low_level_projection", low)
    tensor = joined[0].output
    separable = any(user.kind == "depthwise" for user in network.users(tensor))
    for place in range(2):
        layers, tensor = _refining(network, tensor, separable)
        modules |= _unit(f"refinement.{place}", *layers)
    if pyramid.fields["atrous_rates"] and pyramid.fields["separable"] != separable:
        raise ValueError("its pyramid and its decoder are not both separable or both dense")
    fields = pyramid.fields | {"separable": separable, "low_level_channels": len(low.bias)}
    return _Head(modules, fields, tensor, resized[0])


def _refining(network: Network, tensor: int, separable: bool) -> tuple[list[Layer], int]:
    layers = [_one(network, tensor, "depthwise" if separable else "conv", 3, "relu")]
    if separable:
        layers.append(_one(network, layers[0].output, "conv", 1, "relu"))
    return layers, layers[-1].output


def _pyramid(network: Network, backbone: _Backbone) -> _Head:
    """Read the branches on the deepest map, which may stand in any order."""
    branches: dict[int, list[Layer]] = {}
    for user in network.users(backbone.deepest):
        layers = [user]
        while layers[-1].kind != "concat" and len(network.users(layers[-1].output)) == 1:
            layers += network.users(layers[-1].output)
        branches[layers[-2].output if len(layers) > 1 else user.output] = layers
    joined = {id(layers[-1]): layers[-1] for layers in branches.values()}
    concat = next(iter(joined.values()), None)
    if len(joined) != 1 or concat is None or concat.kind != "concat" or sorted(concat.inputs) != sorted(branches):
        raise ValueError("the branches on its deepest map are not joined by one concatenation")
    ordered = [branches[tensor][:-1] for tensor in concat.inputs]
    kinds = [_branch_kind(layers) for layers in ordered]
    if kinds.count("point") != 1 or kinds.count("pool") > 1 or {"dense", "separable"} <= set(kinds):
        raise ValueError(
            f"its pyramid has the branches {', '.join(kinds)}, where one 1×1 and one pooling are expected"
        )
    dilated = [place for place, kind in enumerate(kinds) if kind in ("dense", "separable")]
    pooled = [place for place, kind in enumerate(kinds) if kind == "pool"]
    order = [kinds.index("point"), *dilated, *pooled]
    modules: dict[str, tuple[str, Layer]] = {}
    for number, place in enumerate(order[: len(order) - len(pooled)]):
        modules |= _unit(f"aspp.branches.{number}", *ordered[place])
    fields: dict[str, Any] = {
        "atrous_rates": [ordered[place][0].dilation for place in dilated],
        "separable": "separable" in kinds,
        "use_image_pooling": bool(pooled),
    }
    for place in pooled:
        modules |= _unit("aspp.image_pooling", ordered[place][1])
        window = list(ordered[place][0].options["window"])  # type: ignore[call-overload]
        if window != list(network.shape(backbone.deepest)[1:3]):
            fields["pooling_window"] = [edge * backbone.fields["output_stride"] for edge in window]
    projection = _one(network, concat.output, "conv", 1, "relu")
    width = len(projection.bias)
    if projection.weight.shape[1] != width * len(order):
        raise ValueError(f"its {len(order)} branches and their projection are not all {width} channels wide")
    parts = projection.weight.reshape(width, len(order), width, 1, 1)
    projection.weight = parts[:, order].reshape(projection.weight.shape)  # ours are [1×1, rates …, pooling]
    modules |= _unit("aspp.projection", projection)
    return _Head(modules, fields | {"hidden_size": width}, projection.output)


def _branch_kind(layers: Sequence[Layer]) -> str:
    shape = [(layer.kind, layer.activation, layer.weight.shape[2] if layer.weight.size else 0) for layer in layers]
    known = {
        "point": [("conv", "relu", 1)],
        "dense": [("conv", "relu", 3)],
        "separable": [("depthwise", "relu", 3), ("conv", "relu", 1)],
        "pool": [("pool", "", 0), ("conv", "relu", 1), ("resize", "", 0)],
    }
    for kind, expected in known.items():
        if shape == expected:
            return kind
    raise ValueError(f"a branch on its deepest map is {', '.join(map(str, layers))}")


def _unit(name: str, *layers: Layer) -> dict[str, tuple[str, Layer]]:
    """Our names of a convolution of the head, or of a depthwise and a pointwise one."""
    if len(layers) == 1:
        return {f"{HEAD}.{name}.conv": (f"{HEAD}.{name}.norm", layers[0])}
    pointwise = f"{HEAD}.{name}.pointwise"
    return {
        f"{HEAD}.{name}.depthwise": (f"{HEAD}.{name}.depthwise_norm", layers[0]),
        f"{pointwise}.conv": (f"{pointwise}.norm", layers[1]),
    }


def _logits(network: Network, head: _Head) -> tuple[Layer, dict[str, bool], list[str]]:
    """Find the classifier, how its logits are resized, and what follows it."""
    logits = _one(network, head.output, "conv", 1, "")
    tail: list[Layer] = []
    users = network.users(logits.output)
    while users:
        if len(users) > 1 or users[0].kind not in _AFTER_LOGITS:
            raise ValueError(f"its logits go to {', '.join(map(str, users))}: expected are {', '.join(_AFTER_LOGITS)}")
        tail.append(users[0])
        users = network.users(users[0].output)
    resized = [layer for layer in tail if layer.kind == "resize"]
    # TensorFlow's DeepLab aligns corners everywhere, should the export end before.
    flags = {"align_corners": True, "half_pixel_centers": False, "is_known": bool(resized)}
    for layer in resized[-1:]:
        flags |= _alignment(layer)
    if head.resized:
        within = _alignment(head.resized)
        if not any(within.values()) or within["align_corners"] != flags["align_corners"]:
            raise ValueError(f"its decoder resizes with {within} and its logits with {flags}: ours does both alike")
    return logits, flags, [layer.kind for layer in tail]


def _alignment(resize: Layer) -> dict[str, bool]:
    return {key: bool(resize.options.get(key, False)) for key in ("align_corners", "half_pixel_centers")}


def _tensors(modules: dict[str, tuple[str, Layer]], logits: Layer) -> dict[str, torch.Tensor]:
    tensors = {"classifier.weight": torch.from_numpy(logits.weight), "classifier.bias": torch.from_numpy(logits.bias)}
    for conv, (norm, layer) in modules.items():
        eps = _BACKBONE_EPS if conv.startswith(BACKBONE) else _HEAD_EPS
        channels = len(layer.bias)
        tensors[f"{conv}.weight"] = torch.from_numpy(np.ascontiguousarray(layer.weight))
        tensors[f"{norm}.weight"] = torch.ones(channels)
        tensors[f"{norm}.bias"] = torch.from_numpy(layer.bias)
        tensors[f"{norm}.running_mean"] = torch.zeros(channels)
        tensors[f"{norm}.running_var"] = torch.full((channels,), 1 - eps)  # plus epsilon it is 1
        tensors[f"{norm}.num_batches_tracked"] = torch.tensor(0)
    return tensors


def _preprocessing(network: Network, tensor: TfliteTensor) -> tuple[dict[str, Any], str]:
    """Mean and standard deviation, of pictures of 0 … 1, that give the values the stem takes."""
    factor, offset = np.ones(3), np.zeros(3)
    if tensor.scale.size == 1:
        signed = 128 if tensor.dtype == "int8" else 0  # bytes minus 128
        factor, offset = factor * tensor.scale, offset - tensor.scale * (tensor.zero_point + signed)
    elif tensor.dtype == "float32" and not network.input_steps:
        return {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}, (
            "The file does not tell the range of its floating-point input: that of TensorFlow's DeepLab on "
            "MobileNetV2 is assumed, pixel values / 127.5 - 1."
        )
    for kind, values in network.input_steps:
        factor, offset = (factor, offset + values) if kind == "add" else (factor * values, offset * values)
    if factor.shape != (3,) or not (factor > 0).all():
        raise ValueError(
            f"The picture is multiplied by {factor.tolist()}: expected is a factor above 0 for 3 channels."
        )
    mean, std = (-offset / (255 * factor)).round(6), (1 / (255 * factor)).round(6)
    note = f"The input's range is that of the file: mean {mean.tolist()}, standard deviation {std.tolist()} of 0 … 1."
    return {"image_mean": mean.tolist(), "image_std": std.tolist()}, note


def _labels(
    data: bytes, classes: int, id2label: dict[int, str] | None
) -> tuple[dict[str, Any], list[list[int]] | None, str]:
    if id2label is not None:
        return {"id2label": id2label}, None, "The names of the classes were given by hand."
    lack = "The file names no classes"
    try:
        names = _packed_labels(data, classes)
    except _UNREADABLE:
        names, lack = [], "The archive of labels within the file cannot be read and is left out"
    if names:
        return {"id2label": dict(enumerate(names))}, None, "The names of the classes are those within the file."
    if classes == len(VOC_CLASSES):
        note = f"{lack}: the {classes} classes are taken to be those of PASCAL VOC 2012."
        return {"id2label": dict(enumerate(VOC_CLASSES))}, voc_palette(), note
    return {"num_labels": classes}, None, f"{lack}: the {classes} classes are numbered."


def _packed_labels(data: bytes, classes: int) -> list[str]:
    """Names in a text file with a line for each class, which TensorFlow Lite's metadata appends as a ZIP archive.

    Raises one of `_UNREADABLE` if there is an archive that is damaged.
    """
    packed = io.BytesIO(data[-_ARCHIVE_PART:])
    if not zipfile.is_zipfile(packed):
        return []
    with zipfile.ZipFile(packed) as archive:
        for entry in archive.infolist()[:_ARCHIVE_ENTRIES]:
            is_small = entry.file_size <= _LARGEST_LABEL_FILE and entry.compress_type in _BOUNDED
            if is_small and entry.filename.endswith(".txt"):
                with archive.open(entry) as file:
                    text = file.read(_LARGEST_LABEL_FILE).decode("utf-8")
                names = [plain_text(line) for line in text.strip().splitlines()]
                if len(names) == classes == len(set(names)) and all(names):
                    return names
    return []


def _notes(network: Network, flags: dict[str, bool], tail: list[str], tensors: Sequence[TfliteTensor]) -> list[str]:
    height, width = network.shape(network.input)[1:3]
    notes = [f"The file takes pictures of {height}×{width} pixels, ours of any size."] if height > 1 else []
    notes.append(
        "Batch normalisation was folded into the convolutions: its statistics are not known. Fine-tune with small "
        "learning rates, or expect the first steps to change the network more than usual."
    )
    if any(tensor.scale.size and tensor.stored is not None for tensor in tensors):
        notes.append("8-bit weights were brought to floating point; activations are no longer rounded to 8 bit.")
    if not flags["is_known"]:
        notes.append("The file does not resize its logits: corners are aligned as in TensorFlow's DeepLab.")
    elif not flags["align_corners"] and not flags["half_pixel_centers"]:
        notes.append(
            "The file resizes its logits with neither corners nor centres aligned, which ours cannot: masks may lie "
            "up to half a cell of the logits aside."
        )
    if "arg_max" in tail:
        notes.append("The file gives classes, not scores; ours gives the scores they are chosen from.")
    return notes
