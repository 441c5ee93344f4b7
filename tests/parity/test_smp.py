"""Against segmentation_models_pytorch, which refuses pictures whose sides are not multiples of the output stride."""

import functools

import pytest
import segmentation_models_pytorch as smp
import torch
from peer_helpers import (
    GRADIENT_TOLERANCE,
    TOLERANCE,
    build,
    gradient_difference,
    logit_difference,
    make_peer,
    picture,
)

from hf_ctxseg.conversion_back import smp_arguments, to_smp
from hf_ctxseg.conversion_smp import from_smp

# Even and odd numbers of cells, and an oblong in which the rate 36 reaches from one cell to another.
SIZES = {8: [(64, 48), (56, 72), (32, 304)], 16: [(96, 64), (80, 112), (32, 608)]}
INPUT = picture((64, 96), count=2)  # which the peers' statistics are near
PEERS = {
    "v3 resnet50": (smp.DeepLabV3, "resnet50", 8, {}),
    "v3 resnet50 at 16": (smp.DeepLabV3, "resnet50", 16, {"decoder_atrous_rates": (2, 1, 3)}),
    "v3 resnet18": (smp.DeepLabV3, "resnet18", 8, {"decoder_channels": 64}),
    "v3 tu-test_resnet": (smp.DeepLabV3, "tu-test_resnet", 8, {"decoder_channels": 64}),
    "v3 tu-mobilenetv3_small_100": (smp.DeepLabV3, "tu-mobilenetv3_small_100", 16, {"decoder_channels": 32}),
    "v3 mobilenet_v2": (smp.DeepLabV3, "mobilenet_v2", 8, {"decoder_channels": 32}),
    "v3 mobilenet_v2 at 16": (smp.DeepLabV3, "mobilenet_v2", 16, {"decoder_channels": 32}),
    "v3+ mobilenet_v2": (smp.DeepLabV3Plus, "mobilenet_v2", 16, {"decoder_channels": 32}),
    "v3+ resnet50": (smp.DeepLabV3Plus, "resnet50", 16, {}),
    "v3+ resnet50 at 8": (smp.DeepLabV3Plus, "resnet50", 8, {"decoder_atrous_rates": (2, 1, 3)}),
    "v3+ resnext50_32x4d": (smp.DeepLabV3Plus, "resnext50_32x4d", 16, {}),
    "v3+ tu-resnet50d": (smp.DeepLabV3Plus, "tu-resnet50d", 8, {"decoder_channels": 128}),
    "v3+ tu-tf_efficientnet_lite0": (smp.DeepLabV3Plus, "tu-tf_efficientnet_lite0", 16, {"in_channels": 3}),
    "v3+ tu-test_convnext": (smp.DeepLabV3Plus, "tu-test_convnext", 16, {"decoder_channels": 64}),
}


def settings(name):
    """What smp would write into its config, and the converter takes: not the width, which the tensors tell."""
    _, encoder, stride, arguments = PEERS[name]
    told = {key: value for key, value in arguments.items() if key in ("decoder_atrous_rates", "in_channels")}
    return {"encoder_name": encoder, "encoder_output_stride": stride, **told}


@functools.cache
def converted(name):
    make, encoder, stride, arguments = PEERS[name]
    peer = make_peer(
        lambda: make(encoder, encoder_weights=None, encoder_output_stride=stride, classes=4, **arguments), INPUT
    )
    return peer, from_smp(peer.state_dict(), **settings(name))


@pytest.mark.parametrize("name", PEERS)
def test_smp_gives_the_same_logits(name):
    peer, both = converted(name)
    model = build(both)
    stride = PEERS[name][2]
    assert model.backbone.reductions[-1] == stride
    for size in SIZES[stride]:
        assert logit_difference(model, peer, size) <= TOLERANCE, size


@pytest.mark.parametrize("name", ["v3 resnet50", "v3+ resnet50", "v3+ tu-tf_efficientnet_lite0"])
def test_smp_gives_the_same_gradients(name):
    peer, both = converted(name)
    convert = functools.partial(from_smp, **settings(name))
    assert gradient_difference(build(both), peer, peer, convert, (48, 96)) <= GRADIENT_TOLERANCE


