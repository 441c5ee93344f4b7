"""Against mmsegmentation and mmcv (the onedl builds, which install without compiled operations)."""

import functools

import pytest
import torch
from mmcv.cnn import bricks
from mmseg.models import backbones, decode_heads
from peer_helpers import (
    GRADIENT_TOLERANCE,
    TOLERANCE,
    build,
    difference,
    gradient_difference,
    largest_difference,
    logit_difference,
    make_peer,
    picture,
)
from torch import nn
from torch.nn import functional as F

from hf_ctxseg import NonLocal1d, NonLocal2d, NonLocal3d
from hf_ctxseg.conversion_back import mmseg_model, to_mmseg
from hf_ctxseg.conversion_layers import nonlocal_from_state_dict
from hf_ctxseg.conversion_mmseg import convert_mmseg_head, from_mmseg
from hf_ctxseg.modeling_deeplabv3 import DeepLabV3Config, DeepLabV3Head
from hf_ctxseg.modeling_deeplabv3plus import DeepLabV3PlusConfig, DeepLabV3PlusHead
from hf_ctxseg.modeling_nonlocal import NonLocalConfig, NonLocalHead

BN = {"type": "BN", "requires_grad": True}
SIZES = [(64, 48), (65, 65), (33, 161)]  # the last is long enough that the largest rate reaches another cell
LOSS = {"loss_decode": {"type": "CrossEntropyLoss", "loss_weight": 1.0}}

# Heads alone, on maps of 24 channels at stride 8 and of 10 at stride 4.
HEADS = {
    "ASPPHead": ({"dilations": (1, 2, 5, 3)}, DeepLabV3Config, DeepLabV3Head),
    "ASPPHead, corners aligned": ({"dilations": (1, 2), "align_corners": True}, DeepLabV3Config, DeepLabV3Head),
    "DepthwiseSeparableASPPHead": (
        {"dilations": (1, 2, 5, 3), "c1_in_channels": 10, "c1_channels": 6},
        DeepLabV3PlusConfig,
        DeepLabV3PlusHead,
    ),
    "DepthwiseSeparableASPPHead, corners aligned": (
        {"dilations": (1, 2), "c1_in_channels": 10, "c1_channels": 24, "align_corners": True},
        DeepLabV3PlusConfig,
        DeepLabV3PlusHead,
    ),
    **{
        f"NLHead, {mode}": ({"mode": mode}, NonLocalConfig, NonLocalHead) for mode in ("gaussian", "embedded_gaussian")
    },
    "NLHead, dot_product": ({"mode": "dot_product", "reduction": 3}, NonLocalConfig, NonLocalHead),
    "NLHead, concatenation": ({"mode": "concatenation", "concat_input": False}, NonLocalConfig, NonLocalHead),
    "NLHead, unscaled": ({"use_scale": False}, NonLocalConfig, NonLocalHead),
}


def head_of(name, width=16):
    arguments = HEADS[name][0]
    settings = {"in_channels": 24, "in_index": 3, "channels": width, "num_classes": 5, "norm_cfg": BN, **arguments}
    return {"type": name.partition(",")[0], "dropout_ratio": 0.2, **settings, **LOSS}


def make_head(settings):
    arguments = {key: value for key, value in settings.items() if key != "type"}
    return make_peer(lambda: getattr(decode_heads, settings["type"])(**arguments), features_of((7, 9), count=2))


class OurHead(nn.Module):
    def __init__(self, name, converted):
        super().__init__()
        _, config_class, head_class = HEADS[name]
        fields, tensors = converted
        self.config = config_class(output_stride=8, **fields)
        self.head = head_class(self.config, [10, 24], [4, 8])
        self.classifier = self.head.build_classifier(self.head.out_channels)
        own = {key: value for key, value in tensors.items() if not key.startswith("classifier.")}
        self.head.load_state_dict(own)
        self.classifier.load_state_dict({key: tensors[f"classifier.{key}"] for key in ("weight", "bias")})
        self.eval()

    def forward(self, features):
        return self.classifier(self.head([features[0], features[-1]]))


def features_of(size, count=1, dtype=torch.float32):
    """What mmsegmentation's backbones give, of which heads take the first and the last."""
    generator = torch.Generator().manual_seed(count)
    height, width = size
    low = torch.randn(count, 10, 2 * height - 1, 2 * width, generator=generator)
    deep = torch.randn(count, 24, height, width, generator=generator)
    return [low.to(dtype), None, None, deep.to(dtype)]


@pytest.mark.parametrize("name", HEADS)
def test_a_head_alone_gives_the_same_logits(name):
    settings = head_of(name)
    peer = make_head(settings)
    ours = OurHead(name, convert_mmseg_head(peer.state_dict(), settings))
    assert (ours.config.classifier_dropout, ours.config.num_labels) == (0.2, 5)
    for size in [(8, 6), (9, 9), (3, 17)]:
        features = features_of(size)
        with torch.no_grad():
            assert difference(ours(features), peer(features)) <= TOLERANCE, size


