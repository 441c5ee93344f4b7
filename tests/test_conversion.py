"""Converters against torchvision, which is always there, and against what can be written out.

The other peers are compared in tests/parity, by `make parity`.
"""

import functools
import logging

import pytest
import torch
from peer_helpers import (
    GRADIENT_TOLERANCE,
    TOLERANCE,
    build,
    difference,
    gradient_difference,
    logit_difference,
    make_peer,
    picture,
)
from torch import nn
from torchvision.models import mobilenet_v3_large, resnet50, segmentation
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.segmentation.deeplabv3 import DeepLabHead, DeepLabV3

from hf_ctxseg.conversion_mmseg import convert_mmseg_head, from_mmseg
from hf_ctxseg.conversion_smp import from_smp
from hf_ctxseg.conversion_torchvision import from_torchvision

# Even, odd and oblong; the last is long enough that the rate 36 (3 at stride 32) reaches another cell of the map.
SIZES = {8: [(64, 48), (65, 65), (17, 305)], 16: [(96, 64), (65, 97), (17, 609)], 32: [(96, 64), (65, 97), (33, 161)]}

INPUT = picture((48, 65), count=2)  # which the peers' statistics are near


def published(name, **arguments):
    make = getattr(segmentation, f"deeplabv3_{name}")
    return make_peer(lambda: make(weights=None, weights_backbone=None, num_classes=5, **arguments), INPUT)


def resnet_at_stride_16():
    backbone = resnet50(weights=None, replace_stride_with_dilation=[False, False, True])
    backbone = IntermediateLayerGetter(backbone, return_layers={"layer4": "out"})
    return DeepLabV3(backbone, DeepLabHead(2048, 5, (2, 1, 4, 3)))


def mobilenet_without_dilation():
    backbone = IntermediateLayerGetter(mobilenet_v3_large(weights=None).features, return_layers={"16": "out"})
    return DeepLabV3(backbone, DeepLabHead(960, 5, (1, 2, 3)))


# What makes the peer, its stride, and what the converter has to be told.
PEERS = {
    "resnet50": (lambda: published("resnet50"), 8, {}),
    "mobilenet_v3_large": (lambda: published("mobilenet_v3_large"), 16, {}),
    "resnet101": (lambda: published("resnet101"), 8, {}),
    "resnet50 at 16": (
        lambda: make_peer(resnet_at_stride_16, INPUT),
        16,
        {"output_stride": 16, "atrous_rates": (2, 1, 4, 3)},
    ),
    "mobilenet_v3_large at 32": (
        lambda: make_peer(mobilenet_without_dilation, INPUT),
        32,
        {"output_stride": 32, "atrous_rates": (1, 2, 3)},
    ),
}


@functools.cache
def converted(name):
    """The peer's logits at the size of the picture, and what the converter gives."""
    make, _, arguments = PEERS[name]
    peer = make()
    return peer, from_torchvision(peer.state_dict(), **arguments)


SLOW = {"resnet101", "mobilenet_v3_large at 32"}
NAMES = [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in PEERS]


@pytest.mark.parametrize("name", NAMES)
def test_torchvision_gives_the_same_logits(name):
    peer, both = converted(name)
    model = build(both)
    stride = PEERS[name][1]
    assert model.config.output_stride == model.backbone.reductions[-1] == stride
    # A hundred layers of random weights amplify rounding: in float32 the peer is 1.7e-4 away from itself in float64.
    dtype = torch.float64 if name == "resnet101" else torch.float32
    model, peer = model.to(dtype), peer.to(dtype)
    for size in SIZES[stride]:
        assert logit_difference(model, lambda x: peer(x)["out"], size, dtype) <= TOLERANCE, size


@pytest.mark.parametrize("name", ["mobilenet_v3_large", pytest.param("resnet50", marks=pytest.mark.slow)])
def test_torchvision_gives_the_same_gradients(name):
    peer, both = converted(name)
    found = gradient_difference(build(both), peer, lambda x: peer(x)["out"], from_torchvision, (33, 65))
    assert found <= GRADIENT_TOLERANCE


def test_the_auxiliary_head_of_a_resnet_comes_along():
    peer = published("resnet50", aux_loss=True)
    model = build(from_torchvision(peer.state_dict()))
    x = picture((48, 33))
    with torch.no_grad():
        logits = model.auxiliary_head(model(x, output_hidden_states=True).hidden_states[-2])
        found = nn.functional.interpolate(logits, size=x.shape[-2:], mode="bilinear")
        assert difference(found, peer(x)["aux"]) <= TOLERANCE


