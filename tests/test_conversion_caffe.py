"""The converter of Caffe's DeepLab v2 against the network written out in plain functions of torch."""

import pytest
import torch
from peer_helpers import TOLERANCE, build, difference
from torch.nn import functional as F

from hf_ctxseg import CtxSegImageProcessor
from hf_ctxseg.conversion_caffe import from_caffe_deeplabv2

BLOCKS = (3, 4, 6, 3)
RATES = (2, 3, 5)
# Sizes at which the pooling of the stem rounds up (64, 63), and does not (65, 66).
SIZES = [(64, 48), (65, 65), (63, 66), (33, 131)]


def layer(tensors, name, generator, shape, gain=1.0):
    """A convolution and its normalisation, with statistics that keep the values' scale."""
    fan_in = shape[1] * shape[2] * shape[3]
    tensors[f"{name}.conv.weight"] = torch.randn(shape, generator=generator) * gain * fan_in**-0.5
    for kind, low, high in (("weight", 0.8, 1.6), ("bias", -0.2, 0.2), ("running_mean", -0.2, 0.2)):
        tensors[f"{name}.bn.{kind}"] = torch.empty(shape[0]).uniform_(low, high, generator=generator)
    tensors[f"{name}.bn.running_var"] = torch.empty(shape[0]).uniform_(0.6, 1.2, generator=generator)


def checkpoint(prefix="", shortcut="shortcut", aspp="aspp.c", classes=4):
    """Tensors of the port with ResNet-50; as files of torch before 0.4.1 they count no batches."""
    generator, tensors = torch.Generator().manual_seed(0), {}
    layer(tensors, f"{prefix}layer1.conv1", generator, (64, 3, 7, 7), gain=1 / 64)
    channels = 64
    for stage, depth in enumerate(BLOCKS, start=2):
        width = 32 * 2 ** (stage - 1)
        for block in range(1, depth + 1):
            name = f"{prefix}layer{stage}.block{block}"
            layer(tensors, f"{name}.reduce", generator, (width, channels, 1, 1))
            layer(tensors, f"{name}.conv3x3", generator, (width, width, 3, 3))
            layer(tensors, f"{name}.increase", generator, (4 * width, width, 1, 1), gain=0.3)
            if block == 1:
                layer(tensors, f"{name}.{shortcut}", generator, (4 * width, channels, 1, 1))
            channels = 4 * width
    for branch in range(len(RATES)):
        weight = torch.randn((classes, channels, 3, 3), generator=generator) * 0.01
        tensors[f"{prefix}{aspp}{branch}.weight"] = weight
        tensors[f"{prefix}{aspp}{branch}.bias"] = torch.randn(classes, generator=generator)
    return tensors


def conv_norm(tensors, name, x, relu=True, **arguments):
    x = F.conv2d(x, tensors[f"{name}.conv.weight"], **arguments)
    mean, variance = tensors[f"{name}.bn.running_mean"], tensors[f"{name}.bn.running_var"]
    x = F.batch_norm(x, mean, variance, tensors[f"{name}.bn.weight"], tensors[f"{name}.bn.bias"], eps=1e-5)
    return F.relu(x) if relu else x


def network(tensors, x):
    """The network within the multi-scale module, on blue, green, red; its tensors have the present names."""
    x = conv_norm(tensors, "layer1.conv1", x, stride=2, padding=3)
    x = F.max_pool2d(x, 3, stride=2, padding=1, ceil_mode=True)
    for stage, (depth, stride, rate) in enumerate(zip(BLOCKS, (1, 2, 1, 1), (1, 1, 2, 4), strict=True), start=2):
        for block in range(1, depth + 1):
            name, step = f"layer{stage}.block{block}", stride if block == 1 else 1
            y = conv_norm(tensors, f"{name}.reduce", x, stride=step)
            y = conv_norm(tensors, f"{name}.conv3x3", y, padding=rate, dilation=rate)
            y = conv_norm(tensors, f"{name}.increase", y, relu=False)
            shortcut = conv_norm(tensors, f"{name}.shortcut", x, relu=False, stride=step) if block == 1 else x
            x = F.relu(y + shortcut)
    branches = (
        F.conv2d(x, tensors[f"aspp.c{i}.weight"], tensors[f"aspp.c{i}.bias"], padding=rate, dilation=rate)
        for i, rate in enumerate(RATES)
    )
    return sum(branches)


