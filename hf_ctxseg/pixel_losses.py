"""Losses that favour hard pixels, on logits coarser than the labels: hard-pixel mining and the focal loss.

Each is computed as the cross-entropy of `dense_loss` is: block by block, with its gradient, without the upsampled
logits. Only valid pixels are mined: implementations that take the hardest of *all* pixels fill up with the zeros of
ignored ones.
"""

import math

import torch

from .dense_loss import check_labels, loss_with_gradient, pixel_weights_of, upsampled, upsampled_cross_entropy
from .plain_formulas import plain_formulas
from .upsampling import computing_type, upsampled_blocks


def upsampled_ohem(
    logits: torch.Tensor,
    labels: torch.Tensor,
    ignore_index: int = 255,
    align_corners: bool = False,
    class_weights: torch.Tensor | None = None,
    label_smoothing: float = 0.0,
    *,
    top_k: float | None = None,
    thresh: float | None = None,
    min_kept: int = 0,
) -> torch.Tensor:
    """Mean cross-entropy over the hard ones among the valid pixels of the upsampled logits.

    A pixel is the harder the lower the probability of its class. By share, the `top_k` hardest count (as the "top k
    percent" of DeepLab's TensorFlow code); by threshold, all up to a probability of `thresh`, and no fewer than the
    `min_kept` hardest (the sampler of PSPNet, arXiv 1612.01105, and its followers). The batch is mined as a whole;
    pixels as hard as the easiest that counts also count.

    Args:
        logits: (B, K, h, w).
        labels: (B, H, W) class indices; `ignore_index` marks pixels that do not count.
        ignore_index: Label value without a class.
        align_corners: How the logits are upsampled to (H, W).
        class_weights: Weight of each class, (K,), in the mean; mining disregards it.
        label_smoothing: Share of the target that is spread over all classes; mining disregards it.
        top_k: Share of the valid pixels, above 0 to 1; 0.2 where no `thresh` is given.
        thresh: Probability, above 0 to 1.
        min_kept: Number of pixels that count at least, in the whole batch; with `thresh` only.

    Returns:
        A scalar; 0 with zero gradient where no pixel is valid.

    Raises:
        ValueError: If the labels or weights do not fit the logits, or a number is out of range.
    """
    _check_mining(top_k, thresh, min_kept)
    labels = check_labels(logits, labels, ignore_index, class_weights)
    valid = labels != ignore_index
    losses = _cross_entropies(logits.detach(), labels.masked_fill(~valid, 0), align_corners)  # (B, H, W)
    found = losses[valid]
    if len(found):
        number = min(int(min_kept), len(found)) if thresh is not None else math.ceil((top_k or 0.2) * len(found))
        least = found.topk(number, sorted=False).values.amin() if number else found.new_tensor(math.inf)
        if thresh is not None:
            least = least.clamp(max=-math.log(thresh))
        labels = labels.masked_fill(losses < least, ignore_index)  # what is not a number stays, and shows
    return upsampled_cross_entropy(logits, labels, ignore_index, align_corners, class_weights, label_smoothing)


def _check_mining(top_k: float | None, thresh: float | None, min_kept: int) -> None:
    for name, value in (("top_k", top_k), ("thresh", thresh)):
        if value is not None and not 0 < value <= 1:
            raise ValueError(f"{name} of ohem is {value!r}, but must be above 0 and at most 1.")
    if top_k is not None and thresh is not None:
        raise ValueError("ohem has both top_k, a share of the pixels, and thresh, a probability: leave one out.")
    if min_kept != int(min_kept) or min_kept < 0:
        raise ValueError(f"min_kept of ohem is {min_kept!r}, but must be a whole number of pixels.")
    if min_kept and thresh is None:
        raise ValueError("min_kept of ohem goes with thresh: with top_k the share alone decides.")


@torch.no_grad()
def _cross_entropies(logits: torch.Tensor, labels: torch.Tensor, align_corners: bool) -> torch.Tensor:
    """Cross-entropy of each pixel, (B, H, W); labels are classes everywhere."""
    if plain_formulas():
        log_probabilities = upsampled(logits, labels, align_corners).log_softmax(dim=1)
        return -log_probabilities.gather(1, labels[:, None])[:, 0]
    losses = torch.empty(labels.shape, dtype=computing_type(logits), device=logits.device)
    for pictures, rows, values in upsampled_blocks(logits, (labels.shape[1], labels.shape[2]), align_corners):
        block_labels = labels[pictures, rows].transpose(0, 1).unsqueeze(2)  # (rows, pictures, 1, W)
        values.sub_(values.amax(dim=2, keepdim=True))
        own = values.gather(2, block_labels)
        found = values.exp_().sum(dim=2, keepdim=True).log_() - own
        losses[pictures, rows] = found[:, :, 0].transpose(0, 1)
    return losses


