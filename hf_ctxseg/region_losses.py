"""Losses of the overlap of each class, on logits coarser than the labels: soft Dice and Lovász-softmax.

Each looks at all pixels of the batch together, so that it is no mean over pixels. Both are computed without the
upsampled logits: Dice in two passes over them, Lovász class by class, since it has to sort the pixels of each.
"""

from collections.abc import Iterator

import torch
from torch.nn import functional as F

from .dense_loss import check_labels, loss_with_gradient, upsampled
from .plain_formulas import plain_formulas
from .upsampling import computing_type, upsampled_blocks


def upsampled_dice(
    logits: torch.Tensor, labels: torch.Tensor, ignore_index: int = 255, align_corners: bool = False
) -> torch.Tensor:
    """Mean over the classes of 1 - 2 Σ p·y / (Σ p + Σ y), the soft Dice loss of the upsampled logits.

    The sums run over the valid pixels of the whole batch, p is the softmax and y the label of a class as 0 and 1
    (Milletari et al., "V-Net", arXiv 1606.04797, without its squares). A class that no label of the batch has is left
    out of the mean, whose gradient could only lower it everywhere.

    Args:
        logits: (B, K, h, w).
        labels: (B, H, W) class indices; `ignore_index` marks pixels that do not count.
        ignore_index: Label value without a class.
        align_corners: How the logits are upsampled to (H, W).

    Returns:
        A scalar, 0 to 1; 0 with zero gradient where no pixel is valid.

    Raises:
        ValueError: If the labels do not fit the logits.
    """
    labels = check_labels(logits, labels, ignore_index)
    valid = labels != ignore_index
    counts = torch.bincount(labels[valid], minlength=logits.shape[1]).to(computing_type(logits))  # (K,)
    labels = labels.masked_fill(~valid, 0)
    if plain_formulas():
        probabilities = upsampled(logits, labels, align_corners).softmax(dim=1) * valid[:, None]
        targets = F.one_hot(labels, len(counts)).movedim(3, 1)  # (B, K, H, W)
        overlap, mass = ((probabilities * factor).sum(dim=(0, 2, 3)) for factor in (targets, 1))
        return _dice_of_sums(overlap, mass, counts)
    return loss_with_gradient(
        logits, lambda logits, gradient: _dice(logits, labels, valid, counts, align_corners, gradient)
    )


