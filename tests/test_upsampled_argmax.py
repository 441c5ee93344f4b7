from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensor_recorder import TensorRecorder
from torch.nn import functional as F
from transformers.modeling_outputs import SemanticSegmenterOutput

from hf_ctxseg import CtxSegImageProcessor, upsampled_argmax, upsampling
from hf_ctxseg.upsampling import upsampled_blocks

EDGES = st.integers(1, 12)


def plain(logits, size, align_corners=False):
    return F.interpolate(logits, size, mode="bilinear", align_corners=align_corners)


def check_classes(classes, upsampled):
    """The classes are the arg-max, but for pixels whose two best classes differ by no more than rounding."""
    assert classes.dtype == torch.int64 and classes.shape == upsampled[:, 0].shape
    best = upsampled.amax(1)
    loss = best - upsampled.gather(1, classes[:, None])[:, 0]
    assert (loss <= 4 * torch.finfo(upsampled.dtype).eps * upsampled.abs().amax()).all()


@settings(deadline=None, max_examples=60)
@given(
    shape=st.tuples(st.integers(0, 3), st.integers(1, 6), EDGES, EDGES),
    size=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    align_corners=st.booleans(),
    block=st.sampled_from([1, 100, 700, 5000, 1 << 20]),
    layout=st.sampled_from(["contiguous", "channels_last", "strided"]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 99),
)
def test_it_is_the_argmax_of_upsampled_logits(shape, size, align_corners, block, layout, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(*shape, 2, generator=generator, dtype=dtype)[..., 0]
    if layout != "strided":
        logits = logits.contiguous(memory_format=getattr(torch, f"{layout}_format", torch.channels_last))
    with mock.patch.object(upsampling, "CPU_BLOCK", block):
        classes, scores = upsampled_argmax(logits, size, align_corners, return_scores=True)
        assert torch.equal(upsampled_argmax(logits, size, align_corners), classes)
    upsampled = plain(logits.contiguous(), size, align_corners) if shape[0] else logits.new_empty(0, shape[1], *size)
    if shape[0]:
        check_classes(classes, upsampled)
    torch.testing.assert_close(scores, upsampled.softmax(1).amax(1))


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("size", [(257, 513), (264, 528), (20, 31)])
def test_a_larger_picture(size, align_corners):
    logits = torch.randn(1, 30, 33, 66, generator=torch.Generator().manual_seed(0)) * 5
    upsampled = plain(logits, size, align_corners)
    classes = upsampled_argmax(logits, size, align_corners)
    check_classes(classes, upsampled)
    assert (classes != upsampled.argmax(1)).sum() <= 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype):
    logits = torch.randn(2, 5, 6, 7, generator=torch.Generator().manual_seed(0)).to(dtype)
    found = upsampled_argmax(logits, (40, 50), return_scores=True)
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast = upsampled_argmax(logits, (40, 50), return_scores=True)
    expected = upsampled_argmax(logits.float(), (40, 50), return_scores=True)
    assert found[1].dtype == torch.float32
    assert all(map(torch.equal, found, expected)) and all(map(torch.equal, under_autocast, expected))
    check_classes(found[0], plain(logits.float(), (40, 50)))


def test_of_equal_classes_it_is_the_first():
    logits = torch.zeros(1, 5, 3, 4)
    assert not upsampled_argmax(logits, (17, 9)).any()
    logits[:, [2, 4]] = 1.0
    logits[:, 3, :, 2:] = 9.0
    classes, scores = upsampled_argmax(logits, (24, 32), return_scores=True)
    assert set(classes.unique().tolist()) == {2, 3}
    assert torch.equal(classes, plain(logits, (24, 32)).argmax(1))
    torch.testing.assert_close(scores, plain(logits, (24, 32)).softmax(1).amax(1))


@pytest.mark.parametrize("way", ["blocks", "plain", "compiled"])
def test_a_class_can_be_left_out_with_minus_infinity(way, monkeypatch):
    logits = torch.randn(1, 4, 5, 6, generator=torch.Generator().manual_seed(0))
    logits[:, 1] = -torch.inf
    monkeypatch.setenv("CTXSEG_PLAIN", "1" if way == "plain" else "0")
    torch.compiler.reset()
    argmax = torch.compile(upsampled_argmax, backend="eager") if way == "compiled" else upsampled_argmax
    classes, scores = argmax(logits, (40, 48), return_scores=True)
    kept = plain(logits[:, [0, 2, 3]], (40, 48))
    assert torch.equal(classes, torch.tensor([0, 2, 3])[kept.argmax(1)])
    torch.testing.assert_close(scores, kept.softmax(1).amax(1))
    outputs = SemanticSegmenterOutput(logits=logits)
    processed = CtxSegImageProcessor().post_process_semantic_segmentation(outputs, [(40, 48)], True)[0]
    assert torch.equal(processed["segmentation"], classes[0])


