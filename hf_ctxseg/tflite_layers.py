"""The operators of a TensorFlow Lite graph as the layers of a network: convolutions with all that belongs to them.

Exports of one network differ: a bias, a normalisation or an activation stands by itself or within a convolution, an
atrous convolution is one operator or three (space to batch, convolution, batch to space), constants are quantised or
of half precision, "SAME" padding is spelt out. Here each becomes one layer, whatever its tensors are called.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from math import prod

import numpy as np

from .tflite_reader import TfliteGraph, TfliteOperator

_ACTIVATIONS = {0: "", 1: "relu", 3: "relu6"}
_SAME = 0


@dataclass
class Layer:
    """A layer of the network.

    Attributes:
        kind: `conv`, `depthwise`, `add`, `concat`, `pool`, `resize`, or another operator's name in lower case.
        inputs: Tensors it takes, without constants.
        output: The tensor it gives.
        weight: (out, in, height, width) of a convolution.
        bias: (out,) of a convolution.
        activation: `relu`, `relu6` or nothing.
        stride: Stride of a convolution.
        dilation: Atrous rate of a convolution.
        options: Further settings: those of a resizing; `window` (height, width) of a pooling.
    """

    kind: str
    inputs: list[int]
    output: int
    weight: np.ndarray = field(default_factory=lambda: np.zeros(0, np.float32))
    bias: np.ndarray = field(default_factory=lambda: np.zeros(0, np.float32))
    activation: str = ""
    stride: int = 1
    dilation: int = 1
    options: dict[str, object] = field(default_factory=dict)

    def __str__(self) -> str:
        if self.kind not in ("conv", "depthwise"):
            return self.kind
        size = "×".join(map(str, self.weight.shape[2:]))
        details = f"stride {self.stride}, rate {self.dilation}, {self.activation or 'linear'}"
        return f"{size} {self.kind} of {self.weight.shape[0]} channels ({details})"


class Network:
    """The layers of a graph.

    Args:
        graph: A graph with one picture as input.

    Attributes:
        layers: All layers, in order of execution.
        input: The tensor of the picture (1, H, W, 3).
        input_steps: The arithmetic on the picture before the first layer: (`mul` or `add`, values) in order.

    Raises:
        ValueError: If the graph is not that of a network for one RGB picture, or does what no layer here does.
    """

    def __init__(self, graph: TfliteGraph) -> None:
        self.graph = graph
        self.layers: list[Layer] = []
        self.input = self._find_input()
        self.input_steps: list[tuple[str, np.ndarray]] = []
        self._aliases: dict[int, int] = {}
        self._constants: dict[int, np.ndarray] = {}
        self._in_blocks: dict[int, tuple[int, int]] = {}  # a tensor after space to batch: the one before, the rate
        self._blocked: dict[int, int] = {}  # rate at which a layer's output still is in blocks
        self._padded: dict[int, tuple[int, np.ndarray]] = {}
        self._givers: dict[int, Layer] = {}
        for operator in graph.operators:
            self._translate(operator)

    def users(self, tensor: int) -> list[Layer]:
        """Give the layers that take a tensor."""
        return [layer for layer in self.layers if tensor in layer.inputs]

    def shape(self, tensor: int) -> tuple[int, ...]:
        """Give the shape of a tensor, channels last."""
        return self.graph.tensors[tensor].shape

    def _find_input(self) -> int:
        shapes = [list(self.graph.tensors[index].shape) for index in self.graph.inputs]
        if len(shapes) != 1 or len(shapes[0]) != 4 or shapes[0][3] != 3:
            raise ValueError(f"its inputs have the shapes {shapes}, but one RGB picture [1, H, W, 3] is expected")
        return self.graph.inputs[0]

    def _translate(self, operator: TfliteOperator) -> None:
        kind = operator.kind
        if len(operator.outputs) != 1 or not operator.inputs:
            raise ValueError(
                f"an operator {kind} has {len(operator.inputs)} inputs and {len(operator.outputs)} outputs"
            )
        handlers: dict[str, Callable[[TfliteOperator], None]] = {
            "CONV_2D": self._convolution,
            "DEPTHWISE_CONV_2D": self._convolution,
            "FULLY_CONNECTED": self._convolution,
            "SPACE_TO_BATCH_ND": self._to_blocks,
            "BATCH_TO_SPACE_ND": self._from_blocks,
            "PAD": self._pad,
            "RELU": self._activation,
            "RELU6": self._activation,
            **dict.fromkeys(("ADD", "SUB", "MUL", "DIV"), self._arithmetic),
            **dict.fromkeys(("QUANTIZE", "DEQUANTIZE", "CAST"), self._same_values),
            **dict.fromkeys(("RESHAPE", "SQUEEZE", "EXPAND_DIMS", "STRIDED_SLICE", "SLICE"), self._same_elements),
            **dict.fromkeys(("AVERAGE_POOL_2D", "MEAN"), self._pooling),
            **dict.fromkeys(("RESIZE_BILINEAR", "BROADCAST_TO", "TILE"), self._resizing),
        }
        handlers.get(kind, self._other)(operator)

    def _tensor(self, index: int) -> int:
        return self._aliases.get(index, index)

    def _constant(self, index: int) -> np.ndarray | None:
        if index in self._constants:
            return self._constants[index]
        tensor = self.graph.tensors[index]
        return None if tensor.stored is None else tensor.values()

    def _needed(self, operator: TfliteOperator, place: int) -> np.ndarray:
        index = operator.inputs[place] if place < len(operator.inputs) else -1
        values = None if index < 0 else self._constant(index)
        if values is None:
            raise ValueError(f"an operator {operator.kind} has no constant as input {place}")
        return values

    def _add(self, layer: Layer) -> None:
        self.layers.append(layer)
        self._givers[layer.output] = layer

    def _other(self, operator: TfliteOperator) -> None:
        inputs = [self._tensor(index) for index in operator.inputs if index >= 0 and self._constant(index) is None]
        kind = {"CONCATENATION": "concat"}.get(operator.kind, operator.kind.lower())
        self._add(Layer(kind, inputs, operator.outputs[0]))

    def _same_values(self, operator: TfliteOperator) -> None:
        values = self._constant(operator.inputs[0])
        if values is None:
            self._aliases[operator.outputs[0]] = self._tensor(operator.inputs[0])
        else:
            self._constants[operator.outputs[0]] = values

    def _same_elements(self, operator: TfliteOperator) -> None:
        before, after = self.shape(operator.inputs[0]), self.shape(operator.outputs[0])
        if [size for size in before if size != 1] != [size for size in after if size != 1]:
            raise ValueError(f"an operator {operator.kind} makes {list(after)} of {list(before)}")
        self._same_values(operator)

    def _convolution(self, operator: TfliteOperator) -> None:
        options, weight = operator.options, self._needed(operator, 1)
        is_depthwise = operator.kind == "DEPTHWISE_CONV_2D"
        if operator.kind == "FULLY_CONNECTED" and weight.ndim == 2:  # on a map of one cell
            weight = weight[:, None, None, :]
        if weight.ndim != 4 or not np.issubdtype(weight.dtype, np.floating):
            raise ValueError(f"a {operator.kind} has weights of shape {list(weight.shape)} and type {weight.dtype}")
        weight = weight.transpose(3, 0, 1, 2) if is_depthwise else weight.transpose(0, 3, 1, 2)
        taken = self._tensor(operator.inputs[0])
        strides = {options.get("stride_h", 1), options.get("stride_w", 1)}
        rates = {options.get("dilation_h", 1), options.get("dilation_w", 1)}
        if len(strides) != 1 or len(rates) != 1 or weight.shape[2] % 2 == 0 or weight.shape[2] != weight.shape[3]:
            raise ValueError(f"a {operator.kind} is not square and odd (strides {strides}, rates {rates})")
        stride, rate = strides.pop(), rates.pop()
        source, in_blocks = self._in_blocks.get(taken, (taken, 0))
        if in_blocks or taken in self._padded:
            if rate > 1 or options.get("padding", _SAME) == _SAME:
                raise ValueError(f"a {operator.kind} pads beside what is padded before it")
            if not in_blocks:
                source = self._check_padding(taken, weight.shape[2], stride)
        elif options.get("padding", _SAME) != _SAME and weight.shape[2] > 1:
            raise ValueError(f"a {weight.shape[2]}×{weight.shape[2]} convolution has no padding")
        if in_blocks:
            rate = in_blocks
            self._blocked[operator.outputs[0]] = rate
        bias = self._needed(operator, 2) if len(operator.inputs) > 2 and operator.inputs[2] >= 0 else None
        self._add(
            Layer(
                "depthwise" if is_depthwise else "conv",
                [source],
                operator.outputs[0],
                np.ascontiguousarray(weight),
                np.zeros(len(weight), np.float32) if bias is None else np.asarray(bias, np.float32).reshape(-1),
                self._fused(operator),
                stride,
                rate,
            )
        )

    def _fused(self, operator: TfliteOperator) -> str:
        code = operator.options.get("activation", 0)
        if code not in _ACTIVATIONS:
            raise ValueError(f"a {operator.kind} has the activation {code} of the schema")
        return _ACTIVATIONS[code]

    def _to_blocks(self, operator: TfliteOperator) -> None:
        block, padding = self._needed(operator, 1).ravel(), self._needed(operator, 2)
        rate = int(block[0]) if block.size else 0
        # The convolution is checked to be 3×3 where its rate is read: then the rate is what is padded before.
        if (
            block.tolist() != [rate, rate]
            or rate < 1
            or padding.shape != (2, 2)
            or padding[:, 0].tolist() != [rate] * 2
        ):
            raise ValueError(f"blocks of {block.tolist()} padded by {padding.tolist()} are no atrous convolution")
        self._in_blocks[operator.outputs[0]] = self._tensor(operator.inputs[0]), rate

    def _from_blocks(self, operator: TfliteOperator) -> None:
        block, crops = self._needed(operator, 1).ravel(), self._needed(operator, 2)
        taken = self._tensor(operator.inputs[0])
        rate = self._blocked.pop(taken, 0)
        if block.tolist() != [rate, rate] or crops.shape != (2, 2) or crops[:, 0].any():
            raise ValueError(f"blocks of {block.tolist()} cropped by {crops.tolist()} do not undo those of {rate}")
        if self._givers[taken].weight.shape[2] != 3:
            raise ValueError(f"an atrous convolution has the layer {self._givers[taken]}, where 3×3 is expected")
        self._aliases[operator.outputs[0]] = taken

    def _pad(self, operator: TfliteOperator) -> None:
        self._padded[operator.outputs[0]] = self._tensor(operator.inputs[0]), self._needed(operator, 1)

    def _check_padding(self, taken: int, size: int, stride: int) -> int:
        """Give the tensor before a padding that is that of "SAME"."""
        source, padding = self._padded[taken]
        expected = [[0, 0]]
        for edge in self.shape(source)[1:3]:
            total = max((-(-edge // stride) - 1) * stride + size - edge, 0)
            expected.append([total // 2, total - total // 2])
        if padding.tolist() != [*expected, [0, 0]]:
            raise ValueError(f"a convolution of stride {stride} is padded by {padding.tolist()}, not by {expected}")
        return source

    def _activation(self, operator: TfliteOperator) -> None:
        taken = self._tensor(operator.inputs[0])
        layer = self._givers.get(taken)
        if layer is None or layer.kind not in ("conv", "depthwise") or layer.activation:
            raise ValueError(
                f"a {operator.kind} follows {layer or 'the input'}, where a linear convolution is expected"
            )
        layer.activation = operator.kind.lower()
        self._aliases[operator.outputs[0]] = taken

    def _arithmetic(self, operator: TfliteOperator) -> None:
        if len(operator.inputs) != 2:
            raise ValueError(f"an operator {operator.kind} has {len(operator.inputs)} inputs")
        values = [self._constant(index) for index in operator.inputs]
        constant, place = (values[1], 0) if values[1] is not None else (values[0], 1)
        if constant is None:
            if operator.kind != "ADD" or self._fused(operator):
                raise ValueError(f"an operator {operator.kind} joins two maps, where a plain addition is expected")
            self._add(Layer("add", [self._tensor(index) for index in operator.inputs], operator.outputs[0]))
            return
        if place == 1 and operator.kind in ("SUB", "DIV"):
            raise ValueError(f"an operator {operator.kind} takes a map from a constant")
        constant = np.asarray(constant, np.float64)
        is_sum = operator.kind in ("ADD", "SUB")
        step = constant if operator.kind in ("ADD", "MUL") else -constant if is_sum else 1 / constant
        taken = self._tensor(operator.inputs[place])
        self._aliases[operator.outputs[0]] = taken
        if taken == self.input and not self._fused(operator):
            self.input_steps.append(("add" if is_sum else "mul", step.reshape(-1)))
        else:
            self._scale(taken, "add" if is_sum else "mul", step, self._fused(operator))

    def _scale(self, taken: int, kind: str, values: np.ndarray, activation: str) -> None:
        """Take a sum or a product by channels into the convolution before it, as an unfolded normalisation is."""
        layer = self._givers.get(taken)
        if layer is None or layer.kind not in ("conv", "depthwise") or layer.activation or self.users(taken):
            raise ValueError(f"a {kind} by constants follows {layer or 'the input'}")
        if values.size not in (1, len(layer.bias)) or prod(values.shape[:-1]) != 1:
            raise ValueError(f"a {kind} by constants of shape {list(values.shape)} follows {layer}")
        step = np.broadcast_to(values.reshape(-1), layer.bias.shape)
        if kind == "add":
            layer.bias = (layer.bias + step).astype(np.float32)
        else:
            layer.bias = (layer.bias * step).astype(np.float32)
            layer.weight = (layer.weight * step[:, None, None, None]).astype(np.float32)
        layer.activation = activation

    def _pooling(self, operator: TfliteOperator) -> None:
        taken, options = self._tensor(operator.inputs[0]), operator.options
        height, width = self.shape(taken)[1:3]
        window = [height, width]
        if operator.kind == "MEAN":
            axes = sorted(int(axis) % 4 for axis in self._needed(operator, 1).ravel())
            if axes != [1, 2]:
                raise ValueError(f"a mean is taken over the axes {axes}, where height and width are expected")
        else:
            window = [options["filter_h"], options["filter_w"]]
            strides = [options["stride_h"], options["stride_w"]]
            is_whole = window == [height, width] and (options["padding"] != _SAME or strides == window)
            slides = options["padding"] != _SAME and strides == [1, 1]
            if self._fused(operator) or not (is_whole or slides):
                raise ValueError(f"a pooling of {window} on a map of {[height, width]} pads or has strides")
        self._add(Layer("pool", [taken], operator.outputs[0], options={"window": tuple(window)}))

    def _resizing(self, operator: TfliteOperator) -> None:
        before, after = (self.shape(tensor)[1:3] for tensor in (operator.inputs[0], operator.outputs[0]))
        # TensorFlow's decoder resizes the map of stride 4 to its own size. One cell is what a pooling gives.
        if operator.kind == "RESIZE_BILINEAR" and before == after and min(before, default=0) > 0 and prod(before) > 1:
            self._same_values(operator)
            return
        taken = self._tensor(operator.inputs[0])
        options = dict(operator.options) if operator.kind == "RESIZE_BILINEAR" else {}
        if operator.kind != "RESIZE_BILINEAR" and any(size != 1 for size in self.shape(taken)[1:3]):
            raise ValueError(f"an operator {operator.kind} repeats a map of {list(self.shape(taken))}")
        self._add(Layer("resize", [taken], operator.outputs[0], options=options))
