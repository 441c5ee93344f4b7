"""Writes TensorFlow Lite models of DeepLab, and computes each operator by its definition while it is written."""

import flatbuffers
import numpy as np
import tflite
import torch
from torch.nn import functional as F

TYPES = {"float32": 0, "float16": 1, "int32": 2, "uint8": 3, "int64": 4, "int8": 9}
ACTIVATIONS = {"": 0, "relu": 1, "relu6": 3}


class Writer:
    """Collects tensors and operators, and writes them with the schema's own functions."""

    def __init__(self):
        self.tensors, self.operators, self.codes = [], [], []

    def tensor(self, shape, data=None, dtype="float32", scale=(), zero_point=(), axis=0):
        self.tensors.append((shape, data, dtype, scale, zero_point, axis))
        return len(self.tensors) - 1

    def constant(self, data, **quantisation):
        return self.tensor(data.shape, data, data.dtype.name, **quantisation)

    def operator(self, kind, inputs, shape, dtype="float32", table="", scale=(), zero_point=(), **options):
        code = getattr(tflite.BuiltinOperator, kind)
        if code not in self.codes:
            self.codes.append(code)
        output = self.tensor(shape, dtype=dtype, scale=scale, zero_point=zero_point)
        self.operators.append((self.codes.index(code), inputs, output, table, options))
        return output

    def to_bytes(self, inputs, outputs):
        builder = flatbuffers.Builder(1 << 16)
        buffers = [b""] + [b"" if data is None else data.tobytes() for _, data, *_ in self.tensors]
        operators = [self._operator(builder, *operator) for operator in self.operators]
        tensors = [self._tensor(builder, number, *tensor) for number, tensor in enumerate(self.tensors)]
        graph = table(
            builder,
            "SubGraph",
            Tensors=offsets(builder, tensors),
            Inputs=builder.CreateNumpyVector(np.array(inputs, np.int32)),
            Outputs=builder.CreateNumpyVector(np.array(outputs, np.int32)),
            Operators=offsets(builder, operators),
        )
        codes = [
            table(builder, "OperatorCode", DeprecatedBuiltinCode=min(code, 127), BuiltinCode=code, Version=1)
            for code in self.codes
        ]
        parts = []
        for data in buffers:
            vector = builder.CreateNumpyVector(np.frombuffer(data, np.uint8)) if data else None
            parts.append(table(builder, "Buffer", Data=vector))
        model = table(
            builder,
            "Model",
            Version=3,
            OperatorCodes=offsets(builder, codes),
            Subgraphs=offsets(builder, [graph]),
            Buffers=offsets(builder, parts),
        )
        builder.Finish(model, file_identifier=b"TFL3")
        return bytes(builder.Output())

    def _operator(self, builder, code, inputs, output, name, options):
        found = table(builder, name, **options) if name else None
        return table(
            builder,
            "Operator",
            OpcodeIndex=code,
            Inputs=builder.CreateNumpyVector(np.array(inputs, np.int32)),
            Outputs=builder.CreateNumpyVector(np.array([output], np.int32)),
            BuiltinOptionsType=getattr(tflite.BuiltinOptions, name) if name else 0,
            BuiltinOptions=found,
        )

    def _tensor(self, builder, number, shape, data, dtype, scale, zero_point, axis):
        quantisation = None
        if len(scale):
            quantisation = table(
                builder,
                "QuantizationParameters",
                Scale=builder.CreateNumpyVector(np.array(scale, np.float32)),
                ZeroPoint=builder.CreateNumpyVector(np.array(zero_point, np.int64)),
                QuantizedDimension=axis,
            )
        return table(
            builder,
            "Tensor",
            Shape=builder.CreateNumpyVector(np.array(shape, np.int32)),
            Type=TYPES[dtype],
            Buffer=number + 1 if data is not None else 0,
            Name=builder.CreateString(f"t{number}"),
            Quantization=quantisation,
        )


