import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from hf_ctxseg import upsampled_cross_entropy


def data(seed=0, classes=4, ignore_index=255):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, classes, 5, 6, generator=generator)
    labels = torch.randint(0, classes, (2, 19, 23), generator=generator)
    labels[torch.rand(labels.shape, generator=generator) < 0.3] = ignore_index
    return logits, labels


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
