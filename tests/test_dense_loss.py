import math
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensor_recorder import TensorRecorder
from torch.nn import functional as F

from hf_ctxseg import upsampled_cross_entropy, upsampling
from hf_ctxseg.region_losses import _largest_first


def data(seed=0, classes=4, ignore_index=255):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, classes, 5, 6, generator=generator)
    labels = torch.randint(0, classes, (2, 19, 23), generator=generator)
    labels[torch.rand(labels.shape, generator=generator) < 0.3] = ignore_index
    return logits, labels


def plain(logits, labels, ignore_index=255, align_corners=False, class_weights=None, label_smoothing=0.0):
    upsampled = F.interpolate(logits, labels.shape[1:], mode="bilinear", align_corners=align_corners)
    return F.cross_entropy(
        upsampled, labels, class_weights, ignore_index=ignore_index, label_smoothing=label_smoothing
    )


def with_gradient(formula, logits, *arguments, dtype=None):
    logits = logits.detach().clone().to(dtype).requires_grad_()
    loss = formula(logits, *arguments)
    loss.backward()
    return loss.detach(), logits.grad


@pytest.mark.parametrize("ignore_index", [255, -100, 3])
@pytest.mark.parametrize("align_corners", [False, True])
def test_it_is_torchs_loss_on_upsampled_logits(align_corners, ignore_index):
    logits, labels = data(ignore_index=ignore_index)
    ours, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    upsampled = F.interpolate(theirs, (19, 23), mode="bilinear", align_corners=align_corners)
    expected = F.cross_entropy(upsampled, labels, ignore_index=ignore_index)
    loss = upsampled_cross_entropy(ours, labels, ignore_index, align_corners)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(ours.grad, theirs.grad)


def test_it_is_the_formula_at_the_labels_size():
    logits = np.array([[[[1.0, 2.0, 0.0]], [[0.0, 2.0, 5.0]]]])  # (1, 2, 1, 3)
    loss = upsampled_cross_entropy(torch.tensor(logits), torch.tensor([[[0, 1, 255]]]))
    first = -1 + math.log(math.exp(1) + math.exp(0))
    second = -2 + math.log(2 * math.exp(2))
    assert loss.item() == pytest.approx((first + second) / 2, rel=1e-6)


def test_labels_are_not_shrunk():
    logits = torch.zeros(1, 2, 1, 1)
    logits[:, 1] = 3.0
    labels = torch.zeros(1, 8, 8, dtype=torch.long)
    labels[0, 0, 0] = 1  # one pixel of 64, which nearest shrinking would lose or take for all
    expected = (63 * math.log(1 + math.exp(3)) + math.log(1 + math.exp(-3))) / 64
    assert upsampled_cross_entropy(logits, labels).item() == pytest.approx(expected, rel=1e-5)


def test_without_a_valid_pixel_loss_and_gradient_are_zero():
    logits = torch.randn(2, 4, 5, 6, requires_grad=True)
    loss = upsampled_cross_entropy(logits, torch.full((2, 19, 23), 255))
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(logits.grad, torch.zeros_like(logits))


def test_a_picture_without_valid_pixels_does_not_count():
    logits, labels = data()
    labels[1] = 255
    torch.testing.assert_close(
        upsampled_cross_entropy(logits, labels), upsampled_cross_entropy(logits[:1], labels[:1])
    )


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
def test_labels_of_any_integer_type(dtype):
    logits, labels = data()
    assert torch.equal(upsampled_cross_entropy(logits, labels.to(dtype)), upsampled_cross_entropy(logits, labels))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_summed_in_float32(dtype):
    logits, labels = data()
    loss = upsampled_cross_entropy(logits.to(dtype), labels)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, upsampled_cross_entropy(logits.to(dtype).float(), labels))


def test_autocast_does_not_lower_the_precision():
    logits, labels = data()
    with torch.autocast("cpu", torch.bfloat16):
        loss = upsampled_cross_entropy(logits, labels)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, upsampled_cross_entropy(logits, labels))


