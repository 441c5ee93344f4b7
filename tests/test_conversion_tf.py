"""TensorFlow's DeepLab against its graphs written out on formulas; tests/parity compares with TensorFlow itself."""

import functools

import numpy as np
import pytest
import timm
import torch
from peer_helpers import TOLERANCE, build, full_size_logits, picture
from tf_bundles import write_bundle
from tf_graphs import Graph, TorchOps, deeplab, mobilenet, xception

from hf_ctxseg import DeepLabV3Config, DeepLabV3PlusConfig
from hf_ctxseg.conversion_tf import from_tf_checkpoint
from hf_ctxseg.tf_checkpoint import crc32c
from hf_ctxseg.tf_xception import XCEPTIONS

SIZES = [(33, 33), (64, 64), (47, 65)]
NARROW = {"backbone": mobilenet, "multiplier": 0.35, "divisor": 1}
GRAPHS = {
    "mobilenet v3": ({**NARROW, "stride": 16, "decoder": False}, {}),
    "mobilenet v3 at 8": ({**NARROW, "stride": 8, "decoder": False}, {"output_stride": 8}),
    "mobilenet v3+": (
        {**NARROW, "stride": 8, "rates": (1, 2, 4), "window": (4, 3)},
        {"output_stride": 8, "atrous_rates": (1, 2, 4), "image_pooling_crop_size": (27, 24)},
    ),
    "xception41 v3+": (
        {"backbone": xception, "depth": 41, "stride": 8, "rates": (1, 2, 3), "multi_grid": (1, 2, 1)},
        {"output_stride": 8, "atrous_rates": (1, 2, 3), "multi_grid": (1, 2, 1)},
    ),
    "xception65 v3+": ({"backbone": xception, "depth": 65, "stride": 16, "rates": (6, 12, 18)}, {}),
    "xception71 v3+ at 8": (
        {"backbone": xception, "depth": 71, "stride": 8, "rates": (12, 24, 36)},
        {"output_stride": 8},
    ),
}
SLOW = {"xception41 v3+", "xception65 v3+", "xception71 v3+ at 8"}


@functools.lru_cache(maxsize=3)
def graph_of(name):
    graph = Graph(TorchOps(), deeplab, **GRAPHS[name][0])
    graph(picture((65, 81), count=2))
    return graph


def saved(folder, variables):
    return write_bundle(folder, variables, crc32c=lambda data: crc32c(np.frombuffer(data, np.uint8)))


def convert(folder, name="mobilenet v3", changes=None, **told):
    variables = {**graph_of(name).variables, **(changes or {})}
    kept = {key: value for key, value in variables.items() if value is not None}
    return from_tf_checkpoint(saved(folder, kept), **{**GRAPHS[name][1], **told})


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in GRAPHS])
def test_the_graph_gives_the_same_logits(name, tmp_path):
    conversion = convert(tmp_path, name)
    model = build((conversion.config, conversion.tensors))
    for size in SIZES:
        x = picture(size)
        expected = torch.from_numpy(graph_of(name)(x)).permute(0, 3, 1, 2)
        with torch.no_grad():
            found = full_size_logits(model, x)
        assert (found - expected).abs().max() <= TOLERANCE * (expected.max() - expected.min()), size


def test_what_the_tensors_do_not_tell_is_as_published_and_said(tmp_path):
    conversion = convert(tmp_path)
    config = conversion.config
    assert type(config) is DeepLabV3Config
    assert (config.output_stride, config.atrous_rates, config.absolute_rates) == (16, [], True)
    assert config.backbone_kwargs == {"channel_multiplier": 0.35, "channel_divisor": 1}
    assert (config.norm_eps, config.norm_momentum, config.align_corners) == (1e-5, 0.0003, True)
    assert (config.aspp_dropout, config.classifier_dropout) == (0.1, 0.0)
    assert conversion.preprocessing["image_mean"] == conversion.preprocessing["image_std"] == [0.5, 0.5, 0.5]
    stride, pooling, classes = conversion.notes
    assert "(output stride 16)" in stride and "average the whole picture" in pooling and "Names" in classes
    told = convert(tmp_path, output_stride=8, image_pooling_crop_size=513)
    assert told.config.pooling_window == 513 and told.notes == [classes]


@pytest.mark.parametrize(("stride", "rates"), [(None, [6, 12, 18]), (8, [12, 24, 36]), (32, [3, 6, 9])])
def test_rates_follow_the_stride(tmp_path, stride, rates):
    conversion = convert(tmp_path, "mobilenet v3+", output_stride=stride, atrous_rates=None)
    assert type(conversion.config) is DeepLabV3PlusConfig
    assert conversion.config.effective_rates == rates
    assert f"atrous rates {rates[0]}, {rates[1]}, {rates[2]}" in conversion.notes[0]