def test_norms_of_the_head_keep_epsilon_and_momentum():
    settings = head_of("ASPPHead") | {"norm_cfg": {"type": "SyncBN", "eps": 1e-2, "momentum": 0.01}}
    peer = make_head(settings | {"norm_cfg": {"type": "BN", "eps": 1e-2, "momentum": 0.01}})
    ours = OurHead("ASPPHead", convert_mmseg_head(peer.state_dict(), settings))
    assert {module.momentum for module in ours.modules() if isinstance(module, nn.BatchNorm2d)} == {0.01}
    features = features_of((9, 7))
    with torch.no_grad():
        assert difference(ours(features), peer(features)) <= TOLERANCE


@pytest.mark.parametrize("name", HEADS)
def test_a_head_alone_gives_the_same_gradients(name):
    settings = head_of(name)
    peer = make_head(settings)
    ours = OurHead(name, convert_mmseg_head(peer.state_dict(), settings)).double()
    peer.double()
    inputs, peer_inputs = features_of((9, 7), dtype=torch.float64), features_of((9, 7), dtype=torch.float64)
    inputs[-1].requires_grad_(), peer_inputs[-1].requires_grad_()
    logits = ours(inputs)
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1)).double()
    (logits * weights).sum().backward()
    loss = (peer(peer_inputs) * weights).sum()
    if name == "NLHead, concatenation":  # divides in place what the ReLU's gradient needs
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
        return
    loss.backward()
    gradients = dict(peer.state_dict()) | {key: value.grad for key, value in peer.named_parameters()}
    expected = {"input": peer_inputs[-1].grad, **convert_mmseg_head(gradients, settings)[1]}
    found = {key.removeprefix("head."): value.grad for key, value in ours.named_parameters()}
    assert largest_difference(found | {"input": inputs[-1].grad}, expected) <= GRADIENT_TOLERANCE


class Peer(nn.Module):
    """Backbone, decode head and auxiliary head under the names of mmsegmentation's EncoderDecoder."""

    def __init__(self, model):
        super().__init__()
        for part, module in model.items():
            arguments = {key: value for key, value in module.items() if key != "type"}
            library = backbones if part == "backbone" else decode_heads
            self.add_module(part, getattr(library, module["type"])(**arguments))

    def forward(self, x):
        return self.full_size(self.decode_head, x)

    def full_size(self, head, x):
        logits = head(self.backbone(x))
        return F.interpolate(logits, size=x.shape[-2:], mode="bilinear", align_corners=self.decode_head.align_corners)