def table(builder, name, **fields):
    getattr(tflite, f"{name}Start")(builder)
    for field, value in fields.items():
        if value is not None:
            getattr(tflite, f"{name}Add{field}")(builder, value)
    return getattr(tflite, f"{name}End")(builder)


def offsets(builder, values):
    builder.StartVector(4, len(values), 4)
    for value in reversed(values):
        builder.PrependUOffsetTRelative(value)
    return builder.EndVector()


class Map:
    """A tensor of the graph and its value (1, C, H, W) for the picture."""

    def __init__(self, index, value):
        self.index, self.value = index, value

    @property
    def shape(self):  # channels last
        return tuple(self.value.permute(0, 2, 3, 1).shape)


class Export:
    """A DeepLab on MobileNetV2 as TensorFlow would export it.

    Args:
        picture: (1, 3, H, W) as the network takes it.
        spelt_out: Normalisations, activations, padding and atrous convolutions as operators of their own.
        storage: How constants are stored: float32, float16, int8 (a scale per channel) or uint8 (one scale).
        input_scale: Quantisation of the picture: its type, scale and zero point.
        window: Side of the pooling in cells; 0: the whole map.
    """

    def __init__(self, picture, spelt_out=False, storage="float32", input_scale=(), window=0):
        self.writer, self.spelt_out, self.storage, self.window = Writer(), spelt_out, storage, window
        self.random = np.random.default_rng(0)
        shape = tuple(picture.permute(0, 2, 3, 1).shape)
        if input_scale:
            dtype, scale, zero_point = input_scale
            index = self.writer.tensor(shape, dtype=dtype, scale=[scale], zero_point=[zero_point])
        else:
            index = self.writer.tensor(shape)
        self.picture = Map(index, picture.double())

    def constant(self, values, axis=0):
        """Store values; give the tensor's index and what they are once read."""
        if self.storage == "float32" or values.ndim == 1:
            values = values.astype(np.float32)
            return self.writer.constant(values), values
        if self.storage == "float16":
            values = values.astype(np.float16)
            half = self.writer.constant(values)
            return self.writer.operator("DEQUANTIZE", [half], values.shape), values.astype(np.float32)
        if self.storage == "uint8":
            scale, zero_point = np.float32(values.max() - values.min()) / 255, 100
            stored = np.clip(np.rint(values / scale) + zero_point, 0, 255).astype(np.uint8)
            index = self.writer.constant(stored, scale=[scale], zero_point=[zero_point])
            return index, (stored.astype(np.float64) - zero_point) * scale
        others = tuple(place for place in range(values.ndim) if place != axis)
        scale = (np.abs(values).max(axis=others) / 127).astype(np.float32)
        shape = [-1 if place == axis else 1 for place in range(values.ndim)]
        stored = np.rint(values / scale.reshape(shape)).astype(np.int8)
        index = self.writer.constant(stored, scale=scale, zero_point=np.zeros(len(scale)), axis=axis)
        return index, stored * scale.astype(np.float64).reshape(shape)

    def conv(self, x, width, size=1, stride=1, rate=1, activation="relu6", depthwise=False):
        """A convolution with "SAME" padding as TensorFlow defines it, a bias and an activation."""
        taken, channels = x.index, x.value.shape[1]
        width = channels if depthwise else width
        shape = (1, size, size, width) if depthwise else (width, size, size, channels)
        fan_in = size * size * (1 if depthwise else channels)
        weight, read = self.constant(self.random.normal(0, (2 / fan_in) ** 0.5, shape), axis=3 if depthwise else 0)
        bias, shift = self.constant(self.random.normal(0, 0.3, width))
        kernel = torch.from_numpy(np.asarray(read, np.float64))
        kernel = kernel.permute(3, 0, 1, 2) if depthwise else kernel.permute(0, 3, 1, 2)
        padding = same_padding(x.value.shape[2:], size, stride, rate)
        groups = channels if depthwise else 1
        value = F.conv2d(F.pad(x.value, padding), kernel, None, stride, 0, rate, groups)
        scale = self.random.uniform(0.5, 1.5, width).astype(np.float32) if self.spelt_out else np.ones(width)
        value = value * torch.from_numpy(scale).view(-1, 1, 1) + torch.from_numpy(shift).view(-1, 1, 1)
        value = {"": lambda v: v, "relu": F.relu, "relu6": F.relu6}[activation](value)
        kind = "DEPTHWISE_CONV_2D" if depthwise else "CONV_2D"
        options = {"table": "DepthwiseConv2DOptions" if depthwise else "Conv2DOptions", "StrideH": stride}
        options |= {"StrideW": stride} | ({"DepthMultiplier": 1} if depthwise else {})
        shape = tuple(value.permute(0, 2, 3, 1).shape)
        if not self.spelt_out:
            options |= {"DilationHFactor": rate, "DilationWFactor": rate}
            options |= {"FusedActivationFunction": ACTIVATIONS[activation]}
            return Map(self.writer.operator(kind, [taken, weight, bias], shape, **options), value)
        index = self._spelt_out(x, kind, weight, shape, padding, rate, stride, options)
        factor = self.writer.constant(scale)
        index = self.writer.operator("MUL", [index, factor], shape, table="MulOptions")
        index = self.writer.operator("ADD", [bias, index], shape, table="AddOptions")
        if activation:
            index = self.writer.operator(activation.upper(), [index], shape)
        return Map(index, value)

    def _spelt_out(self, x, kind, weight, shape, padding, rate, stride, options):
        left, right, top, bottom = padding
        height, width = x.value.shape[2:]
        channels = x.value.shape[1]
        taken, zeros = x.index, self.writer.constant(np.zeros(shape[3], np.float32))
        if rate > 1:
            more = [-(height + top + bottom) % rate, -(width + left + right) % rate]
            block = self.writer.constant(np.array([rate, rate], np.int32))
            pads = self.writer.constant(np.array([[top, bottom + more[0]], [left, right + more[1]]], np.int32))
            crops = self.writer.constant(np.array([[0, more[0]], [0, more[1]]], np.int32))
            rows, columns = (height + top + bottom + more[0]) // rate, (width + left + right + more[1]) // rate
            blocked = (rate * rate, rows, columns, channels)
            taken = self.writer.operator("SPACE_TO_BATCH_ND", [taken, block, pads], blocked)
            inner = (rate * rate, rows - 2, columns - 2, shape[3])
            index = self.writer.operator(kind, [taken, weight, zeros], inner, Padding=1, **options)
            return self.writer.operator("BATCH_TO_SPACE_ND", [index, block, crops], shape)
        if any(padding):
            pads = np.array([[0, 0], [top, bottom], [left, right], [0, 0]], np.int32)
            padded = (1, height + top + bottom, width + left + right, channels)
            taken = self.writer.operator("PAD", [taken, self.writer.constant(pads)], padded)
            options |= {"Padding": 1}
        return self.writer.operator(kind, [taken, weight, zeros], shape, **options)

    def add(self, one, other):
        value = one.value + other.value
        return Map(self.writer.operator("ADD", [one.index, other.index], one.shape, table="AddOptions"), value)

    def concat(self, *maps):
        value = torch.cat([item.value for item in maps], dim=1)
        shape = tuple(value.permute(0, 2, 3, 1).shape)
        inputs = [item.index for item in maps]
        return Map(self.writer.operator("CONCATENATION", inputs, shape, table="ConcatenationOptions", Axis=3), value)

    def pool(self, x):
        if self.window:
            value = F.avg_pool2d(x.value, self.window, stride=1)
            options = {"Padding": 1, "StrideH": 1, "StrideW": 1}
            options |= {"FilterHeight": self.window, "FilterWidth": self.window}
            shape = tuple(value.permute(0, 2, 3, 1).shape)
            index = self.writer.operator("AVERAGE_POOL_2D", [x.index], shape, table="Pool2DOptions", **options)
            return Map(index, value)
        value = x.value.mean(dim=(2, 3), keepdim=True)
        _, height, width, channels = x.shape
        if self.spelt_out:
            axes = self.writer.constant(np.array([1, 2], np.int32))
            index = self.writer.operator("MEAN", [x.index, axes], (1, channels), table="ReducerOptions")
            to = self.writer.constant(np.array([1, 1, 1, channels], np.int32))
            return Map(self.writer.operator("RESHAPE", [index, to], (1, 1, 1, channels)), value)
        options = {"Padding": 1, "StrideH": height, "StrideW": width, "FilterHeight": height, "FilterWidth": width}
        shape = (1, 1, 1, channels)
        return Map(self.writer.operator("AVERAGE_POOL_2D", [x.index], shape, table="Pool2DOptions", **options), value)

    def resize(self, x, size, align_corners=True):
        value = F.interpolate(x.value, size=size, mode="bilinear", align_corners=align_corners)
        shape = tuple(value.permute(0, 2, 3, 1).shape)
        to = self.writer.constant(np.array(size, np.int32))
        options = {"AlignCorners": align_corners, "HalfPixelCenters": not align_corners}
        inputs = [x.index, to]
        return Map(
            self.writer.operator("RESIZE_BILINEAR", inputs, shape, table="ResizeBilinearOptions", **options), value
        )

    def to_bytes(self, output):
        return self.writer.to_bytes([self.picture.index], [output.index])