def upsampled_focal(
    logits: torch.Tensor,
    labels: torch.Tensor,
    ignore_index: int = 255,
    align_corners: bool = False,
    class_weights: torch.Tensor | None = None,
    *,
    gamma: float = 2.0,
    alpha: float = 1.0,
) -> torch.Tensor:
    """Mean over the valid pixels of -alpha · (1 - p)^gamma · log p, with p the probability of the pixel's class.

    Lin et al., "Focal Loss for Dense Object Detection", arXiv 1708.02002, equation 5, with the softmax over all
    classes in the place of its sigmoid.

    Args:
        logits: (B, K, h, w).
        labels: (B, H, W) class indices; `ignore_index` marks pixels that do not count.
        ignore_index: Label value without a class.
        align_corners: How the logits are upsampled to (H, W).
        class_weights: Weight of each class, (K,), the paper's alpha by class; the mean is then a weighted one.
        gamma: How much easy pixels are played down; 0 gives the cross-entropy.
        alpha: Factor of the loss, the same for all classes.

    Returns:
        A scalar; 0 with zero gradient where no pixel is valid.

    Raises:
        ValueError: If the labels or weights do not fit the logits, or a number is out of range.
    """
    for name, value in (("gamma", gamma), ("alpha", alpha)):
        if not 0 <= value < math.inf:
            raise ValueError(f"{name} of focal is {value!r}, but must be a number from 0 on.")
    labels = check_labels(logits, labels, ignore_index, class_weights)
    valid = labels != ignore_index
    labels = labels.masked_fill(~valid, 0)
    dtype = computing_type(logits)
    if class_weights is not None:
        class_weights = class_weights.detach().to(logits.device, dtype)
    weights = pixel_weights_of(labels, valid, class_weights, dtype)  # (B, H, W)
    total = weights.sum()
    weights = weights * torch.where(total > 0, alpha / total, 0)
    if plain_formulas():
        logs = upsampled(logits, labels, align_corners).log_softmax(dim=1).gather(1, labels[:, None])[:, 0]
        rest = (1 - logs.exp()).clamp(min=torch.finfo(dtype).tiny)  # the power of 0 may have no derivative
        return -(weights * rest**gamma * logs).sum()
    return loss_with_gradient(
        logits, lambda logits, gradient: _focal(logits, labels, weights, align_corners, gamma, gradient)
    )


def _focal(
    logits: torch.Tensor,
    labels: torch.Tensor,
    weights: torch.Tensor,
    align_corners: bool,
    gamma: float,
    gradient: torch.Tensor | None,
) -> torch.Tensor:
    """Sum of the pixels' focal losses times their weights; writes its gradient where one is given.

    With f(p) a pixel's loss, the derivative by the logit of class j is p · f'(p) · ([j is its class] - softmax_j).
    """
    row_sums = weights.new_empty(labels.shape[:2])  # (B, H)
    for pictures, rows, values in upsampled_blocks(
        logits, (labels.shape[1], labels.shape[2]), align_corners, gradient
    ):
        block_labels, block_weights = (
            maps[pictures, rows].transpose(0, 1).unsqueeze(2) for maps in (labels, weights)
        )  # (rows, pictures, 1, W)
        values.sub_(values.amax(dim=2, keepdim=True))
        logs = values.gather(2, block_labels)
        total = values.exp_().sum(dim=2, keepdim=True)
        logs = logs - total.log()  # log p
        rest = -torch.expm1(logs)  # 1 - p
        factor = block_weights * rest.pow(gamma)
        row_sums[pictures, rows] = -(factor * logs).sum(dim=(2, 3)).transpose(0, 1)
        if gradient is not None:
            ratio = torch.where(rest > 0, logs / rest, -1)  # log p / (1 - p), -1 at p = 1
            factor = factor * (gamma * logs.exp() * ratio - 1)  # p f'(p)
            values.mul_(-factor / total).scatter_add_(2, block_labels, factor)
    return row_sums.sum()
