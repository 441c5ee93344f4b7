"""Against TensorFlow: its operations, its `Saver`, and the graphs of its DeepLab written out in tests/tf_graphs.py."""

import functools

import pytest
import tensorflow as tf
import torch
from peer_helpers import TOLERANCE, build, full_size_logits, picture
from tf_graphs import Graph, deeplab, mobilenet, xception

from hf_ctxseg.conversion_tf import from_tf_checkpoint
from hf_ctxseg.tf_checkpoint import TFCheckpoint

SIZES = [(65, 65), (64, 64), (47, 65), (96, 130)]


class TensorFlowOps:
    """Maps are (B, H, W, C)."""

    relu = staticmethod(tf.nn.relu)
    relu6 = staticmethod(tf.nn.relu6)

    def picture(self, x):
        return tf.constant(x.permute(0, 2, 3, 1).numpy())

    def numpy(self, x):
        return x.numpy()

    def size(self, x):
        return tuple(x.shape[1:])

    def pad(self, x, cells):
        return tf.pad(x, [[0, 0], [cells, cells], [cells, cells], [0, 0]])

    def conv(self, x, kernel, stride=1, rate=1, same=True):
        return tf.nn.conv2d(x, kernel, stride, "SAME" if same else "VALID", dilations=rate)

    def depthwise(self, x, kernel, stride=1, rate=1, same=True):
        strides, padding = [1, stride, stride, 1], "SAME" if same else "VALID"
        return tf.nn.depthwise_conv2d(x, kernel, strides, padding, dilations=[rate, rate])

    def norm(self, x, mean, variance, gamma, beta, eps):
        return tf.compat.v1.nn.fused_batch_norm(x, gamma, beta, mean, variance, eps, is_training=False)[0]

    def moments(self, x):
        return [value.numpy() for value in tf.nn.moments(x, [0, 1, 2])]

    def bias(self, x, bias):
        return tf.nn.bias_add(x, bias)

    def mean(self, x):
        return tf.reduce_mean(x, [1, 2], keepdims=True)

    def windows(self, x, window):
        return tf.nn.avg_pool2d(x, window, 1, "VALID")

    def concat(self, maps):
        return tf.concat(maps, 3)

    def resize(self, x, size):
        return tf.compat.v1.image.resize_bilinear(x, size, align_corners=True)


# What the graph is built with, and what the converter has to be told.
PEERS = {
    "mobilenet v3": ({"backbone": mobilenet, "stride": 16, "decoder": False}, {}),
    "mobilenet v3 at 8": ({"backbone": mobilenet, "stride": 8, "decoder": False}, {"output_stride": 8}),
    "mobilenet x0.5 v3": (
        {"backbone": mobilenet, "stride": 16, "decoder": False, "multiplier": 0.5, "divisor": 1},
        {},
    ),
    "mobilenet v3 with branches": (
        {"backbone": mobilenet, "stride": 8, "decoder": False, "separable": False, "rates": (1, 3)},
        {"output_stride": 8, "atrous_rates": (1, 3)},
    ),
    "mobilenet v3+": ({"backbone": mobilenet, "stride": 16, "rates": (6, 12, 18)}, {}),
    "xception41 v3+": ({"backbone": xception, "depth": 41, "stride": 16, "rates": (6, 12, 18)}, {}),
    "xception41 v3+ at 8": (
        {
            "backbone": xception,
            "depth": 41,
            "stride": 8,
            "rates": (2, 4, 6),
            "window": (5, 9),
            "multi_grid": (1, 2, 4),
        },
        {
            "output_stride": 8,
            "atrous_rates": (2, 4, 6),
            "image_pooling_crop_size": (33, 65),
            "multi_grid": (1, 2, 4),
        },
    ),
    "xception41 v3+ dense": (
        {"backbone": xception, "depth": 41, "stride": 16, "rates": (1, 2, 3), "separable": False},
        {"atrous_rates": (1, 2, 3)},
    ),
    "xception65 v3+": ({"backbone": xception, "depth": 65, "stride": 16, "rates": (6, 12, 18)}, {}),
    "xception71 v3+ at 8": (
        {"backbone": xception, "depth": 71, "stride": 8, "rates": (12, 24, 36)},
        {"output_stride": 8},
    ),
}
SLOW = {"xception41 v3+ dense", "xception65 v3+", "xception71 v3+ at 8"}
NAMES = [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in PEERS]


@functools.lru_cache(maxsize=1)
def converted(name, folder):
    """A graph of TensorFlow, and our model with what its `Saver` wrote."""
    settings, told = PEERS[name]
    graph = Graph(TensorFlowOps(), deeplab, **settings)
    graph(picture((129, 97), count=2))
    variables = {key: tf.Variable(value) for key, value in graph.variables.items()}
    variables["global_step"] = tf.Variable(30000, dtype=tf.int64)
    variables["logits/semantic/weights/Momentum"] = tf.Variable(variables["logits/semantic/weights"])
    tf.compat.v1.train.Saver(variables).save(None, str(folder / "model.ckpt"), global_step=30000)
    conversion = from_tf_checkpoint(folder, **told)
    return graph, build((conversion.config, conversion.tensors))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return functools.cache(lambda name: tmp_path_factory.mktemp("tf"))


def difference(found, expected):
    expected = torch.from_numpy(expected).permute(0, 3, 1, 2)
    assert found.shape == expected.shape
    return ((found - expected).abs().max() / (expected.max() - expected.min())).item()


@pytest.mark.parametrize("name", NAMES)
def test_tensorflow_gives_the_same_maps_and_logits(name, folder):
    graph, model = converted(name, folder(name))
    found = {}
    parts = {name.removeprefix("model.backbone._backbone."): part for name, part in model.named_modules()}
    parts |= {"aspp": parts["model.decode_head.aspp"], "logits": parts["classifier"]}
    for part in graph.maps:
        parts[part].register_forward_hook(lambda module, _, output, part=part: found.update({part: output.clone()}))
    for size in SIZES:
        x = picture(size)
        expected = graph(x)
        with torch.no_grad():
            logits = full_size_logits(model, x)
        seen = {part for part in graph.maps if part in found}
        assert len(graph.maps) - len(seen) <= 1  # A block whose inside is run by itself
        for part in seen:
            assert difference(found[part], graph.maps[part]) <= TOLERANCE, (size, part)
        assert difference(logits, expected) <= TOLERANCE, size


def test_every_value_that_tensorflow_saved_is_read(folder):
    graph, _ = converted("mobilenet v3", folder("mobilenet v3"))
    checkpoint = TFCheckpoint(folder("mobilenet v3"))
    assert set(checkpoint) - set(graph.variables) == {"global_step", "logits/semantic/weights/Momentum"}
    assert checkpoint["global_step"].item() == 30000
    for name, value in graph.variables.items():
        assert torch.equal(checkpoint[name], torch.from_numpy(value)), name