@pytest.mark.parametrize("shape", [(2, 1, 19, 23), (19, 23), (1, 19, 23), (3, 19, 23)])
def test_labels_of_another_shape_are_refused(shape):
    with pytest.raises(ValueError, match=r"\(2, height, width\)"):
        upsampled_cross_entropy(torch.randn(2, 4, 5, 6), torch.zeros(shape, dtype=torch.long))


@settings(deadline=None, max_examples=150)
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 6), st.integers(1, 9), st.integers(1, 9)),
    size=st.tuples(st.integers(1, 30), st.integers(1, 30)),
    align_corners=st.booleans(),
    ignore_index=st.sampled_from([255, -100, 0]),
    weights=st.sampled_from(["none", "random", "some zero"]),
    label_smoothing=st.sampled_from([0.0, 0.1, 1.0]),
    channels_last=st.booleans(),
    block=st.sampled_from([1, 100, 900, 1 << 20]),
    seed=st.integers(0, 99),
)
def test_it_is_the_plain_formula(
    shape, size, align_corners, ignore_index, weights, label_smoothing, channels_last, block, seed
):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(shape, generator=generator, dtype=torch.float64) * 4
    if channels_last:
        logits = logits.contiguous(memory_format=torch.channels_last)
    labels = torch.randint(0, shape[1], (shape[0], *size), generator=generator)
    labels[torch.rand(labels.shape, generator=generator) < 0.3] = ignore_index
    class_weights = None if weights == "none" else torch.rand(shape[1], generator=generator, dtype=torch.float64)
    if weights == "some zero":
        class_weights[::2] = 0
    arguments = (labels, ignore_index, align_corners, class_weights, label_smoothing)
    with mock.patch.object(upsampling, "CPU_BLOCK", block):
        loss, gradient = with_gradient(upsampled_cross_entropy, logits, *arguments)
        assert torch.equal(upsampled_cross_entropy(logits, *arguments), loss)
    assert gradient.stride() == logits.stride()
    expected, expected_gradient = with_gradient(plain, logits, *arguments)
    if expected.isfinite():
        torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(gradient, expected_gradient, rtol=1e-10, atol=1e-12)
    else:  # no valid pixel, or none whose class has a weight: the plain formula divides by 0
        assert loss == 0 and not gradient.any()


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("scale", [1.0, 100.0])
@pytest.mark.parametrize("edge", [129, 136])
def test_float32_is_no_less_exact_than_the_plain_formula(edge, scale, label_smoothing):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 21, 17, 17, generator=generator) * scale
    labels = torch.randint(0, 21, (2, edge, edge), generator=generator)
    arguments = (labels, 255, False, torch.rand(21, generator=generator), label_smoothing)
    exact_arguments = (labels, 255, False, arguments[3].double(), label_smoothing)
    exact, exact_gradient = with_gradient(plain, logits, *exact_arguments, dtype=torch.float64)
    with mock.patch.object(upsampling, "CPU_BLOCK", 30_000):
        ours, our_gradient = with_gradient(upsampled_cross_entropy, logits, *arguments)
    theirs, their_gradient = with_gradient(plain, logits, *arguments)
    epsilon = torch.finfo(torch.float32).eps
    assert abs(ours - exact) <= 1.1 * abs(theirs - exact) + 2 * epsilon * exact
    error, their_error = ((gradient - exact_gradient).norm() for gradient in (our_gradient, their_gradient))
    assert error <= 1.1 * their_error


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("size", [(7, 8), (3, 4), (2, 2)])
def test_gradient_by_finite_differences(size, align_corners):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 3, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, 3, (2, *size), generator=generator)
    labels[0, 0] = 255
    weights = torch.tensor([0.5, 1.0, 2.0])
    for arguments in ((), (weights,), (weights, 0.2)):
        assert torch.autograd.gradcheck(
            lambda x, more=arguments: upsampled_cross_entropy(x, labels, 255, align_corners, *more), logits
        )


