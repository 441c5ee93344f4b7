"""TensorFlow Lite models as a small graph of operators and tensors.

A `.tflite` file is one flatbuffer (schema: `tensorflow/lite/schema/schema.fbs` in tensorflow/tensorflow), whose tables
the PyPI package `tflite` gives names to; no TensorFlow is needed and nothing in the file is run. The format has no
checksum and the package checks no offset: every length is held against the size of the file, and constants are views
of its bytes until they are asked for.
"""

import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

_DTYPES = {0: "float32", 1: "float16", 2: "int32", 3: "uint8", 4: "int64", 6: "bool", 7: "int16", 9: "int8"}
# Options that are read: the table of each kind of operator, and our names of its fields.
_CONV = {"Padding": "padding", "StrideH": "stride_h", "StrideW": "stride_w", "FusedActivationFunction": "activation"}
_DILATION = {"DilationHFactor": "dilation_h", "DilationWFactor": "dilation_w"}
_FUSED = {"FusedActivationFunction": "activation"}
_OPTIONS: dict[str, tuple[str, dict[str, str]]] = {
    "CONV_2D": ("Conv2DOptions", _CONV | _DILATION),
    "DEPTHWISE_CONV_2D": ("DepthwiseConv2DOptions", _CONV | _DILATION | {"DepthMultiplier": "depth_multiplier"}),
    "AVERAGE_POOL_2D": ("Pool2DOptions", _CONV | {"FilterHeight": "filter_h", "FilterWidth": "filter_w"}),
    "RESIZE_BILINEAR": (
        "ResizeBilinearOptions",
        {"AlignCorners": "align_corners", "HalfPixelCenters": "half_pixel_centers"},
    ),
    "FULLY_CONNECTED": ("FullyConnectedOptions", _FUSED),
    "CONCATENATION": ("ConcatenationOptions", {"Axis": "axis"} | _FUSED),
    "ADD": ("AddOptions", _FUSED),
    "SUB": ("SubOptions", _FUSED),
    "MUL": ("MulOptions", _FUSED),
    "DIV": ("DivOptions", _FUSED),
}
_DEPRECATED_LIMIT = 127  # codes from here on are in a wider field of their own