def test_what_is_not_a_number_gives_a_class_all_the_same():
    logits = torch.randn(1, 4, 5, 6, generator=torch.Generator().manual_seed(0))
    logits[0, 2, 0, 0] = torch.nan
    classes = upsampled_argmax(logits, (40, 48))
    assert ((classes >= 0) & (classes < 4)).all()
    assert torch.equal(classes[:, 20:, 20:], plain(logits, (40, 48)).argmax(1)[:, 20:, 20:])


@pytest.mark.parametrize("return_scores", [False, True])
def test_no_tensor_of_the_upsampled_logits_is_made(return_scores):
    logits = torch.randn(2, 40, 16, 16)
    with TensorRecorder() as plain_recorder:
        plain(logits, (256, 256))
    with TensorRecorder() as recorder:
        upsampled_argmax(logits, (256, 256), return_scores=return_scores)
    assert plain_recorder.largest == 2 * 40 * 256 * 256
    assert recorder.largest <= upsampling.CPU_BLOCK


def test_the_largest_tensor_does_not_grow_with_the_picture():
    def largest(edge):
        with TensorRecorder() as recorder, mock.patch.object(upsampling, "CPU_BLOCK", 20_000):
            upsampled_argmax(torch.randn(1, 30, edge // 8, edge // 8), (edge, edge))
        return recorder.largest

    # (H, W) class indices are what is asked for, (1, 30, H / 8, W / 8) logits what is given.
    assert largest(256) <= 256 * 256 < 30 * 256 * 256 // 20


def test_logits_of_a_model_in_training_and_in_inference_mode():
    logits = torch.randn(1, 3, 4, 5, requires_grad=True)
    with torch.inference_mode():
        inside = upsampled_argmax(logits * 1, (16, 20))
        frozen = logits * 1
    assert torch.equal(inside, upsampled_argmax(logits, (16, 20)))
    classes, scores = upsampled_argmax(frozen, (16, 20), return_scores=True)
    assert torch.equal(inside, classes) and not scores.requires_grad


@pytest.mark.parametrize("return_scores", [False, True])
def test_it_compiles_whole(return_scores):
    torch.compiler.reset()
    logits = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    compiled = torch.compile(upsampled_argmax, fullgraph=True, backend="eager")
    found = compiled(logits, (33, 20), return_scores=return_scores)
    expected = upsampled_argmax(logits, (33, 20), return_scores=return_scores)
    for one, other in zip(found, expected, strict=True) if return_scores else [(found, expected)]:
        torch.testing.assert_close(one, other)


@settings(deadline=None, max_examples=60)
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 4), EDGES, EDGES),
    size=st.tuples(st.integers(1, 30), st.integers(1, 30)),
    align_corners=st.booleans(),
    block=st.sampled_from([1, 60, 400, 3000, 1 << 20]),
)
def test_blocks_make_up_the_upsampled_maps_and_carry_gradients_back(shape, size, align_corners, block):
    generator = torch.Generator().manual_seed(0)
    maps = torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)
    upsampled = plain(maps, size, align_corners)
    incoming = torch.randn(upsampled.shape, generator=generator, dtype=torch.float64)
    upsampled.backward(incoming)
    found, gradient = torch.full_like(upsampled, torch.nan), torch.zeros_like(maps)
    with mock.patch.object(upsampling, "CPU_BLOCK", block):
        for pictures, rows, values in upsampled_blocks(maps, size, align_corners, gradient):
            assert values.numel() <= max(block, shape[1] * size[1])
            found[pictures, :, rows] = values.permute(1, 2, 0, 3)
            values.copy_(incoming[pictures, :, rows].permute(2, 0, 1, 3))
    torch.testing.assert_close(found, upsampled.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradient, maps.grad, rtol=1e-12, atol=1e-12)