def model_of(head, backbone="ResNetV1c", stride=8, contract=True, auxiliary=False, channels=2048, **more):
    strides = {8: (1, 2, 1, 1), 16: (1, 2, 2, 1), 32: (1, 2, 2, 2)}[stride]
    dilations = {8: (1, 1, 2, 4), 16: (1, 1, 1, 2), 32: (1, 1, 1, 1)}[stride]
    model = {
        "backbone": {"type": backbone, "depth": 50, "strides": strides, "dilations": dilations, "norm_cfg": BN}
        | {"contract_dilation": contract, "style": "pytorch", "num_stages": 4, "out_indices": (0, 1, 2, 3)}
        | more,
        "decode_head": head_of(head) | {"in_channels": channels},
    }
    if "c1_in_channels" in model["decode_head"]:
        model["decode_head"]["c1_in_channels"] = channels // 8
    if auxiliary:
        model["auxiliary_head"] = {"type": "FCNHead", "in_channels": channels // 2, "in_index": 2, "channels": 32}
        model["auxiliary_head"] |= {"num_convs": 1, "concat_input": False, "num_classes": 5, "norm_cfg": BN, **LOSS}
    return model


def mobilenet_of(head, stride=8, auxiliary=False, **more):
    strides = {8: (1, 2, 2, 1, 1, 1, 1), 16: (1, 2, 2, 2, 1, 1, 1), 32: (1, 2, 2, 2, 1, 2, 1)}[stride]
    dilations = {8: (1, 1, 1, 2, 2, 4, 4), 16: (1, 1, 1, 1, 1, 2, 2), 32: (1,) * 7}[stride]
    model = model_of(head, auxiliary=auxiliary, channels=320)
    model["backbone"] = {"type": "MobileNetV2", "strides": strides, "dilations": dilations, "norm_cfg": BN} | more
    if "c1_in_channels" in model["decode_head"]:
        model["decode_head"]["c1_in_channels"] = 24
    if auxiliary:
        model["auxiliary_head"]["in_channels"] = 96
    return model


MODELS = {
    "ASPPHead": model_of("ASPPHead"),
    "ASPPHead at 16": model_of("ASPPHead", stride=16),
    "ASPPHead, first block dilated": model_of("ASPPHead", contract=False),
    "ASPPHead, multi-grid": model_of("ASPPHead", stride=16, multi_grid=(2, 4, 8)),
    "ASPPHead on ResNet": model_of("ASPPHead", "ResNet", stride=16),
    "ASPPHead on ResNetV1d": model_of("ASPPHead", "ResNetV1d", stride=32),
    "ASPPHead, d16-mg124": model_of("ASPPHead", stride=16, multi_grid=(1, 2, 4)),
    "ASPPHead on ResNetV1d at 8": model_of("ASPPHead", "ResNetV1d"),
    "ASPPHead on ResNetV1d at 16, first block dilated": model_of("ASPPHead", "ResNetV1d", stride=16, contract=False),
    "ASPPHead on ResNetV1c-18": model_of("ASPPHead", channels=512, depth=18, auxiliary=True),
    "ASPPHead on ResNet-18, first block dilated": model_of("ASPPHead", "ResNet", 16, False, channels=512, depth=18),
    "ASPPHead on ResNetV1d-18, multi-grid": model_of(
        "ASPPHead", "ResNetV1d", channels=512, depth=18, multi_grid=(3, 5)
    ),
    "DepthwiseSeparableASPPHead on ResNetV1c-34": model_of(
        "DepthwiseSeparableASPPHead", stride=16, channels=512, depth=34
    ),
    "ASPPHead on MobileNetV2": mobilenet_of("ASPPHead", auxiliary=True),
    "ASPPHead on MobileNetV2 at 16": mobilenet_of("ASPPHead", 16, norm_cfg={"type": "BN", "eps": 1e-2}),
    "NLHead on MobileNetV2 at 32": mobilenet_of("NLHead, embedded_gaussian", 32),
    "DepthwiseSeparableASPPHead on MobileNetV2": mobilenet_of("DepthwiseSeparableASPPHead"),
    "DepthwiseSeparableASPPHead": model_of("DepthwiseSeparableASPPHead", auxiliary=True),
    "DepthwiseSeparableASPPHead at 16": model_of("DepthwiseSeparableASPPHead, corners aligned", stride=16),
    "NLHead": model_of("NLHead, embedded_gaussian", auxiliary=True),
    "NLHead at 16": model_of("NLHead, dot_product", stride=16),
}


@functools.cache
def converted(name):
    peer = make_peer(lambda: Peer(MODELS[name]), picture((48, 65), count=2))
    return peer, from_mmseg(peer.state_dict(), MODELS[name])


@pytest.mark.parametrize("name", MODELS)
def test_a_network_gives_the_same_logits(name):
    peer, both = converted(name)
    model = build(both).double()  # some of these networks amplify the rounding of float32 to the tolerance
    peer.double()
    differences = [logit_difference(model, peer, size, torch.float64) for size in SIZES]
    peer.float()
    assert max(differences) <= TOLERANCE, differences


@pytest.mark.parametrize("name", ["DepthwiseSeparableASPPHead", "NLHead"])
def test_a_network_gives_the_same_gradients(name):
    peer, both = converted(name)
    convert = functools.partial(from_mmseg, model=MODELS[name])
    assert gradient_difference(build(both), peer, peer, convert, (33, 65)) <= GRADIENT_TOLERANCE


def test_the_auxiliary_head_comes_along():
    peer, both = converted("NLHead")
    model, x = build(both), picture((48, 33))
    with torch.no_grad():
        logits = model.auxiliary_head(model(x, output_hidden_states=True).hidden_states[-2])
        logits = F.interpolate(logits, size=x.shape[-2:], mode="bilinear", align_corners=False)
        assert difference(logits, peer.full_size(peer.auxiliary_head, x)) <= TOLERANCE


def turn_branches(config, tensors):
    key = "model.decode_head.aspp.projection.conv.weight"
    return config, {**tensors, key: tensors[key].roll(16, dims=1)}


def with_fields(config, tensors, **fields):
    return type(config).from_dict({**config.to_dict(), **fields}), tensors


@pytest.mark.parametrize(
    ("name", "spoil"),
    [
        ("ASPPHead", turn_branches),
        ("ASPPHead", lambda *both: with_fields(*both, atrous_rates=[5, 2, 3])),
        ("ASPPHead", lambda *both: with_fields(*both, absolute_rates=False)),
        ("ASPPHead", lambda *both: with_fields(*both, align_corners=True)),
        ("ASPPHead", lambda *both: with_fields(*both, dilate_first_block=True)),
        ("ASPPHead, first block dilated", lambda *both: with_fields(*both, dilate_first_block=False)),
        ("ASPPHead, multi-grid", lambda *both: with_fields(*both, multi_grid=None)),
        ("ASPPHead, d16-mg124", lambda *both: with_fields(*both, backbone_rates=None, multi_grid=[1, 2, 4])),
        ("ASPPHead on ResNetV1d at 8", lambda *both: with_fields(*both, backbone="resnet50d")),
        ("ASPPHead on ResNetV1c-18", lambda *both: with_fields(*both, backbone_rates=None)),
        ("ASPPHead on MobileNetV2", lambda *both: with_fields(*both, backbone_rates=None)),
        ("ASPPHead on MobileNetV2", lambda *both: with_fields(*both, backbone_rates=None, dilate_first_block=True)),
        ("DepthwiseSeparableASPPHead", turn_branches),
        ("DepthwiseSeparableASPPHead", lambda *both: with_fields(*both, atrous_rates=[5, 2, 3])),
        ("DepthwiseSeparableASPPHead at 16", lambda *both: with_fields(*both, align_corners=False)),
        ("NLHead", lambda *both: with_fields(*both, nonlocal_mode="dot_product")),
        ("NLHead", lambda *both: with_fields(*both, use_scale=False)),
    ],
)
def test_parity_bites(name, spoil):
    peer, both = converted(name)
    assert logit_difference(build(spoil(*both)), peer, SIZES[-1]) > 3 * TOLERANCE


@pytest.mark.parametrize("mode", ["gaussian", "embedded_gaussian", "dot_product", "concatenation"])
@pytest.mark.parametrize("sub_sample", [False, True])
@pytest.mark.parametrize("norm", [None, {"type": "BN", "eps": 1e-2}])
@pytest.mark.parametrize("dimensions", [1, 2, 3])
def test_blocks_of_mmcv_give_the_same(dimensions, norm, sub_sample, mode):
    make = getattr(bricks, f"NonLocal{dimensions}d", None) or getattr(bricks.non_local, f"NonLocal{dimensions}d")
    if norm is not None:
        norm = norm | {"type": f"BN{dimensions}d"}
    peer = make_peer(
        lambda: make(6, sub_sample=sub_sample, norm_cfg=norm, mode=mode, reduction=2),
        torch.randn(2, 6, *(3, 4, 5)[-dimensions:]),
    )
    block = nonlocal_from_state_dict(peer.state_dict(), mode=mode, norm_eps=1e-2).eval()
    assert type(block) is (NonLocal1d, NonLocal2d, NonLocal3d)[dimensions - 1]
    assert block.sub_sample is sub_sample
    for size in [(4, 6, 8), (3, 5, 7), (2, 3, 11)]:
        x = torch.randn(2, 6, *size[-dimensions:])
        with torch.no_grad():
            assert difference(block(x), peer(x)) <= TOLERANCE, size
    if mode != "concatenation":  # which mmcv cannot train
        ours, theirs = (x.double().requires_grad_() for _ in range(2))
        weights = torch.randn_like(ours)
        block.double(), peer.double()
        (block(ours) * weights).sum().backward()
        (peer(theirs) * weights).sum().backward()
        assert largest_difference({"input": ours.grad}, {"input": theirs.grad}) <= GRADIENT_TOLERANCE


def test_a_wrong_mode_bites_or_is_refused():
    peer = make_peer(lambda: bricks.NonLocal2d(6, mode="dot_product"), torch.randn(2, 6, 3, 4))
    x = torch.randn(1, 6, 5, 7)
    with torch.no_grad():
        assert difference(nonlocal_from_state_dict(peer.state_dict()).eval()(x), peer(x)) > 3 * TOLERANCE
    for mode in ("gaussian", "concatenation"):
        with pytest.raises(ValueError, match=mode):
            nonlocal_from_state_dict(peer.state_dict(), mode=mode)


@pytest.mark.parametrize("name", MODELS)
def test_a_network_goes_back_bit_by_bit(name):
    peer, (config, tensors) = converted(name)
    back = to_mmseg(config, tensors)
    theirs = peer.state_dict()
    assert set(back) == set(theirs)
    assert all(torch.equal(value, theirs[key]) for key, value in back.items())
    model = mmseg_model(config, tensors)
    del model["type"]
    again = Peer(model).eval()
    again.load_state_dict(back)
    x = picture((33, 65))
    with torch.no_grad():
        assert torch.equal(again(x), peer(x))


def test_the_weight_of_the_auxiliary_loss_comes_along():
    model = model_of("NLHead, embedded_gaussian", auxiliary=True)
    model["auxiliary_head"] |= {"loss_decode": {"type": "CrossEntropyLoss", "loss_weight": 0.7}, "dropout_ratio": 0.3}
    config = from_mmseg(converted("NLHead")[0].state_dict(), model)[0]
    assert (config.auxiliary_loss_weight, config.auxiliary_dropout) == (0.7, 0.3)
