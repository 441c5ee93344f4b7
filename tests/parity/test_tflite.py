"""Against the TensorFlow Lite runtime (PyPI package ai-edge-litert), which runs the files that are converted."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from ai_edge_litert.interpreter import Interpreter
from transformers import AutoModelForSemanticSegmentation

sys.path.append(str(Path(__file__).parents[1]))
from tflite_writer import Export, deeplab

from hf_ctxseg.conversion_tflite import from_tflite

CHECKPOINT = Path(__file__).parents[3] / "shared" / "checkpoints" / "deeplabv3_257_mv_gpu.tflite"
CASES = {
    "v3 at 8": ({}, {"output_stride": 8}),
    "v3 at 16, spelt out": ({"spelt_out": True}, {"output_stride": 16}),
    "v3 with rates, spelt out": ({"spelt_out": True}, {"output_stride": 8, "rates": (1, 2, 3)}),
    "v3+ of half precision": ({"storage": "float16"}, {"output_stride": 16, "rates": (2, 1, 3), "decoder": True}),
}


def difference(data, values):
    """The largest difference of the logits at the size of the picture, as a share of their range."""
    interpreter = Interpreter(model_content=data)
    interpreter.allocate_tensors()
    interpreter.set_tensor(interpreter.get_input_details()[0]["index"], values.permute(0, 2, 3, 1).numpy())
    interpreter.invoke()
    expected = interpreter.get_tensor(interpreter.get_output_details()[0]["index"])
    conversion = from_tflite(data)
    model = AutoModelForSemanticSegmentation.from_config(conversion.config).eval()
    model.load_state_dict(conversion.tensors)
    with torch.no_grad():
        logits = torch.nn.functional.interpolate(
            model(values).logits,
            size=values.shape[-2:],
            mode="bilinear",
            align_corners=conversion.config.align_corners,
        )
    found = logits.permute(0, 2, 3, 1).numpy()
    assert found.shape == expected.shape
    return np.abs(found - expected).max() / (expected.max() - expected.min())


@pytest.mark.parametrize("case", CASES)
def test_the_runtime_gives_the_same_logits(case):
    written, shape = CASES[case]
    align_corners = case != "v3 at 16, spelt out"
    values = torch.rand(1, 3, 64, 49, generator=torch.Generator().manual_seed(0)) * 2 - 1
    export = Export(values, **written)
    logits = deeplab(export, **shape)
    assert difference(export.to_bytes(export.resize(logits, (64, 49), align_corners)), values) < 1e-4


@pytest.mark.skipif(not CHECKPOINT.is_file(), reason="needs the TFLite checkpoint in shared")
def test_the_real_checkpoint_gives_the_runtimes_logits():
    values = torch.rand(1, 3, 257, 257, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert difference(CHECKPOINT.read_bytes(), values) < 1e-4
