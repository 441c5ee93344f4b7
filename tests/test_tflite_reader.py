import random
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from tflite_writer import Writer

from hf_ctxseg.tflite_reader import read_tflite

CHECKPOINT = Path(__file__).parents[2] / "shared" / "checkpoints" / "deeplabv3_257_mv_gpu.tflite"


def small(**changes):
    """A picture, a convolution with weights of 8 bit by channel, and a resizing."""
    writer = Writer()
    picture = writer.tensor((1, 4, 4, 3))
    stored = np.arange(-6, 6, dtype=np.int8).reshape(2, 1, 1, 6)[..., :3]
    quantisation = {"scale": [0.5, 0.25], "zero_point": [0, 2], "axis": 0} | changes
    weight = writer.constant(np.ascontiguousarray(stored), **quantisation)
    bias = writer.constant(np.array([8, -4], np.int32), scale=[0.125], zero_point=[0])
    options = {"StrideH": 2, "StrideW": 2, "Padding": 1, "FusedActivationFunction": 3}
    x = writer.operator("CONV_2D", [picture, weight, bias], (1, 2, 2, 2), table="Conv2DOptions", **options)
    size = writer.constant(np.array([4, 4], np.int32))
    options = {"AlignCorners": False, "HalfPixelCenters": True}
    x = writer.operator("RESIZE_BILINEAR", [x, size], (1, 4, 4, 2), table="ResizeBilinearOptions", **options)
    return writer.to_bytes([picture], [x]), stored


def test_operators_come_in_order_with_their_options():
    graph = read_tflite(small()[0])
    conv, resize = graph.operators
    assert (conv.kind, conv.inputs, resize.kind) == ("CONV_2D", (0, 1, 2), "RESIZE_BILINEAR")
    assert conv.outputs[0] == resize.inputs[0] and graph.outputs == resize.outputs and graph.inputs == (0,)
    assert conv.options["stride_h"] == 2 and conv.options["padding"] == 1 and conv.options["activation"] == 3
    assert conv.options["dilation_w"] == 1  # the schema's default
    assert resize.options == {"align_corners": False, "half_pixel_centers": True}
    assert graph.tensors[0].shape == (1, 4, 4, 3) and graph.tensors[0].stored is None


def test_quantised_constants_become_real_numbers():
    data, stored = small()
    _, weight, bias, _, size, _ = read_tflite(data).tensors
    expected = (stored - np.array([0, 2]).reshape(2, 1, 1, 1)) * np.array([0.5, 0.25]).reshape(2, 1, 1, 1)
    assert np.array_equal(weight.values(), expected)
    assert np.array_equal(bias.values(), [1.0, -0.5])
    assert size.values().tolist() == [4, 4]
    with pytest.raises(ValueError, match="computed by the model"):
        read_tflite(data).tensors[0].values()


def test_a_file_is_read_as_its_content_is(tmp_path):
    data, _ = small()
    (tmp_path / "model.tflite").write_bytes(data)
    assert len(read_tflite(tmp_path / "model.tflite").operators) == 2


@pytest.mark.parametrize("content", [b"", b"TFL3", b"PK\x03\x04" + bytes(100), bytes(8) + b"TFL3" + bytes(50)])
def test_what_is_no_such_model_is_refused(content):
    with pytest.raises(ValueError, match="no TensorFlow Lite model: it has"):
        read_tflite(content)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scale": [0.5, 0.5, 0.5], "zero_point": [0, 0, 0]}, "3 scales"),
        ({"scale": [0.5, -1.0]}, "above 0"),
        ({"scale": [0.5, float("nan")]}, "above 0"),
        ({"zero_point": [1]}, "1 zero points"),
        ({"axis": 7}, "axis 7"),
    ],
)
def test_quantisation_that_does_not_fit_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        read_tflite(small(**changes)[0])


def test_constants_that_do_not_fill_their_shape_are_refused():
    writer = Writer()
    picture = writer.tensor((1, 2, 2, 3))
    writer.tensors.append(((2**30, 2**30, 8), np.zeros(4, np.float32), "float32", (), (), 0))
    tracemalloc.start()
    with pytest.raises(ValueError, match="has 16 bytes"):
        read_tflite(writer.to_bytes([picture], [picture]))
    assert tracemalloc.get_traced_memory()[1] < 1 << 24
    tracemalloc.stop()


def test_tensors_that_are_not_there_are_refused():
    writer = Writer()
    picture = writer.tensor((1, 2, 2, 3))
    with pytest.raises(ValueError, match="names tensors that it does not have"):
        read_tflite(writer.to_bytes([picture], [5]))


def test_a_damaged_file_is_refused_or_read_but_never_crashes():
    """Every cut, and bytes changed at random: an error of another kind, or one that takes long, fails."""
    data, _ = small()
    for end in range(len(data) - 8):  # the same
        with pytest.raises(ValueError, match="TensorFlow Lite model"):
            read_tflite(data[:end])
    rng = random.Random(0)
    refused = 0
    for _ in range(1500):
        changed = bytearray(data)
        for _ in range(rng.randrange(1, 6)):
            changed[rng.randrange(8, len(data))] = rng.randrange(256)
        try:
            read_tflite(bytes(changed))
        except ValueError:
            refused += 1
    assert refused > 300


@pytest.mark.skipif(not CHECKPOINT.is_file(), reason="needs the TFLite checkpoint in shared")
def test_every_cut_of_a_real_file_is_refused():
    data = CHECKPOINT.read_bytes()
    assert len(read_tflite(data).operators) == 70
    for end in np.linspace(0, len(data) - 9, 60).astype(int):  # the last 8 bytes are of a field that is not needed
        with pytest.raises(ValueError, match=r"no TensorFlow Lite model|damaged|cannot be read"):
            read_tflite(data[:end])


def test_without_the_package_the_command_that_installs_it_is_named(monkeypatch):
    data, _ = small()
    monkeypatch.setitem(sys.modules, "tflite", None)
    with pytest.raises(ImportError, match="pip install tflite"):
        read_tflite(data)
