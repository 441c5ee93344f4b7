"""The losses against those of segmentation_models.pytorch and mmsegmentation, on upsampled logits."""

import pytest
import torch
from mmseg.models.losses import OhemCrossEntropy
from segmentation_models_pytorch.losses import DiceLoss, LovaszLoss, SoftCrossEntropyLoss
from torch.nn import functional as F

from hf_ctxseg import upsampled_cross_entropy
from hf_ctxseg.pixel_losses import upsampled_ohem
from hf_ctxseg.region_losses import upsampled_dice, upsampled_lovasz


def _compare(ours, theirs, logits, labels):
    found, expected = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    upsampled = F.interpolate(expected, labels.shape[1:], mode="bilinear", align_corners=False)
    loss, other = ours(found, labels), theirs(upsampled, labels)
    loss.backward()
    other.backward()
    torch.testing.assert_close(loss, other, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(found.grad, expected.grad, rtol=1e-4, atol=1e-6)


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(2, 7, 17, 17, generator=generator)
    labels = torch.randint(0, 6, (2, 65, 65), generator=generator)  # the last class is absent
    labels[torch.rand(labels.shape, generator=generator) < 0.3] = 255
    return logits, labels


def test_smp_dice_counts_an_absent_class_as_perfect(batch):
    theirs = DiceLoss("multiclass", ignore_index=255)
    _compare(upsampled_dice, lambda scores, labels: theirs(scores, labels) * 7 / 6, *batch)


def test_smp_lovasz(batch):
    _compare(upsampled_lovasz, LovaszLoss("multiclass", ignore_index=255), *batch)


def test_smp_smoothed_cross_entropy(batch):
    theirs = SoftCrossEntropyLoss(reduction="sum", smooth_factor=0.1, ignore_index=255)
    valid = (batch[1] != 255).sum()
    _compare(
        lambda logits, labels: upsampled_cross_entropy(logits, labels, label_smoothing=0.1),
        lambda scores, labels: theirs(scores, labels) / valid,
        *batch,
    )


@pytest.mark.parametrize(("thresh", "min_kept"), [(0.1, 500), (0.5, 500), (0.05, 3000)])
def test_mmseg_hard_pixels(batch, thresh, min_kept):
    theirs = OhemCrossEntropy(ignore_label=255, thres=thresh, min_kept=min_kept)
    _compare(lambda logits, labels: upsampled_ohem(logits, labels, thresh=thresh, min_kept=min_kept), theirs, *batch)