@pytest.mark.parametrize("size", [(65, 65), (500, 333)])
def test_smp_refuses_odd_sizes_and_ours_does_not(size):
    peer, both = converted("v3+ tu-tf_efficientnet_lite0")
    x = torch.randn(1, 3, *size)
    with pytest.raises(RuntimeError, match="divisible by 16"):
        peer(x)
    with torch.no_grad():
        assert build(both)(x).logits.shape[-2:] == (-(-size[0] // 4), -(-size[1] // 4))


def turn_branches(config, tensors):
    key = "model.decode_head.aspp.projection.conv.weight"
    return config, {**tensors, key: tensors[key].roll(config.hidden_size, dims=1)}


def turn_decoder(config, tensors):
    """[context, low level] becomes [low level, context]."""
    layer = "model.decode_head.refinement.0"
    depthwise, pointwise = f"{layer}.depthwise.weight", f"{layer}.pointwise.conv.weight"
    turned = {depthwise: tensors[depthwise].roll(config.low_level_channels, dims=0)}
    turned[pointwise] = tensors[pointwise].roll(config.low_level_channels, dims=1)
    return config, {**tensors, **turned}


def with_fields(config, tensors, **fields):
    return type(config).from_dict({**config.to_dict(), **fields}), tensors


@pytest.mark.parametrize(
    ("name", "spoil"),
    [
        ("v3 tu-test_resnet", turn_branches),
        ("v3 tu-test_resnet", lambda *both: with_fields(*both, atrous_rates=[24, 12, 36])),
        ("v3 tu-test_resnet", lambda *both: with_fields(*both, atrous_rates=[12, 36, 24])),
        ("v3 tu-test_resnet", lambda *both: with_fields(*both, align_corners=False)),
        ("v3 tu-test_resnet", lambda *both: with_fields(*both, dilate_first_block=True)),
        ("v3 resnet18", lambda *both: with_fields(*both, dilate_first_block=False)),
        ("v3+ resnet50", lambda *both: with_fields(*both, dilate_first_block=False)),
        ("v3+ resnet50", lambda *both: with_fields(*both, atrous_rates=[24, 12, 36])),
        ("v3+ resnet50", lambda *both: with_fields(*both, absolute_rates=True, atrous_rates=[6, 12, 18])),
        ("v3+ resnet50", lambda *both: with_fields(*both, align_corners=False)),
        ("v3 mobilenet_v2", lambda *both: with_fields(*both, dilate_first_block=False)),
        ("v3+ resnet50", turn_branches),
        ("v3+ resnet50", turn_decoder),
    ],
)
def test_parity_bites(name, spoil):
    peer, both = converted(name)
    assert logit_difference(build(spoil(*both)), peer, SIZES[PEERS[name][2]][-1]) > 3 * TOLERANCE


def test_what_ours_cannot_do_is_refused():
    separable = make_peer(
        lambda: smp.DeepLabV3(
            "tu-test_resnet", encoder_weights=None, decoder_aspp_separable=True, decoder_channels=16
        ),
        INPUT,
    )
    with pytest.raises(ValueError, match="decoder_aspp_separable=False"):
        from_smp(separable.state_dict(), "tu-test_resnet")
    shallow = make_peer(
        lambda: smp.DeepLabV3("resnet18", encoder_weights=None, encoder_depth=4, decoder_channels=16), INPUT
    )
    with pytest.raises(ValueError, match=r"branches.0.conv.weight \[16, 256, 1, 1\] instead of \[16, 512, 1, 1\]"):
        from_smp(shallow.state_dict(), "resnet18")
    with pytest.raises(ValueError, match=r"vgg16.*resnet18"):
        from_smp(converted("v3 resnet18")[0].state_dict(), "vgg16")


def test_names_of_older_releases_are_known():
    """smp's own rule: the decoder's parts were counted before they got names."""
    peer, (config, tensors) = converted("v3 tu-test_resnet")
    counted = {"decoder.aspp.": "decoder.0.", "decoder.conv.": "decoder.1.", "decoder.bn.": "decoder.2."}
    old = {}
    for key, value in peer.state_dict().items():
        name = next((name for name in counted if key.startswith(name)), "")
        old[counted.get(name, "") + key.removeprefix(name)] = value
    assert set(old) != set(peer.state_dict())
    peer.load_state_dict(dict(old))  # the peer still reads them, so they are what it wrote
    found = from_smp(old, **settings("v3 tu-test_resnet"))
    assert found[0].to_dict() == config.to_dict()
    assert all(torch.equal(found[1][key], value) for key, value in tensors.items())


@pytest.mark.parametrize("name", PEERS)
def test_a_network_goes_back_bit_by_bit(name):
    peer, (config, tensors) = converted(name)
    back, theirs = to_smp(config, tensors), peer.state_dict()
    assert set(back) == set(theirs)
    assert all(torch.equal(value, theirs[key]) for key, value in back.items())
    again = PEERS[name][0](encoder_weights=None, **smp_arguments(config)).eval()
    again.load_state_dict(back)
    x = picture(SIZES[PEERS[name][2]][0])
    with torch.no_grad():
        assert torch.equal(again(x), peer(x))
