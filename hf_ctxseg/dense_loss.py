"""Cross-entropy on logits that are coarser than the labels.

The logits are upsampled, not the labels shrunk (DeepLabv3, arXiv 1706.05587, section 4.1: it keeps the fine
annotation and its gradient).
"""

import torch
from torch.nn import functional as F

from .layers import resize_like


def upsampled_cross_entropy(
    logits: torch.Tensor, labels: torch.Tensor, ignore_index: int = 255, align_corners: bool = False
) -> torch.Tensor:
    """Mean cross-entropy over the valid pixels of the upsampled logits, in float32.

    Args:
        logits: (B, K, h, w).
        labels: (B, H, W) class indices; `ignore_index` marks pixels that do not count.
        ignore_index: Label value without a class.
        align_corners: How the logits are upsampled to (H, W).

    Returns:
        A scalar; 0 with zero gradient where no pixel is valid (the plain mean would be NaN).

    Raises:
        ValueError: If the batch sizes differ or the labels are not (B, H, W).
    """
    if labels.dim() != 3 or labels.shape[0] != logits.shape[0]:
        raise ValueError(
            f"labels have the shape {tuple(labels.shape)}, but for logits {tuple(logits.shape)} they must be "
            f"({logits.shape[0]}, height, width) class indices."
        )
    labels = labels.long()
    upsampled = resize_like(logits.float(), labels.shape[-2:], align_corners)  # (B, K, H, W)
    total = F.cross_entropy(upsampled, labels, ignore_index=ignore_index, reduction="sum")
    return total / (labels != ignore_index).sum().clamp(min=1)
