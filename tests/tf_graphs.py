"""The graphs of TensorFlow's DeepLab, with the names of its variables, on any library's operations.

Written out after deeplab/model.py, deeplab/core/xception.py, slim/nets/mobilenet and arXiv 1802.02611; `TorchOps` has
the operations as formulas on PyTorch, tests/parity has TensorFlow's own.
"""

import math

import numpy as np
import torch
from torch.nn import functional as F

MOBILENET = [(1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1)]
XCEPTION_ENTRY = {
    41: [(128, 2), (256, 2), (728, 2)],
    65: [(128, 2), (256, 2), (728, 2)],
    71: [(128, 2), (256, 1), (256, 2), (728, 1), (728, 2)],
}


class TorchOps:
    """Maps are (B, C, H, W); kernels and all else are TensorFlow's."""

    relu = staticmethod(F.relu)
    relu6 = staticmethod(F.relu6)

    def picture(self, x):
        return x

    def numpy(self, x):
        return x.permute(0, 2, 3, 1).numpy()

    def size(self, x):
        return x.shape[2], x.shape[3], x.shape[1]

    def pad(self, x, cells):
        return F.pad(x, (cells,) * 4)

    def conv(self, x, kernel, stride=1, rate=1, same=True):
        kernel = torch.from_numpy(kernel).permute(3, 2, 0, 1)
        return F.conv2d(self._same(x, kernel, stride, rate) if same else x, kernel, None, stride, 0, rate)

    def depthwise(self, x, kernel, stride=1, rate=1, same=True):
        kernel = torch.from_numpy(kernel)[..., 0].permute(2, 0, 1)[:, None]
        x = self._same(x, kernel, stride, rate) if same else x
        return F.conv2d(x, kernel, None, stride, 0, rate, groups=len(kernel))

    def _same(self, x, kernel, stride, rate):
        """Zeros so that the output has ceil(size / stride) cells, the odd one below and to the right."""
        sides = []
        for edge, taps in ((x.shape[3], kernel.shape[3]), (x.shape[2], kernel.shape[2])):
            total = max(0, (math.ceil(edge / stride) - 1) * stride + (taps - 1) * rate + 1 - edge)
            sides += [total // 2, total - total // 2]
        return F.pad(x, sides)

    def norm(self, x, mean, variance, gamma, beta, eps):
        mean, variance, gamma, beta = (
            torch.from_numpy(value)[:, None, None] for value in (mean, variance, gamma, beta)
        )
        return (x - mean) / torch.sqrt(variance + eps) * gamma + beta

    def moments(self, x):
        return x.mean((0, 2, 3)).numpy(), x.var((0, 2, 3), unbiased=False).numpy()

    def bias(self, x, bias):
        return x + torch.from_numpy(bias)[:, None, None]

    def mean(self, x):
        return x.mean((2, 3), keepdim=True)

    def windows(self, x, window):
        return F.avg_pool2d(x, window, stride=1)

    def concat(self, maps):
        return torch.cat(maps, 1)

    def resize(self, x, size):
        """Bilinear with aligned corners, as two products with matrices of weights."""
        for axis, edge in ((2, size[0]), (3, size[1])):
            weights = torch.zeros(edge, x.shape[axis])
            for cell in range(edge):
                place = cell * (x.shape[axis] - 1) / max(1, edge - 1)
                first = min(int(place), x.shape[axis] - 1)
                weights[cell, first] += 1 - (place - first)
                weights[cell, min(first + 1, x.shape[axis] - 1)] += place - first
            x = torch.movedim(torch.tensordot(x, weights, dims=([axis], [1])), -1, axis)
        return x


class Graph:
    """Variables are drawn when they are first used; their running statistics are those of the first input.

    `maps` holds what each part gave in the last run, (B, H, W, C).
    """

    def __init__(self, ops, build, **settings):
        self.ops, self.build, self.settings = ops, build, settings
        self.variables, self.maps = {}, {}
        self.random = np.random.default_rng(0)

    def __call__(self, picture):
        return self.ops.numpy(self.build(self, self.ops.picture(picture), **self.settings))

    def variable(self, name, shape, draw):
        if name not in self.variables:
            self.variables[name] = draw(shape).astype(np.float32)
        return self.variables[name]

    def kernel(self, name, shape, inputs):
        return self.variable(name, shape, lambda shape: self.random.normal(0, (2 / inputs) ** 0.5, shape))

    def norm(self, x, scope, eps):
        shape = self.ops.size(x)[2:]
        if f"{scope}/BatchNorm/gamma" not in self.variables:
            mean, variance = self.ops.moments(x)
            self.variables[f"{scope}/BatchNorm/moving_mean"] = mean
            self.variables[f"{scope}/BatchNorm/moving_variance"] = np.maximum(variance, 0.3)
        gamma = self.variable(f"{scope}/BatchNorm/gamma", shape, lambda shape: self.random.uniform(0.5, 1.5, shape))
        beta = self.variable(f"{scope}/BatchNorm/beta", shape, lambda shape: self.random.normal(0, 0.3, shape))
        mean, variance = (self.variables[f"{scope}/BatchNorm/moving_{kind}"] for kind in ("mean", "variance"))
        return self.ops.norm(x, mean, variance, gamma, beta, eps)

    def conv(self, x, scope, width, size=1, stride=1, rate=1, eps=1e-5, act="relu", same=True):
        inputs = self.ops.size(x)[2]
        kernel = self.kernel(f"{scope}/weights", (size, size, inputs, width), size * size * inputs)
        x = self.norm(self.ops.conv(x, kernel, stride, rate, same), scope, eps)
        return getattr(self.ops, act)(x) if act else x

    def depthwise(self, x, scope, stride=1, rate=1, eps=1e-5, act="relu", same=True):
        kernel = self.kernel(f"{scope}/depthwise_weights", (3, 3, self.ops.size(x)[2], 1), 9)
        x = self.norm(self.ops.depthwise(x, kernel, stride, rate, same), scope, eps)
        return getattr(self.ops, act)(x) if act else x

    def separable(self, x, scope, width, stride=1, rate=1, eps=1e-5, act="relu"):
        if stride > 1:  # padded on all sides, whatever the size
            x = self.ops.pad(x, rate)
        x = self.depthwise(x, f"{scope}_depthwise", stride, rate, eps, act, same=stride == 1)
        return self.conv(x, f"{scope}_pointwise", width, eps=eps, act=act)

    def keep(self, name, x):
        self.maps[name] = self.ops.numpy(x)
        return x


def xception(graph, x, depth, stride, multi_grid=(1, 1, 1)):
    scope, eps = f"xception_{depth}", 1e-3
    x = graph.conv(graph.ops.pad(x, 1), f"{scope}/entry_flow/conv1_1", 32, 3, 2, eps=eps, same=False)
    x = graph.conv(x, f"{scope}/entry_flow/conv1_2", 64, 3, eps=eps)
    blocks = [(f"entry_flow/block{i}/unit_1", [w] * 3, s) for i, (w, s) in enumerate(XCEPTION_ENTRY[depth], start=1)]
    blocks += [(f"middle_flow/block1/unit_{i + 1}", [728] * 3, 1) for i in range(8 if depth == 41 else 16)]
    blocks += [("exit_flow/block1/unit_1", [728, 1024, 1024], 2), ("exit_flow/block2/unit_1", [1536, 1536, 2048], 1)]
    current, rate, low = 2, 1, None
    for number, (name, widths, step) in enumerate(blocks):
        name, last = f"{scope}/{name}/xception_module", number == len(blocks) - 1
        unit_step, unit_rate = (1, rate) if current == stride else (step, 1)
        inner, at_stride_4 = x, current == 4 and step == 2 and low is None
        for i, width in enumerate(widths):
            grid = multi_grid[i] if last else 1
            act = "relu" if last else None
            inner = inner if last else graph.ops.relu(inner)
            inner = graph.separable(
                inner, f"{name}/separable_conv{i + 1}", width, unit_step if i == 2 else 1, unit_rate * grid, eps, act
            )
            if i == 1 and at_stride_4:
                low = inner
        if last:
            x = inner
        elif number < len(XCEPTION_ENTRY[depth]) or number == len(blocks) - 2:
            x = inner + graph.conv(x, f"{name}/shortcut", widths[-1], stride=unit_step, eps=eps, act=None)
        else:
            x = inner + x
        graph.keep(f"blocks_{number}", x)
        rate, current = (rate * step, current) if current == stride else (rate, current * step)
    return x, low


def mobilenet(graph, x, stride, multiplier=1.0, divisor=8):
    def rounded(width, divisor=divisor):
        near = max(divisor, int(width + divisor / 2) // divisor * divisor)
        return near + divisor if near < 0.9 * width else near

    settings = {"eps": 1e-3, "act": "relu6"}
    x = graph.conv(x, "MobilenetV2/Conv", rounded(32 * multiplier), 3, 2, **settings)
    current, rate, low, number = 2, 1, None, 0
    for stage, (expansion, width, depth, first_step) in enumerate(MOBILENET):
        for block in range(depth):
            scope = f"MobilenetV2/expanded_conv{f'_{number}' if number else ''}"
            step = first_step if block == 0 else 1
            unit_step, unit_rate = (1, rate) if current == stride else (step, 1)
            rate, current = (rate * step, current) if current == stride else (rate, current * step)
            inputs = graph.ops.size(x)[2]
            inner = x
            if expansion > 1:
                inner = graph.conv(x, f"{scope}/expand", rounded(inputs * expansion, 8), **settings)
            inner = graph.depthwise(inner, f"{scope}/depthwise", unit_step, unit_rate, **settings)
            if number == 2:  # layer_4
                low = inner
            inner = graph.conv(inner, f"{scope}/project", rounded(width * multiplier), eps=1e-3, act=None)
            x = inner + x if unit_step == 1 and graph.ops.size(inner)[2] == inputs else inner
            graph.keep(f"blocks.{stage}.{block}", x)
            number += 1
    return x, low


def deeplab(graph, x, backbone, stride, rates=(), window=None, decoder=True, separable=True, **settings):
    """Logits of the size of the picture."""
    ops, size = graph.ops, graph.ops.size(x)[:2]
    x, low = backbone(graph, x, stride=stride, **settings)
    cells = ops.size(x)[:2]
    pooled = ops.mean(x) if window is None else ops.windows(x, [min(pair) for pair in zip(window, cells, strict=True)])
    branches = [ops.resize(graph.conv(pooled, "image_pooling", 256), cells), graph.conv(x, "aspp0", 256)]
    for number, rate in enumerate(rates, start=1):
        if separable:
            branches.append(graph.separable(x, f"aspp{number}", 256, rate=rate))
        else:
            branches.append(graph.conv(x, f"aspp{number}", 256, 3, rate=rate))
    x = graph.keep("aspp", graph.conv(ops.concat(branches), "concat_projection", 256))
    if decoder:
        low = graph.conv(low, "decoder/feature_projection0", 48)
        quarter = tuple((edge - 1) // 4 + 1 for edge in size)
        x = ops.concat([ops.resize(x, quarter), ops.resize(low, quarter)])
        for number in range(2):
            if separable:
                x = graph.separable(x, f"decoder/decoder_conv{number}", 256)
            else:
                x = graph.conv(x, f"decoder/decoder_conv0/decoder_conv0_{number + 1}", 256, 3)
    inputs = ops.size(x)[2]
    x = ops.conv(x, graph.kernel("logits/semantic/weights", (1, 1, inputs, 5), inputs))
    x = ops.bias(x, graph.variable("logits/semantic/biases", (5,), lambda shape: graph.random.normal(size=shape)))
    return ops.resize(graph.keep("logits", x), size)