def same_padding(size, kernel, stride, rate):
    """TensorFlow's "SAME": (left, right, top, bottom), what is odd at the end."""
    sides = []
    for edge in reversed(size):
        total = max((-(-edge // stride) - 1) * stride + (kernel - 1) * rate + 1 - edge, 0)
        sides += [total // 2, total - total // 2]
    return tuple(sides)


# arXiv 1801.04381, table 2: expansion, channels, blocks, stride.
STAGES = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))


def backbone(export, output_stride, width=0.25, x=None, dilate_first=False):
    """MobileNetV2 with whole channels, as slim builds it: the deepest map, and that within the third block."""
    x = export.conv(x or export.picture, round(32 * width), 3, 2)
    stride, rate, number, low = 2, 1, 0, None
    for expansion, channels, blocks, native in STAGES:
        for block in range(blocks):
            step, applied = (native if block == 0 else 1), rate
            if step > 1 and stride == output_stride:
                rate, step = rate * step, 1
                applied = rate if dilate_first else applied
            stride *= step
            y = x
            if expansion > 1:
                inner = x.value.shape[1] * expansion
                y = export.conv(y, max(8, (inner + 4) // 8 * 8))
            y = export.conv(y, 0, 3, step, applied, depthwise=True)
            low = y if number == 2 else low
            y = export.conv(y, int(channels * width + 0.5), activation="")
            x = export.add(y, x) if block else y
            number += 1
    return x, low


def deeplab(export, output_stride=8, rates=(), decoder=False, classes=5, hidden=16, **arguments):
    """DeepLabv3, or v3+ with a decoder, whose branches are [pooling, 1×1, rates …]: the logits before resizing."""
    x, low = backbone(export, output_stride, **arguments)
    size = x.value.shape[2:]
    branches = [export.resize(export.conv(export.pool(x), hidden, activation="relu"), size)]
    branches.append(export.conv(x, hidden, activation="relu"))
    for rate in rates:
        depthwise = export.conv(x, 0, 3, rate=rate, activation="relu", depthwise=True)
        branches.append(export.conv(depthwise, hidden, activation="relu"))
    x = export.conv(export.concat(*branches), hidden, activation="relu")
    if decoder:
        low = export.conv(low, 6, activation="relu")
        size = low.value.shape[2:]
        x = export.concat(export.resize(x, size), export.resize(low, size))  # TensorFlow's resizes both
        for _ in range(2):
            x = export.conv(export.conv(x, 0, 3, activation="relu", depthwise=True), hidden, activation="relu")
    return export.conv(x, classes, activation="")
