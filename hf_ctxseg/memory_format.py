"""The memory format of feature maps.

On a CPU convolutions are faster with the channels last, atrous ones above all, since taps in the padding are then left
out. A convolution gives its output in the format of its input, so that a network keeps what its picture begins with.
The weights stay as they are. Other devices have rules of their own and take maps as they come.
"""

import torch

from .plain_formulas import is_traced, plain_formulas


def to_fast_format(maps: torch.Tensor) -> torch.Tensor:
    """Give maps (B, C, H, W) with the channels last in memory on a CPU, and as they are elsewhere and in an export."""
    if maps.device.type != "cpu" or torch.compiler.is_exporting() or is_traced() or plain_formulas():
        return maps
    if maps.shape[1] > 1:
        return maps.contiguous(memory_format=torch.channels_last)
    # Both formats of one channel are contiguous; only the strides tell a convolution which one is meant.
    return torch.empty_like(maps, memory_format=torch.channels_last).copy_(maps)