def test_what_the_optimizer_left_is_left_out(tmp_path):
    plain = convert(tmp_path)
    average = "logits/semantic/biases/ExponentialMovingAverage"
    changes = {"global_step": np.array(3), "logits/semantic/biases/Momentum": np.zeros(5, np.float32)}
    with_leftovers = convert(tmp_path, changes={**changes, average: np.zeros(5, np.float32)})
    assert all(torch.equal(with_leftovers.tensors[key], value) for key, value in plain.tensors.items())
    assert len(with_leftovers.tensors) == len(plain.tensors)
    assert "moving averages" in with_leftovers.notes[-1] and not any("moving" in note for note in plain.notes)


@pytest.mark.parametrize("name", ["mobilenet v3", "mobilenet v3+"])
def test_statistics_move_by_what_tensorflow_calls_one_minus_decay(name, tmp_path):
    conversion = convert(tmp_path, name)
    model = build((conversion.config, conversion.tensors)).train()
    norms = {"model.backbone._backbone.bn1": 0.003, "model.decode_head.aspp.projection.norm": 0.0003}
    before = {key: model.get_submodule(key).running_mean.clone() for key in norms}
    seen = {}
    for key in norms:
        model.get_submodule(key).register_forward_pre_hook(lambda _, x, key=key: seen.update({key: x[0]}))
    model(picture((47, 65), count=2))
    for key, momentum in norms.items():
        after = model.get_submodule(key).running_mean
        torch.testing.assert_close(after, before[key] + momentum * (seen[key].mean((0, 2, 3)) - before[key]))
        assert (after - before[key]).abs().max() > 1e-6


WEIGHTS = np.zeros((1, 1, 256, 5), np.float32)


@pytest.mark.parametrize(
    ("name", "changes", "told", "message"),
    [
        ("mobilenet v3", {"aspp0/weights": None}, {}, "lacks 1 tensors .*aspp.branches.0.conv.weight"),
        ("mobilenet v3", {"aspp0/weights": WEIGHTS}, {}, "has other shapes: .*aspp.branches.0.conv.weight"),
        ("mobilenet v3", {"MobilenetV2/Conv_1/weights": WEIGHTS}, {}, "no place for 1 tensors .MobilenetV2/Conv_1"),
        ("mobilenet v3", {"MobilenetV2/Conv/weights": None}, {}, "needs a tensor 'MobilenetV2/Conv.weight'"),
        ("mobilenet v3", {"concat_projection/weights": None}, {}, "variables of a pyramid .*dense prediction cell"),
        ("mobilenet v3", {"logits/semantic_1/weights": WEIGHTS}, {}, "outputs logits/semantic, logits/semantic_1"),
        ("mobilenet v3", {"aspp1_depthwise/depthwise_weights": WEIGHTS}, {"atrous_rates": [2]}, "with a decoder only"),
        ("mobilenet v3", {"aspp1/weights": WEIGHTS}, {}, "has 1 dilated branches: give their atrous_rates"),
        ("mobilenet v3", {}, {"atrous_rates": [6]}, r"given the atrous rates \[6\], but has 0"),
        ("mobilenet v3", {"aspp0/weights": WEIGHTS[0]}, {}, "'aspp0/weights' of shape .*four dimensions"),
        ("mobilenet v3", {"MobilenetV2/expanded_conv/project/weights": WEIGHTS}, {}, "channels .*is not known"),
        ("mobilenet v3+", {"decoder/feature_projection0/weights": None}, {}, "feature_projection0.weight"),
        ("mobilenet v3", {}, {"multi_grid": [1, 2, 4]}, "multi_grid is .*1 blocks"),
    ],
)
def test_what_is_not_such_a_network_is_refused(name, changes, told, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        convert(tmp_path, name, changes, **told)


def test_other_networks_of_tensorflow_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"scopes aspp0, resnet_v1_50: .*stride in the last unit"):
        from_tf_checkpoint(
            saved(
                tmp_path, {"resnet_v1_50/conv1_1/weights": WEIGHTS, "aspp0/weights": WEIGHTS, "global_step": WEIGHTS}
            )
        )


@pytest.mark.parametrize("name", XCEPTIONS)
def test_xception_has_the_same_layers_as_timms_at_every_stride(name):
    def shapes(name, stride):
        with torch.device("meta"):
            network = timm.create_model(name, features_only=True, output_stride=stride)
        return {key: value.shape for key, value in network.state_dict().items()}

    expected = shapes(name.removesuffix("_tf"), 32)
    for stride in (8, 16, 32):
        assert shapes(name, stride) == expected


def test_maps_of_xception_are_those_before_the_relu():
    torch.manual_seed(0)
    theirs = timm.create_model("xception41", features_only=True, output_stride=16).eval()
    ours = timm.create_model("xception41_tf", features_only=True, output_stride=16).eval()
    ours.load_state_dict(theirs.state_dict())
    with torch.no_grad():
        for found, expected in zip(ours(picture((33, 40))), theirs(picture((33, 40))), strict=True):
            assert torch.equal(found.relu(), expected)
            assert found.min() < 0 or found.shape[1] == 2048  # the last map is that after a ReLU
