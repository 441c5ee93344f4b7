"""Row N7: an exported, ONNX or compiled model takes pictures of other sizes than the traced one, and gives the same.

Networks in FIXED_SIZE are exported for one size only: windows and patches laid out by Python branches on the size bind
the program to it, after minutes of symbolic arithmetic.

Fast: a few heads (torch.export of each one is in test_models_common). Slow: every head on every family, every variant,
and inductor.
"""

import io
from itertools import cycle

import onnxruntime
import pytest
import torch
from model_matrix import ALL_FAMILIES, FIRST, HEADS, VARIANTS, Cell

RICH = [
    Cell(head, list(VARIANTS.get(head, FIRST))[-1], family, 16, "auxiliary")
    for head, family in zip(HEADS, cycle(["test_resnet", "test_vit"]))  # plain; padded to whole patches
]
EVERY = [
    Cell(head, FIRST[head], family, 8 if entry.dilates else None, "none")
    for head in HEADS
    for family, entry in ALL_FAMILIES.items()
]
EVERY += [Cell(head, form, "resnet18", 16, "blocks") for head in HEADS for form in VARIANTS.get(head, FIRST)]
EVERY = [cell for cell in EVERY if cell.is_possible()] + RICH
FIXED_SIZE = ("swin_tiny_patch4_window7_224", "mobilevitv2_050")
# torch.export takes a length of 1 for a case of its own: the maps of sub-sampled blocks stay longer than that.
TRACED, OTHERS = (2, 65, 97), [(1, 98, 70), (3, 67, 130)]
DYNAMIC = {"pixel_values": dict.fromkeys((0, 2, 3), torch.export.Dim.AUTO)}


def these_fast(*fast):
    marks = [() if cell in fast else pytest.mark.slow for cell in EVERY]
    return [pytest.param(cell, marks=mark, id=str(cell)) for cell, mark in zip(EVERY, marks, strict=True)]


def pictures(shape):
    count, height, width = shape
    return torch.randn(count, 3, height, width, generator=torch.Generator().manual_seed(height))


def check(run, model, shapes):
    for shape in shapes:
        with torch.no_grad():
            found, expected = run(pictures(shape)), model(pictures(shape)).logits
        assert found.shape == expected.shape
        assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()


@pytest.mark.parametrize("cell", these_fast(*RICH[-2:]))
def test_n7_export_and_onnx_take_other_sizes(cell):
    model = cell.build().eval()
    fixed = cell.family in FIXED_SIZE
    shapes = (TRACED,) if fixed else (TRACED, *OTHERS)
    with torch.no_grad():
        exported = torch.export.export(model, (pictures(TRACED),), dynamic_shapes=None if fixed else DYNAMIC)
    program = exported.module()
    check(lambda pixels: program(pixels)["logits"], model, shapes)
    buffer = io.BytesIO()
    torch.onnx.export(exported, dynamo=True, verbose=False).save(buffer)
    session = onnxruntime.InferenceSession(buffer.getvalue(), providers=["CPUExecutionProvider"])
    (given,) = session.get_inputs()
    check(lambda pixels: torch.from_numpy(session.run(None, {given.name: pixels.numpy()})[0]), model, shapes)


@pytest.mark.parametrize("cell", these_fast())
def test_n7_compiled_whole_model_takes_other_sizes(cell):
    torch.compiler.reset()
    model = cell.build().eval()
    dynamic = cell.family not in FIXED_SIZE  # these are compiled anew for the other size
    compiled = torch.compile(model, fullgraph=True, dynamic=dynamic, backend="eager")  # one graph, run as it is
    check(lambda pixels: compiled(pixels).logits, model, (TRACED, OTHERS[0]))


@pytest.mark.slow
@pytest.mark.parametrize("cell", RICH[-2:], ids=str)
def test_n7_inductor_takes_other_sizes(cell):
    torch.compiler.reset()
    model = cell.build().eval()
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    check(lambda pixels: compiled(pixels).logits, model, (TRACED, OTHERS[0]))
