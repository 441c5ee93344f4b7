"""Rows N7: an exported, ONNX or compiled model takes pictures of other sizes than the traced one, and gives the same.

Fast: every head once through torch.export, some through ONNX and torch.compile. Slow: every head on every family,
every variant, and inductor.
"""

import io
from itertools import cycle

import onnxruntime
import pytest
import torch
from model_matrix import ALL_FAMILIES, FIRST, HEADS, VARIANTS, Cell

LAST = {name: list(VARIANTS.get(name, ["defaults"]))[-1] for name in HEADS}
FAST = [
    Cell(head, LAST[head], family, 16, "auxiliary")
    for head, family in zip(HEADS, cycle(["test_resnet", "test_convnext", "test_efficientnet", "test_byobnet"]))
]
SLOW = [
    Cell(head, FIRST[head], family, 8 if entry.dilates else None, "none")
    for head in HEADS
    for family, entry in ALL_FAMILIES.items()
]
SLOW += [Cell(head, form, "resnet18", 16, "blocks") for head in HEADS for form in VARIANTS.get(head, ["defaults"])]
SLOW = [cell for cell in SLOW if cell.is_possible()]
CELLS = [*FAST, *(pytest.param(cell, marks=pytest.mark.slow) for cell in SLOW)]
SOME = [
    *FAST[1:3],
    *(pytest.param(cell, marks=pytest.mark.slow) for cell in (FAST[0], *FAST[3:], *SLOW)),
]
TRACED, OTHERS = (2, 65, 97), [(1, 98, 45), (3, 33, 130)]
DYNAMIC = {"pixel_values": dict.fromkeys((0, 2, 3), torch.export.Dim.AUTO)}


def pictures(shape):
    count, height, width = shape
    return torch.randn(count, 3, height, width, generator=torch.Generator().manual_seed(height))


def export(model):
    with torch.no_grad():
        return torch.export.export(model, (pictures(TRACED),), dynamic_shapes=DYNAMIC)


def check(run, model, shapes=(TRACED, *OTHERS)):
    for shape in shapes:
        with torch.no_grad():
            found, expected = run(pictures(shape)), model(pictures(shape)).logits
        assert found.shape == expected.shape
        assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()


@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_n7_exported_program_takes_other_sizes(cell):
    model = cell.build().eval()
    program = export(model).module()
    check(lambda pixels: program(pixels)["logits"], model)


@pytest.mark.parametrize("cell", SOME, ids=str)
def test_n7_onnx_takes_other_sizes(cell):
    model = cell.build().eval()
    buffer = io.BytesIO()
    torch.onnx.export(export(model), dynamo=True, verbose=False).save(buffer)
    session = onnxruntime.InferenceSession(buffer.getvalue(), providers=["CPUExecutionProvider"])
    (given,) = session.get_inputs()
    check(lambda pixels: torch.from_numpy(session.run(["logits"], {given.name: pixels.numpy()})[0]), model)


@pytest.mark.parametrize("cell", SOME, ids=str)
def test_n7_compiled_whole_model_takes_other_sizes(cell):
    # Without a compiler of C++: what is shown is that the model is one graph, whose backward is one too.
    torch.compiler.reset()
    model = cell.build().eval()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    check(lambda pixels: compiled(pixels).logits, model, (TRACED, OTHERS[0]))


@pytest.mark.slow
@pytest.mark.parametrize("head", HEADS)
def test_n7_inductor_takes_other_sizes(head):
    torch.compiler.reset()
    model = Cell(head, LAST[head], "test_resnet", 16, "none").build().eval()
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    check(lambda pixels: compiled(pixels).logits, model, (TRACED, OTHERS[0]))