def at_three_scales(tensors, x):
    logits = network(tensors, x)
    found = [logits]
    for scale in (0.5, 0.75):
        smaller = F.interpolate(x, [int(edge * scale) for edge in x.shape[2:]], mode="bilinear", align_corners=False)
        smaller = network(tensors, smaller)
        found.append(F.interpolate(smaller, logits.shape[2:], mode="bilinear", align_corners=False))
    return torch.stack(found).amax(dim=0)


def photo(size):
    return torch.randint(0, 256, (1, 3, *size), generator=torch.Generator().manual_seed(1)).to(torch.uint8)


def fed_as_in_caffe(image):
    """Blue, green, red of 0 to 255 less the mean."""
    return image.flip(1).float() - torch.tensor([104.008, 116.669, 122.675])[:, None, None]


@pytest.mark.parametrize(
    ("names", "reference"),
    [
        ({}, network),
        ({"prefix": "base."}, at_three_scales),
        pytest.param(
            {"prefix": "scale.", "shortcut": "proj", "aspp": "aspp.stages.c"}, at_three_scales, marks=pytest.mark.slow
        ),
    ],
    ids=["network", "multi-scale", "older names"],
)
def test_pictures_through_the_processor_give_the_logits_of_the_network_written_out(names, reference):
    conversion = from_caffe_deeplabv2(checkpoint(**names), atrous_rates=RATES)
    model = build((conversion.config, conversion.tensors))
    processor, tensors = CtxSegImageProcessor(**conversion.preprocessing), checkpoint()
    for size in SIZES:
        image = photo(size)
        with torch.no_grad():
            found = model(processor(list(image), return_tensors="pt")["pixel_values"]).logits
            assert difference(found, reference(tensors, fed_as_in_caffe(image))) <= TOLERANCE, size


def test_what_the_tensors_tell_is_in_the_config():
    within = from_caffe_deeplabv2(checkpoint(prefix="base."), atrous_rates=RATES)
    bare = from_caffe_deeplabv2(checkpoint(classes=7), atrous_rates=RATES)
    assert (within.config.input_scales, bare.config.input_scales) == ([0.5, 0.75, 1.0], [1.0])
    assert (within.config.num_labels, bare.config.num_labels) == (4, 7)
    assert within.config.backbone == "resnet50_caffe"
    assert "2, 3, 5" in within.notes[1] and "0.5, 0.75, 1" in within.notes[1]


def without(tensors, name):
    return {key: value for key, value in tensors.items() if name not in key}


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda tensors: {}, "needs a tensor 'layer1.conv1.conv.weight'"),
        (lambda tensors: without(tensors, "layer4.block6"), r"resnet101_caffe .* but it has \[3, 4, 5, 3\]"),
        (
            lambda tensors: without(tensors, "block2.reduce.bn.running_mean"),
            "lacks 4 tensors .*layer1.1.bn1.running_mean",
        ),
        (lambda tensors: tensors | {"fc.weight": torch.ones(1)}, "no place for 1 tensors .*fc.weight"),
        (lambda tensors: tensors | {"aspp.c3.weight": torch.ones(1)}, "no place for 1 tensors .*aspp.c3"),
        (lambda tensors: tensors | {"layer1.conv1.conv.weight": torch.ones(64, 3, 3, 3)}, "has other shapes"),
    ],
    ids=["empty", "block", "statistics", "stranger", "rates", "shape"],
)
def test_other_files_are_refused_with_the_list(change, text):
    with pytest.raises(ValueError, match=text):
        from_caffe_deeplabv2(change(checkpoint()), atrous_rates=RATES)