def test_the_auxiliary_head_of_mobilenet_is_left_out_with_a_warning(monkeypatch):
    messages = []
    logger = logging.getLogger("hf_ctxseg.conversion_torchvision")
    monkeypatch.setattr(logger, "warning", messages.append)
    peer = published("mobilenet_v3_large", aux_loss=True)
    model = build(from_torchvision(peer.state_dict()))
    assert model.auxiliary_head is None and "left out" in messages[0]
    assert logit_difference(model, lambda x: peer(x)["out"], (65, 97)) <= TOLERANCE


def turn_branches(config, tensors, key="model.decode_head.aspp.projection.conv.weight"):
    weight = tensors[key]
    return config, {**tensors, key: weight.roll(weight.shape[0], dims=1)}


def with_fields(config, tensors, **fields):
    return type(config).from_dict({**config.to_dict(), **fields}), tensors


@pytest.mark.parametrize(
    "spoil",
    [
        turn_branches,
        lambda *both: with_fields(*both, atrous_rates=[24, 12, 36]),
        lambda *both: with_fields(*both, atrous_rates=[12, 36, 24]),
        lambda *both: with_fields(*both, align_corners=True),
        lambda *both: with_fields(*both, norm_eps=1e-3),
        lambda *both: with_fields(*both, dilate_first_block=False),
        lambda *both: with_fields(*both, backbone_kwargs=None),
    ],
    ids=["branches", "rates", "larger rates", "corners", "epsilon", "first block", "backbone's epsilon"],
)
def test_parity_bites(spoil):
    peer, both = converted("mobilenet_v3_large")
    assert logit_difference(build(spoil(*both)), lambda x: peer(x)["out"], SIZES[16][-1]) > 3 * TOLERANCE


def test_what_the_tensors_do_not_tell_is_in_the_config():
    config = converted("mobilenet_v3_large")[1][0]
    assert config.atrous_rates == config.effective_rates == [12, 24, 36]
    assert (config.variant, config.align_corners, config.num_labels) == ("torchvision", False, 5)
    assert (config.dilate_first_block, config.backbone_kwargs["bn_eps"]) == (True, 1e-3)
    assert (config.hidden_size, config.aspp_dropout, config.classifier_dropout) == (256, 0.5, 0.0)


@pytest.fixture(scope="module")
def tensors():
    return dict(converted("resnet50")[0].state_dict())


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda d: d.pop("classifier.0.convs.2.1.running_var"), "lacks 1 tensors .*branches.2.norm.running_var"),
        (lambda d: d.pop("backbone.layer3.2.bn1.weight"), "lacks 1 tensors .*layer3.2.bn1.weight"),
        (lambda d: d.update({"backbone.fc.weight": torch.ones(2)}), "no place for 1 tensors .*fc.weight"),
        (lambda d: d.update({"optimizer.state": torch.ones(2)}), "no place for 1 tensors .*optimizer.state"),
        (lambda d: d.update({"backbone.conv1.weight": torch.ones(64, 4, 7, 7)}), r"conv1.weight \[64, 4, 7, 7\]"),
        (lambda d: d.pop("classifier.4.weight"), "needs a tensor 'classifier.4.weight'"),
        (lambda d: d.update({"backbone.layer3.6.bn1.weight": torch.ones(2)}), r"but it has \[3, 4, 7, 3\]"),
        (lambda d: d.clear(), "needs a tensor .*, but was given 0 tensors"),
    ],
    ids=["head", "backbone", "surplus", "stranger", "shape", "classifier", "depth", "empty"],
)
def test_tensors_that_do_not_fit_are_refused_with_the_list(tensors, change, text):
    changed = dict(tensors)
    change(changed)
    with pytest.raises(ValueError, match=text):
        from_torchvision(changed)


def test_rates_must_be_one_for_each_branch(tensors):
    with pytest.raises(ValueError, match=r"rates \[6, 12\], but its ASPP has 3 dilated branches"):
        from_torchvision(tensors, atrous_rates=(6, 12))


# The rest needs no peer: what mmsegmentation's and smp's converters do beyond renaming, and what they refuse.
BN = {"type": "SyncBN", "requires_grad": True}
ASPP = {"type": "ASPPHead", "norm_cfg": BN, "dilations": (1, 6, 12, 18), "in_channels": 2048, "loss_decode": {}}
RESNET = {"type": "ResNetV1c", "depth": 50, "strides": (1, 2, 1, 1), "dilations": (1, 1, 2, 4), "norm_cfg": BN}
MODEL = {"type": "EncoderDecoder", "backbone": RESNET | {"contract_dilation": True}, "decode_head": ASPP}


