"""Small layers shared by the heads."""

import torch
from torch import nn
from torch.nn import functional as F
from transformers.utils import logging

logger = logging.get_logger(__name__)


class BatchNorm2d(nn.BatchNorm2d):
    """Batch normalisation that trains with one value per channel.

    After global pooling one picture gives one value per channel. The plain layer refuses that, and its statistics
    would say nothing; the running ones are used instead, and left as they are.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Normalise `input` (B, C, H, W)."""
        if self.training and input.shape[0] * input.shape[2] * input.shape[3] == 1:
            logger.warning_once(
                "A batch normalisation got one value per channel (one picture after image pooling) in training: it "
                "uses its running statistics there. Train with two or more pictures per device to avoid this."
            )
            return F.batch_norm(
                input, self.running_mean, self.running_var, self.weight, self.bias, training=False, eps=self.eps
            )
        return super().forward(input)


class ConvNormAct(nn.Module):
    """Convolution without bias, batch normalisation, ReLU; padded so that the size stays.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        kernel_size: Odd size of the kernel.
        dilation: Atrous rate.
        norm_eps: Epsilon of the normalisation.
        norm_momentum: Share of the new batch in the running statistics.

    Shape:
        input (B, in_channels, H, W), output (B, out_channels, H, W)
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 1,
        dilation: int = 1,
        norm_eps: float = 1e-5,
        norm_momentum: float = 0.1,
    ) -> None:
        super().__init__()
        padding = dilation * (kernel_size // 2)
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, padding=padding, dilation=dilation, bias=False)
        self.norm = BatchNorm2d(out_channels, eps=norm_eps, momentum=norm_momentum)
        self.act = nn.ReLU(inplace=True)

    def forward(self, hidden_state: torch.Tensor) -> torch.Tensor:
        """Apply the three layers."""
        hidden_state = self.act(self.norm(self.conv(hidden_state)))
        return hidden_state  # (B, out_channels, H, W)


def resize_like(maps: torch.Tensor, size: tuple[int, int] | torch.Size, align_corners: bool = False) -> torch.Tensor:
    """Bring maps (B, C, h, w) to `size` (H, W) by bilinear interpolation; a map of that size is returned as it is."""
    if maps.shape[-2:] == tuple(size):
        return maps
    return F.interpolate(maps, size=tuple(size), mode="bilinear", align_corners=align_corners)  # (B, C, H, W)