@dataclass(frozen=True)
class TfliteTensor:
    """A tensor of the graph.

    Attributes:
        name: Its name in the file, which says little: exports name alike in no two releases.
        shape: Its sizes, channels last; -1 where the file leaves one open.
        dtype: NumPy's name of the type it is stored in.
        scale: Quantisation: real value = scale * (stored value - zero_point); empty where there is none, one value
            for the tensor or one for each index along `axis`.
        zero_point: As `scale`.
        axis: The axis of the scales.
        stored: The constant as stored; None for what is computed.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    scale: np.ndarray
    zero_point: np.ndarray
    axis: int
    stored: np.ndarray | None

    def values(self) -> np.ndarray:
        """Give the constant in real numbers (float32) where it is quantised or of half precision, else as stored.

        Raises:
            ValueError: If the tensor is computed.
        """
        if self.stored is None:
            raise ValueError(f"The tensor {self.name!r} is computed by the model, where a constant was expected.")
        if self.dtype in ("float16", "float32"):
            return self.stored.astype(np.float32)
        if not self.scale.size:
            return self.stored
        shape = [1] * self.stored.ndim
        if self.scale.size > 1:
            shape[self.axis] = self.scale.size
        scale, zero_point = self.scale.reshape(shape), self.zero_point.reshape(shape)
        real: np.ndarray = (self.stored.astype(np.float64) - zero_point) * scale
        return real.astype(np.float32)


@dataclass(frozen=True)
class TfliteOperator:
    """An operator of the graph.

    Attributes:
        kind: Its name in the schema, for example `CONV_2D`.
        inputs: Indices of the tensors it takes; -1 for one left out.
        outputs: Indices of the tensors it gives.
        options: Its settings, of the kinds that are read.
    """

    kind: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class TfliteGraph:
    """The main graph of a model: its tensors, its operators in order of execution, its inputs and outputs."""

    tensors: tuple[TfliteTensor, ...]
    operators: tuple[TfliteOperator, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


def read_tflite(source: str | Path | bytes) -> TfliteGraph:
    """Read a TensorFlow Lite model.

    Args:
        source: A file or its content.

    Raises:
        ValueError: If it is no whole TensorFlow Lite model, or holds what is not read (sparse tensors, types other
            than 8 to 64-bit integers and 16 and 32-bit numbers).
        ImportError: If the package `tflite` is not installed.
    """
    name = "The TensorFlow Lite model" if isinstance(source, bytes) else str(source)
    data = source if isinstance(source, bytes) else Path(source).read_bytes()
    if len(data) < 16 or data[4:8] != b"TFL3":
        raise ValueError(
            f"{name} is no TensorFlow Lite model: it has {len(data)} bytes and the identifier {data[4:8]!r} instead "
            "of b'TFL3' at byte 4."
        )
    schema = _schema()
    try:
        return _Reader(schema, data).graph()
    # What the flatbuffer package meets where offsets lead astray.
    except (struct.error, IndexError, TypeError, AttributeError, OverflowError, UnicodeDecodeError) as error:
        raise ValueError(f"{name} is damaged or cut short: its tables lead out of its {len(data)} bytes.") from error
    except ValueError as error:
        raise ValueError(f"{name} cannot be read: {error}") from error


def _schema() -> ModuleType:
    try:
        import tflite
    except ImportError as error:
        raise ImportError("TensorFlow Lite models are read with the package tflite: pip install tflite.") from error
    module: ModuleType = tflite
    return module


class _Reader:
    """Reads tables of one file."""

    def __init__(self, schema: Any, data: bytes) -> None:
        self.schema = schema
        self.size = len(data)
        self.model = schema.Model.GetRootAsModel(data, 0)
        codes = vars(schema.BuiltinOperator)
        self.kinds = {code: kind for kind, code in codes.items() if isinstance(code, int)}

    def graph(self) -> TfliteGraph:
        if self._count(self.model.SubgraphsLength()) == 0:
            raise ValueError("it holds no graph")
        table = self.model.Subgraphs(0)
        tensors = tuple(self._tensor(table.Tensors(i)) for i in range(self._count(table.TensorsLength())))
        operators = tuple(self._operator(table.Operators(i)) for i in range(self._count(table.OperatorsLength())))
        graph = TfliteGraph(
            tensors, operators, self._indices(table.InputsAsNumpy()), self._indices(table.OutputsAsNumpy())
        )
        used = [*graph.inputs, *graph.outputs]
        for operator in operators:
            used += [*operator.inputs, *operator.outputs]
        if any(not -1 <= index < len(tensors) for index in used) or -1 in (*graph.inputs, *graph.outputs):
            raise ValueError(f"it names tensors that it does not have (it has {len(tensors)})")
        return graph

    def _count(self, length: int) -> int:
        if length * 4 > self.size:  # an entry of a vector of tables takes 4 bytes
            raise ValueError(f"it is damaged: it states {length} entries in {self.size} bytes")
        return length

    def _tensor(self, table: Any) -> TfliteTensor:
        name = (table.Name() or b"").decode("utf-8", "replace")
        dtype = _DTYPES.get(table.Type())
        if dtype is None or table.Sparsity() is not None:
            what = f"the type {table.Type()} of the schema" if dtype is None else "sparse values"
            raise ValueError(f"its tensor {name!r} has {what}, which is not read")
        shape = tuple(int(size) for size in _array(table.ShapeAsNumpy()))
        scale, zero_point, axis = self._quantisation(table.Quantization(), name, shape)
        stored = self._constant(table.Buffer(), name, shape, dtype)
        return TfliteTensor(name, shape, dtype, scale, zero_point, axis, stored)

    def _quantisation(self, table: Any, name: str, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray, int]:
        empty = np.zeros(0)
        if table is None or table.ScaleLength() == 0:
            return empty, empty, 0
        scale = np.asarray(table.ScaleAsNumpy(), np.float64)
        zero_point = np.asarray(_array(table.ZeroPointAsNumpy()), np.float64)
        zero_point = zero_point if zero_point.size else np.zeros_like(scale)
        axis = int(table.QuantizedDimension())
        sizes = {1, shape[axis]} if 0 <= axis < len(shape) else {1}
        if scale.size not in sizes or zero_point.size != scale.size or not (np.isfinite(scale) & (scale > 0)).all():
            raise ValueError(
                f"its tensor {name!r} of shape {list(shape)} has {scale.size} scales and {zero_point.size} zero "
                f"points along axis {axis}, where one for each index or one for all is expected, above 0"
            )
        return scale, zero_point, axis

    def _constant(self, index: int, name: str, shape: tuple[int, ...], dtype: str) -> np.ndarray | None:
        if index >= self.model.BuffersLength():
            raise ValueError(f"its tensor {name!r} lies in buffer {index}, but it has {self.model.BuffersLength()}")
        table = self.model.Buffers(index)
        if table.Offset() > 1:
            raise ValueError(f"its tensor {name!r} lies behind the flatbuffer, as in files above 2 GB: not read")
        data = _array(table.DataAsNumpy())
        if not data.size:
            return None
        expected = np.dtype(dtype).itemsize
        for size in shape:  # whole numbers of Python: a huge shape must not overflow
            expected *= size
        if data.size != expected:
            raise ValueError(f"its tensor {name!r} of shape {list(shape)} ({dtype}) has {data.size} bytes")
        return data.view(np.uint8).view(np.dtype(dtype).newbyteorder("<")).reshape(shape)

    def _operator(self, table: Any) -> TfliteOperator:
        index = table.OpcodeIndex()
        if index >= self._count(self.model.OperatorCodesLength()):
            raise ValueError(f"an operator has the code {index}, but there are {self.model.OperatorCodesLength()}")
        code = self.model.OperatorCodes(index)
        number = code.DeprecatedBuiltinCode()
        number = code.BuiltinCode() if number >= _DEPRECATED_LIMIT else max(number, code.BuiltinCode())
        kind = self.kinds.get(number, f"operator {number}")
        if kind == "CUSTOM":
            kind = f"CUSTOM {(code.CustomCode() or b'').decode('utf-8', 'replace')}".strip()
        inputs, outputs = self._indices(table.InputsAsNumpy()), self._indices(table.OutputsAsNumpy())
        return TfliteOperator(kind, inputs, outputs, self._options(kind, table))

    def _options(self, kind: str, table: Any) -> dict[str, Any]:
        if kind not in _OPTIONS:
            return {}
        name, fields = _OPTIONS[kind]
        options, found = getattr(self.schema, name)(), table.BuiltinOptions()
        if found is None:  # every field has its default
            return {}
        if table.BuiltinOptionsType() != getattr(self.schema.BuiltinOptions, name):
            raise ValueError(f"an operator {kind} has the options of another kind")
        options.Init(found.Bytes, found.Pos)
        return {ours: getattr(options, theirs)() for theirs, ours in fields.items()}

    def _indices(self, vector: Any) -> tuple[int, ...]:
        return tuple(int(index) for index in _array(vector))


def _array(vector: Any) -> np.ndarray:
    """The package gives 0 for a vector that is left out."""
    return vector if isinstance(vector, np.ndarray) else np.zeros(0, np.int64)