def mmseg_aspp(width=2, in_channels=3, classes=4, branches=5):
    """Tensors of an ASPPHead whose bottleneck says in each input channel which branch it belongs to."""
    tensors = {"conv_seg.weight": torch.ones(classes, width, 1, 1), "conv_seg.bias": torch.ones(classes)}
    tensors["bottleneck.conv.weight"] = torch.arange(float(branches)).repeat_interleave(width).expand(width, -1)
    tensors["bottleneck.conv.weight"] = tensors["bottleneck.conv.weight"][..., None, None].expand(-1, -1, 3, 3)
    kernels = {"image_pool.1": 1, "aspp_modules.0": 1} | {f"aspp_modules.{i}": 3 for i in range(1, branches - 1)}
    for layer, size in kernels.items():
        tensors[f"{layer}.conv.weight"] = torch.ones(width, in_channels, size, size)
    for layer in [*kernels, "bottleneck"]:
        for name in ("weight", "bias", "running_mean", "running_var"):
            tensors[f"{layer}.bn.{name}"] = torch.ones(width)
    return tensors


def test_mmseg_joins_pooling_first_and_ours_joins_it_last():
    fields, tensors = convert_mmseg_head(mmseg_aspp(), ASPP)
    order = tensors["aspp.projection.conv.weight"][0, ::2, 0, 0]
    assert order.tolist() == [1, 2, 3, 4, 0]
    assert (fields["atrous_rates"], fields["absolute_rates"], fields["hidden_size"]) == ([6, 12, 18], True, 2)
    assert (fields["variant"], fields["align_corners"], fields["num_labels"]) == ("mmseg", False, 4)


@pytest.mark.parametrize(
    ("part", "change", "text"),
    [
        ("decode_head", {"type": "PSPHead"}, "type of mmsegmentation's decode_head is 'PSPHead'"),
        ("decode_head", {"norm_cfg": {"type": "GN"}}, "norm_cfg {'type': 'GN'}"),
        ("decode_head", {"dilations": (2, 6, 12)}, r"dilations \[2, 6, 12\]"),
        ("decode_head", {"in_index": 2}, "in_index=2"),
        ("decode_head", {"out_channels": 1}, "out_channels=1"),
        ("decode_head", {"act_cfg": {"type": "GELU"}}, "act_cfg={'type': 'GELU'}"),
        ("decode_head", {"sliding": 3}, "settings sliding"),
        ("backbone", {"type": "ResNeSt"}, "type of mmsegmentation's backbone is 'ResNeSt'"),
        ("backbone", {"depth": 20}, "one of the depths 18, 34, 50"),
        ("backbone", {"style": "caffe"}, "style='caffe'"),
        ("backbone", {"avg_down": True, "deep_stem": False}, "avg_down without deep_stem"),
        ("backbone", {"dilations": (1, 1, 1, 2)}, r"dilations that make up for the strides left out \(\[1, 1, 2, 4\]"),
        ("backbone", {"multi_grid": (1, 2)}, r"multi-grid rates \[1, 2\], but its last stage has 3 blocks"),
        ("backbone", {"type": "MobileNetV2", "strides": (1, 2, 1, 2, 1, 2, 1)}, "left out from the last on"),
        ("backbone", {"type": "MobileNetV2", "widen_factor": 0.9}, "widen_factor=0.9"),
        ("backbone", {"norm_cfg": BN | {"eps": 1e-3}}, "normalisation {'norm_eps': 0.001"),
        ("backbone", {"groups": 32}, "settings groups"),
        ("auxiliary_head", {"type": "FCNHead", "num_convs": 1, "in_index": 2}, "concat_input=True"),
    ],
)
def test_what_mmseg_does_otherwise_is_refused(part, change, text):
    model = MODEL | {part: MODEL.get(part, {}) | change}
    with pytest.raises(ValueError, match=text):
        from_mmseg({f"decode_head.{key}": value for key, value in mmseg_aspp().items()}, model)


@pytest.mark.parametrize("heads", [None, [ASPP, ASPP]])
def test_mmseg_without_one_head_is_refused(heads):
    with pytest.raises(ValueError, match="must have one decode_head"):
        from_mmseg({}, MODEL | {"decode_head": heads})


@pytest.mark.parametrize(
    ("encoder", "change", "text"),
    [
        ("mobilenet_v3", {}, "'mobilenet_v3': .*resnet18"),
        ("resnet51", {}, "did you mean 'resnet50'"),
        ("resnet50", {"decoder.aspp.convs.1.0.0.weight": torch.ones(1)}, "takes decoder_aspp_separable=False"),
        ("resnet50", {"classification_head.3.weight": torch.ones(1)}, "no place for 1 tensors .*classification_head"),
        ("resnet50", {}, "lacks .* tensors"),
    ],
)
def test_what_smp_does_otherwise_is_refused(encoder, change, text):
    tensors = {
        "decoder.aspp.project.0.weight": torch.ones(8, 40, 1, 1),
        "segmentation_head.0.weight": torch.ones(2, 8),
    }
    with pytest.raises(ValueError, match=text):
        from_smp(tensors | change, encoder)