def test_no_tensor_of_the_upsampled_logits_is_made():
    logits, labels = torch.randn(2, 40, 16, 16), torch.randint(0, 40, (2, 256, 256))
    largest = {}
    for formula in (plain, upsampled_cross_entropy):
        with TensorRecorder() as recorder:
            with_gradient(formula, logits, labels)
        largest[formula] = recorder.largest
    assert largest[plain] == 2 * 40 * 256 * 256
    assert largest[upsampled_cross_entropy] <= upsampling.CPU_BLOCK


def test_the_largest_tensor_grows_with_the_pixels_and_not_with_their_classes():
    with TensorRecorder() as recorder, mock.patch.object(upsampling, "CPU_BLOCK", 20_000):
        with_gradient(upsampled_cross_entropy, torch.randn(1, 60, 20, 20), torch.randint(0, 60, (1, 160, 160)))
    assert recorder.largest <= 160 * 160


def test_without_a_gradient_none_is_computed():
    logits, labels = data()
    with mock.patch.object(upsampling, "product", side_effect=AssertionError("carried a gradient back")):
        assert not upsampled_cross_entropy(logits, labels).requires_grad
        with torch.no_grad():
            loss = upsampled_cross_entropy(logits.requires_grad_(), labels)
    torch.testing.assert_close(loss, plain(logits, labels).detach())


def test_gradients_scale_with_the_loss_and_accumulate():
    logits, labels = data()
    _, gradient = with_gradient(upsampled_cross_entropy, logits, labels)
    logits.requires_grad_()
    (upsampled_cross_entropy(logits, labels) * 65536).backward()
    assert torch.equal(logits.grad, gradient * 65536)
    (upsampled_cross_entropy(logits, labels) / 2 + logits.sum()).backward()
    torch.testing.assert_close(logits.grad, gradient * 65536 + gradient / 2 + 1)


def test_scaled_gradients_of_half_precision_logits_do_not_underflow():
    logits = (torch.randn(1, 4, 5, 6, generator=torch.Generator().manual_seed(0)) * 9).half()
    labels = F.interpolate(logits.float(), (80, 96), mode="bilinear").argmax(1)  # nothing is left to learn
    exact = with_gradient(plain, logits, labels, dtype=torch.float64)[1]
    logits.requires_grad_()
    (upsampled_cross_entropy(logits, labels) * 2**16).backward()
    assert logits.grad.dtype == torch.float16
    assert (exact.abs() < torch.finfo(torch.float16).smallest_normal / 16).any()
    torch.testing.assert_close(logits.grad.double() / 2**16, exact, rtol=1e-2, atol=1e-11)


def test_large_float16_logits_stay_finite():
    logits, labels = data()
    logits = (logits.clamp(-3, 3) * 20_000).half()  # their differences are beyond float16
    loss, gradient = with_gradient(upsampled_cross_entropy, logits, labels)
    expected, expected_gradient = with_gradient(plain, logits.float(), labels)
    assert loss.isfinite()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient.float(), expected_gradient, rtol=1e-3, atol=1e-6)


def test_a_class_can_be_left_out_with_minus_infinity():
    logits, labels = data(classes=5)
    labels[labels == 2] = 255
    kept = torch.tensor([0, 1, 3, 4])
    places = torch.tensor([0, 1, -1, 2, 3])
    kept_labels = torch.where(labels == 255, 255, places[labels.clamp(max=4)])
    logits[:, 2] = -torch.inf
    loss, gradient = with_gradient(upsampled_cross_entropy, logits, labels)
    expected, expected_gradient = with_gradient(plain, logits[:, kept], kept_labels)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient[:, kept], expected_gradient)
    assert not gradient[:, 2].any()


def test_overflow_shows():
    logits, labels = data()
    logits[0, 1, 2, 2] = torch.inf
    assert with_gradient(upsampled_cross_entropy, logits, labels)[0].isnan()


@pytest.mark.parametrize("factor", [lambda logits: logits.sum(), lambda logits: 1])  # with a history, and without
def test_second_derivatives_are_refused(factor):
    logits, labels = data()
    loss = upsampled_cross_entropy(logits.requires_grad_(), labels) * factor(logits)
    with pytest.raises(RuntimeError, match="no second derivative: set CTXSEG_PLAIN=1"):
        torch.autograd.grad(loss, logits, create_graph=True)


