"""Cross-entropy on logits that are coarser than the labels, without the upsampled logits.

The logits are upsampled, not the labels shrunk (DeepLabv3, arXiv 1706.05587, section 4.1: it keeps the fine
annotation and its gradient). The forward pass makes them block by block, and the gradient with each block: the loss is
the last thing a forward pass computes, and one tensor of the logits' own size is all that its backward pass needs.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.nn import functional as F

from .plain_formulas import only_once, plain_formulas
from .upsampling import computing_type, upsample, upsampled_blocks


class _Options(NamedTuple):
    ignore_index: int
    align_corners: bool
    class_weights: torch.Tensor | None  # (K,)
    label_smoothing: float


def upsampled_cross_entropy(
    logits: torch.Tensor,
    labels: torch.Tensor,
    ignore_index: int = 255,
    align_corners: bool = False,
    class_weights: torch.Tensor | None = None,
    label_smoothing: float = 0.0,
) -> torch.Tensor:
    """Mean cross-entropy over the valid pixels of the bilinearly upsampled logits.

    It equals `F.cross_entropy(F.interpolate(logits, size, mode="bilinear"), labels, ...)`, computed in float32
    (float64 for float64 logits) under autocast too. It can be differentiated once.

    Args:
        logits: (B, K, h, w).
        labels: (B, H, W) class indices; `ignore_index` marks pixels that do not count.
        ignore_index: Label value without a class.
        align_corners: How the logits are upsampled to (H, W).
        class_weights: Weight of each class, (K,); the mean is then a weighted one. None: 1 for all.
        label_smoothing: Share, 0 to 1, of the target that is spread evenly over all classes.

    Returns:
        A scalar; 0 with zero gradient where no pixel is valid (the plain mean would be NaN).

    Raises:
        ValueError: If the labels are not (B, H, W) class indices of 0 … K - 1 or `ignore_index`, or the weights not
            one for each class.
    """
    labels = check_labels(logits, labels, ignore_index, class_weights)
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing is {label_smoothing!r}, but must lie between 0 and 1: 0.1 is usual.")
    if class_weights is not None:
        class_weights = class_weights.detach().to(logits.device, computing_type(logits))
    options = _Options(ignore_index, align_corners, class_weights, label_smoothing)
    shrinks = labels[0].numel() <= logits[0, 0].numel() if len(labels) else False  # nothing large to avoid
    # A compiler plans its own loops.
    if shrinks or logits.is_meta or torch.compiler.is_compiling() or plain_formulas():
        return _plain(logits, labels, options)
    return loss_with_gradient(logits, lambda logits, gradient: _loss(logits, labels, options, gradient))


Formula = Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor]


def loss_with_gradient(logits: torch.Tensor, formula: Formula) -> torch.Tensor:
    """Make a loss that autograd knows of a formula that gives its value and its gradient at once.

    Args:
        logits: (B, K, h, w).
        formula: Called with the logits and, where autograd records, a tensor of zeros of their shape in their
            computing type, into which it writes the gradient; else with None. It gives the loss.

    Returns:
        The loss, a scalar that can be differentiated once.
    """
    if torch.is_grad_enabled() and logits.requires_grad:
        loss: torch.Tensor = _LossWithGradient.apply(logits, formula)
        return loss
    with torch.no_grad():
        return formula(logits, None)


class _LossWithGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, formula: Formula) -> torch.Tensor:
        gradient = torch.zeros_like(logits, dtype=computing_type(logits))
        loss = formula(logits, gradient)
        ctx.save_for_backward(gradient)
        ctx.dtype = logits.dtype
        return loss

    @staticmethod
    @only_once
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return (gradient * grad_output).to(ctx.dtype), None


def _loss(
    logits: torch.Tensor, labels: torch.Tensor, options: _Options, gradient: torch.Tensor | None
) -> torch.Tensor:
    """Give the loss and, with a tensor of zeros for it, write its gradient with respect to the logits."""
    valid = labels != options.ignore_index
    labels = labels.masked_fill(~valid, 0)
    pixel_weights = pixel_weights_of(labels, valid, options.class_weights, computing_type(logits))  # (B, H, W)
    row_sums = pixel_weights.new_empty(labels.shape[:2])  # (B, H)
    size = (labels.shape[1], labels.shape[2])
    for pictures, rows, values in upsampled_blocks(logits, size, options.align_corners, gradient):
        block_labels, block_weights, block_valid = (
            maps[pictures, rows].transpose(0, 1).unsqueeze(2) for maps in (labels, pixel_weights, valid)
        )  # (rows, pictures, 1, W)
        row_sums[pictures, rows] = _block_loss(
            values, block_labels, block_weights, block_valid, options, overwrite=gradient is not None
        ).transpose(0, 1)
    total = pixel_weights.sum()
    share = torch.where(total > 0, 1 / total, 0)
    if gradient is not None:
        gradient.mul_(share)
    return row_sums.sum() * share


def _block_loss(
    values: torch.Tensor,
    labels: torch.Tensor,
    pixel_weights: torch.Tensor,
    valid: torch.Tensor,
    options: _Options,
    overwrite: bool,
) -> torch.Tensor:
    """Give the loss of each row, (n, B), of logits (n, B, K, W); labels, weights and valid are (n, B, 1, W).

    The target of a pixel is `hard` at its label and `spread` everywhere; its loss is mass · log Σ exp z - target · z.
    With `overwrite` the logits become the gradient with respect to them, mass · softmax - target.
    """
    spread = None
    mass = hard = pixel_weights * (1 - options.label_smoothing)
    values.sub_(values.amax(dim=2, keepdim=True))
    loss = -hard * values.gather(2, labels)
    if options.label_smoothing > 0:
        spread = values.new_full((values.shape[2], 1), options.label_smoothing / values.shape[2])
        if options.class_weights is not None:
            spread *= options.class_weights[:, None]
        mass = hard + valid * spread.sum()
        loss -= valid * (values * spread).sum(dim=2, keepdim=True)
    total = values.exp_().sum(dim=2, keepdim=True)
    loss += mass * total.log()
    loss.masked_fill_(~valid, 0)  # what has no label may be anything, infinite too
    if overwrite:
        values.mul_(mass / total).scatter_add_(2, labels, -hard)
        if spread is not None:
            values.addcmul_(spread, valid.to(values.dtype), value=-1)
        values.masked_fill_(~valid, 0)
    return loss.sum(dim=(2, 3))


def pixel_weights_of(
    labels: torch.Tensor, valid: torch.Tensor, class_weights: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    """Weight of each pixel in a mean, (B, H, W): that of its class, 0 where it is not valid."""
    return valid.to(dtype) if class_weights is None else class_weights[labels] * valid


def upsampled(logits: torch.Tensor, labels: torch.Tensor, align_corners: bool) -> torch.Tensor:
    """The logits (B, K, H, W) at the labels' size, all at once: what the plain formulas take."""
    return upsample(logits, (labels.shape[1], labels.shape[2]), align_corners)