def _dice_of_sums(overlap: torch.Tensor, mass: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """The loss from Σ p·y, Σ p and Σ y of each class, (K,)."""
    present = counts > 0
    ratios = torch.where(present, 2 * overlap / torch.where(present, mass + counts, 1), 1)
    return (1 - ratios).sum() / present.sum().clamp(min=1)


def _dice(
    logits: torch.Tensor,
    labels: torch.Tensor,
    valid: torch.Tensor,
    counts: torch.Tensor,
    align_corners: bool,
    gradient: torch.Tensor | None,
) -> torch.Tensor:
    overlaps, masses = [], []
    for values, block_labels in _softmax_blocks(logits, labels, valid, align_corners):
        masses.append(values.sum(dim=(0, 1, 3)))
        own = values.gather(2, block_labels)  # (rows, pictures, 1, W)
        overlaps.append(values.zero_().scatter_(2, block_labels, own).sum(dim=(0, 1, 3)))
    overlap, mass = ((torch.stack(sums).sum(dim=0) if sums else 0 * counts) for sums in (overlaps, masses))
    with torch.enable_grad():
        overlap, mass = overlap.requires_grad_(), mass.requires_grad_()
        loss = _dice_of_sums(overlap, mass, counts)
    if gradient is not None:
        by_overlap, by_mass = torch.autograd.grad(loss, (overlap, mass))  # (K,) each
        for values, block_labels in _softmax_blocks(logits, labels, valid, align_corners, gradient):
            own = values.gather(2, block_labels) * by_overlap[block_labels]
            mean = (values * by_mass[:, None]).sum(dim=2, keepdim=True) + own
            values.mul_(by_mass[:, None] - mean).scatter_add_(2, block_labels, own)
    return loss.detach()


def _softmax_blocks(
    logits: torch.Tensor,
    labels: torch.Tensor,
    valid: torch.Tensor,
    align_corners: bool,
    gradient: torch.Tensor | None = None,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Probabilities (rows, pictures, K, W), 0 where a pixel is not valid, and labels (rows, pictures, 1, W)."""
    size = (labels.shape[1], labels.shape[2])
    for pictures, rows, values in upsampled_blocks(logits, size, align_corners, gradient):
        block_labels, block_valid = (maps[pictures, rows].transpose(0, 1).unsqueeze(2) for maps in (labels, valid))
        values.sub_(values.amax(dim=2, keepdim=True)).exp_()
        values.mul_(block_valid / values.sum(dim=2, keepdim=True))
        yield values, block_labels


def upsampled_lovasz(
    logits: torch.Tensor, labels: torch.Tensor, ignore_index: int = 255, align_corners: bool = False
) -> torch.Tensor:
    """Lovász-softmax loss of the upsampled logits, the convex extension of 1 - IoU, mean over the classes present.

    Berman, Triki, Blaschko, "The Lovász-Softmax loss", arXiv 1705.08790, with all valid pixels of the batch as one
    set and classes that no label has left out. Beside the logits it takes about 100 bytes for each pixel of the
    labels, whatever the number of classes, and sorts the pixels once for each class present.

    Args:
        logits: (B, K, h, w).
        labels: (B, H, W) class indices; `ignore_index` marks pixels that do not count.
        ignore_index: Label value without a class.
        align_corners: How the logits are upsampled to (H, W).

    Returns:
        A scalar, 0 to 1; 0 with zero gradient where no pixel is valid.

    Raises:
        ValueError: If the labels do not fit the logits.
    """
    labels = check_labels(logits, labels, ignore_index)
    if plain_formulas():
        return _plain_lovasz(upsampled(logits, labels, align_corners).softmax(dim=1), labels, labels != ignore_index)
    return loss_with_gradient(
        logits, lambda logits, gradient: _lovasz(logits, labels, ignore_index, align_corners, gradient)
    )


def _lovasz(
    logits: torch.Tensor,
    labels: torch.Tensor,
    ignore_index: int,
    align_corners: bool,
    gradient: torch.Tensor | None,
) -> torch.Tensor:
    """The loss; writes its gradient where one is given.

    With g_c the derivative of the loss by the probability p_c of a pixel, that by its logit z_c is
    p_c · g_c - p_c · Σ p_j g_j: the first term is made class by class, the second in one pass at the end.
    """
    size = (labels.shape[1], labels.shape[2])
    places = (labels != ignore_index).flatten().nonzero()[:, 0]
    classes = labels.take(places)
    present = torch.unique(classes).tolist()
    peak, total = _softmax_terms(logits, size, align_corners)  # (B, H, W) each
    loss, mean = peak.new_zeros(()), torch.zeros_like(peak)
    for index in present:
        plane = logits[:, index : index + 1]
        probability = torch.empty_like(peak)
        for pictures, rows, values in upsampled_blocks(plane, size, align_corners):
            probability[pictures, rows] = values[:, :, 0].transpose(0, 1)
        probability.sub_(peak).exp_().div_(total)
        class_loss, slope = _lovasz_of_class(probability.take(places), classes == index)
        loss = loss + class_loss / len(present)
        if gradient is None:
            continue
        field = torch.zeros_like(peak)
        field.view(-1).index_copy_(0, places, slope.div_(len(present)))
        field.mul_(probability)  # p_c g_c
        mean += field
        for pictures, rows, values in upsampled_blocks(plane, size, align_corners, gradient[:, index : index + 1]):
            values[:, :, 0] = field[pictures, rows].transpose(0, 1)
    if gradient is not None and present:
        mean /= total
        spread = torch.zeros_like(gradient)
        for pictures, rows, values in upsampled_blocks(logits, size, align_corners, spread):
            block_peak, block_mean = (maps[pictures, rows].transpose(0, 1).unsqueeze(2) for maps in (peak, mean))
            values.sub_(block_peak).exp_().mul_(block_mean)
        gradient -= spread
    return loss


def _softmax_terms(logits: torch.Tensor, size: tuple[int, int], align_corners: bool) -> tuple[torch.Tensor, ...]:
    """Largest logit of each pixel and the sum of exp(logit - largest), (B, H, W) each."""
    terms = torch.empty(2, len(logits), *size, dtype=computing_type(logits), device=logits.device)
    for pictures, rows, values in upsampled_blocks(logits, size, align_corners):
        peak = values.amax(dim=2, keepdim=True)
        terms[0, pictures, rows] = peak[:, :, 0].transpose(0, 1)
        terms[1, pictures, rows] = values.sub_(peak).exp_().sum(dim=2).transpose(0, 1)
    return terms[0], terms[1]


def _lovasz_of_class(probability: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss of one class, and its derivative by each pixel's probability, from probabilities and targets (N,).

    The n-th largest error is multiplied by what the n-th pixel, added to the wrong ones, adds to the Jaccard loss:
    1 / U if it is of the class and I / (U (U - 1)) if not, with I pixels of the class not yet wrong and U pixels in
    the union. Written so, and not as the difference of two ratios close to each other, it is exact in float32.
    """
    errors, order = _largest_first(torch.where(target, 1 - probability, probability))
    target = target[order]
    missed = target.cumsum(0)
    intersection = missed[-1] - missed
    union = torch.arange(1, len(target) + 1, device=target.device) + intersection
    step = 1 / union.to(errors.dtype)
    step = torch.where(target, step, step * intersection / (union - 1))
    slope = torch.empty_like(step).scatter_(0, order, torch.where(target, -step, step))
    return (errors * step).sum(), slope


def _largest_first(errors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Sort errors (N,), none of them below 0 but by rounding, and give their order too; equal ones stay as they come.

    The bits of floating point numbers that are not negative grow with them. With the place in the lower half of an
    integer, numpy sorts both at once, many times faster than torch sorts pairs.
    """
    if errors.dtype != torch.float32 or errors.device.type != "cpu" or torch.compiler.is_compiling():
        return errors.sort(descending=True, stable=True)
    keys = torch.arange(len(errors)).add_((0x7FFFFFFF - errors.abs().view(torch.int32)).long() << 32)
    keys.numpy().sort()
    order = keys.bitwise_and_(0xFFFFFFFF)
    return errors[order], order


def _plain_lovasz(probabilities: torch.Tensor, labels: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    losses = []
    for index in torch.unique(labels[valid]).tolist():
        target = (labels == index)[valid].to(probabilities.dtype)
        errors, order = (target - probabilities[:, index][valid]).abs().sort(descending=True, stable=True)
        target = target[order]
        intersection = target.sum() - target.cumsum(0)
        union = target.sum() + (1 - target).cumsum(0)
        losses.append(errors @ (1 - intersection / union).diff(prepend=target.new_zeros(1)))
    return torch.stack(losses).mean() if losses else 0 * probabilities.sum()