def test_what_has_no_label_may_be_infinite():
    logits, labels = data()
    size = labels.shape[-2:]
    logits = F.interpolate(logits, (size[0] // 2, size[1] // 2), mode="bilinear").requires_grad_()
    labels[:, :4, :4] = 255
    changed = logits.detach().clone()
    changed[:, 1, 0, 0] = torch.inf
    for smoothing in (0.0, 0.1):
        (expected,) = torch.autograd.grad(upsampled_cross_entropy(logits, labels, label_smoothing=smoothing), logits)
        changed.requires_grad_()
        loss = upsampled_cross_entropy(changed, labels, label_smoothing=smoothing)
        (found,) = torch.autograd.grad(loss, changed)
        assert loss.isfinite() and found.isfinite().all()
        torch.testing.assert_close(found[:, :, 3:, 3:], expected[:, :, 3:, 3:])


@pytest.mark.parametrize("size", [(8, 9), (5, 20)])
def test_labels_no_finer_than_the_logits_and_meta_ones(size):
    torch.manual_seed(0)
    logits, labels = torch.randn(2, 4, 8, 13), torch.randint(0, 4, (2, *size))
    expected = F.cross_entropy(F.interpolate(logits, size, mode="bilinear"), labels)
    torch.testing.assert_close(upsampled_cross_entropy(logits, labels), expected)
    assert upsampled_cross_entropy(logits.to("meta"), labels.to("meta")).shape == ()


@pytest.mark.parametrize("arguments", [(), (torch.tensor([1.0, 2.0, 0.5, 0.0]), 0.1)])
def test_it_compiles_whole(arguments):
    torch.compiler.reset()
    logits, labels = data()
    compiled = torch.compile(upsampled_cross_entropy, fullgraph=True, backend="aot_eager")
    found = with_gradient(compiled, logits, labels, 255, False, *arguments)
    expected = with_gradient(upsampled_cross_entropy, logits, labels, 255, False, *arguments)
    torch.testing.assert_close(found, expected)
    loss, gradient = with_gradient(compiled, logits, torch.full_like(labels, 255), 255, False, *arguments)
    assert loss == 0 and not gradient.any()


def test_an_empty_batch_has_no_loss():
    loss, gradient = with_gradient(
        upsampled_cross_entropy, torch.zeros(0, 4, 5, 6), torch.zeros(0, 9, 9, dtype=torch.long)
    )
    assert loss == 0 and gradient.shape == (0, 4, 5, 6)


@pytest.mark.parametrize("value", [-1, 4, 254])
def test_l1_a_label_that_is_no_class_is_refused(value):
    logits, labels = data()
    labels[0, 3, 5] = value
    with pytest.raises(
        ValueError, match=rf"1 labels are no class of 0 … 3 \(among them {value}\): .* ignore_index, 255"
    ):
        upsampled_cross_entropy(logits, labels)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"class_weights": torch.ones(3)}, r"class_weights have the shape \(3,\), but there are 4 classes"),
        ({"label_smoothing": 1.5}, "label_smoothing is 1.5, but must lie between 0 and 1"),
        ({"label_smoothing": -0.1}, "label_smoothing is -0.1, but must lie between 0 and 1"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments, message):
    logits, labels = data()
    with pytest.raises(ValueError, match=message):
        upsampled_cross_entropy(logits, labels, **arguments)


def test_labels_that_are_no_indices_are_refused():
    logits, labels = data()
    with pytest.raises(ValueError, match=r"labels are a torch.float32 tensor"):
        upsampled_cross_entropy(logits, labels.float())


def test_lovasz_sorts_as_torch_does_whatever_the_sign_of_zero():
    errors = torch.rand(40)
    errors[torch.tensor([3, 9, 20])] = torch.tensor([0.0, -0.0, -0.0])
    ours, expected = _largest_first(errors), errors.sort(descending=True, stable=True)
    assert torch.equal(ours[0], expected[0]) and torch.equal(ours[1], expected[1])