def _plain(logits: torch.Tensor, labels: torch.Tensor, options: _Options) -> torch.Tensor:
    ignore_index, align_corners, class_weights, label_smoothing = options
    loss = F.cross_entropy(
        upsampled(logits, labels, align_corners),
        labels,
        class_weights,
        ignore_index=ignore_index,
        reduction="sum",
        label_smoothing=label_smoothing,
    )
    valid = labels != ignore_index
    total = pixel_weights_of(labels.masked_fill(~valid, 0), valid, class_weights, loss.dtype).sum()
    return loss * torch.where(total > 0, 1 / total, 0)


def check_labels(
    logits: torch.Tensor, labels: torch.Tensor, ignore_index: int, class_weights: torch.Tensor | None = None
) -> torch.Tensor:
    """Give the labels as int64; raises `ValueError` if they, or the weights, do not fit the logits."""
    if labels.dim() != 3 or labels.shape[0] != logits.shape[0] or labels.is_floating_point():
        raise ValueError(
            f"labels are a {labels.dtype} tensor of shape {tuple(labels.shape)}, but for logits {tuple(logits.shape)} "
            f"they must be ({logits.shape[0]}, height, width) class indices."
        )
    if class_weights is not None and class_weights.shape != (logits.shape[1],):
        raise ValueError(
            f"class_weights have the shape {tuple(class_weights.shape)}, but there are {logits.shape[1]} classes: "
            f"give ({logits.shape[1]},) weights."
        )
    labels = labels.long()
    if not torch.compiler.is_compiling() and not labels.is_meta:
        _check_values(labels, logits.shape[1], ignore_index)
    return labels


def _check_values(labels: torch.Tensor, num_labels: int, ignore_index: int) -> None:
    # Costs a reduction, and on a GPU a wait; without it a wrong label there ends the process with a device assertion.
    wrong = ((labels < 0) | (labels >= num_labels)) & (labels != ignore_index)
    if wrong.any():
        values = ", ".join(str(value) for value in sorted(set(labels[wrong].tolist()))[:5])
        raise ValueError(
            f"{int(wrong.sum())} labels are no class of 0 … {num_labels - 1} (among them {values}): correct them, "
            f"or give them the value of ignore_index, {ignore_index}."
        )
