"""Small layers shared by the heads."""

import timm
import torch
from torch import nn
from torch.nn import functional as F
from transformers.utils import logging

from .fast_conv import FastConv2d

logger = logging.get_logger(__name__)


class BatchNorm2d(nn.BatchNorm2d):
    """Batch normalisation that trains with one value per channel.

    After global pooling one picture gives one value per channel. The plain layer refuses that, and its statistics
    would say nothing; the running ones are used instead, and left as they are.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Normalise `input` (B, C, H, W)."""
        return _by_running_statistics(self, input) if _is_one_value(self, input) else super().forward(input)


class BatchNormAct2d(timm.layers.BatchNormAct2d):
    """timm's batch normalisation with activation, that trains with one value per channel as `BatchNorm2d` does."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise `x` (B, C, H, W) and apply the activation."""
        return self.act(self.drop(_by_running_statistics(self, x))) if _is_one_value(self, x) else super().forward(x)


def _is_one_value(norm: nn.BatchNorm2d, x: torch.Tensor) -> bool:
    if not (norm.training and x.shape[0] * x.shape[2] * x.shape[3] == 1):
        return False
    logger.warning_once(
        "A batch normalisation got one value per channel (one picture after image pooling) in training: it uses its "
        "running statistics there. Train with two or more pictures per device to avoid this."
    )
    return True


def _by_running_statistics(norm: nn.BatchNorm2d, x: torch.Tensor) -> torch.Tensor:
    return F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, training=False, eps=norm.eps)


class ConvNormAct(nn.Module):
    """Convolution, batch normalisation, ReLU; padded so that the size stays.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        kernel_size: Odd size of the kernel.
        dilation: Atrous rate.
        norm_eps: Epsilon of the normalisation.
        norm_momentum: Share of the new batch in the running statistics.
        bias: Whether the convolution has a bias; the normalisation makes it needless, some checkpoints have it.

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
        bias: bool = False,
    ) -> None:
        super().__init__()
        padding = dilation * (kernel_size // 2)
        conv = FastConv2d if kernel_size > 1 else nn.Conv2d
        self.conv = conv(in_channels, out_channels, kernel_size, padding=padding, dilation=dilation, bias=bias)
        self.norm = BatchNorm2d(out_channels, eps=norm_eps, momentum=norm_momentum)
        self.act = nn.ReLU(inplace=True)

    def forward(self, hidden_state: torch.Tensor) -> torch.Tensor:
        """Apply the three layers."""
        hidden_state = self.act(self.norm(self.conv(hidden_state)))
        return hidden_state  # (B, out_channels, H, W)


class SeparableConvNormAct(nn.Module):
    """Atrous separable 3×3 convolution: depthwise with a rate, then pointwise (arXiv 1802.02611, section 3.1).

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        dilation: Atrous rate of the depthwise convolution.
        norm_eps: Epsilon of the normalisations.
        norm_momentum: Share of the new batch in the running statistics.
        norm_between: Whether batch normalisation and ReLU follow the depthwise convolution too, as in the authors'
            code.

    Shape:
        input (B, in_channels, H, W), output (B, out_channels, H, W)
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        dilation: int = 1,
        norm_eps: float = 1e-5,
        norm_momentum: float = 0.1,
        norm_between: bool = True,
    ) -> None:
        super().__init__()
        conv = FastConv2d if dilation > 1 else nn.Conv2d
        self.depthwise = conv(
            in_channels, in_channels, 3, padding=dilation, dilation=dilation, groups=in_channels, bias=False
        )
        self.depthwise_norm = BatchNorm2d(in_channels, eps=norm_eps, momentum=norm_momentum) if norm_between else None
        self.pointwise = ConvNormAct(in_channels, out_channels, norm_eps=norm_eps, norm_momentum=norm_momentum)

    def forward(self, hidden_state: torch.Tensor) -> torch.Tensor:
        """Apply depthwise and pointwise convolution."""
        hidden_state = self.depthwise(hidden_state)  # (B, in_channels, H, W)
        if self.depthwise_norm is not None:
            hidden_state = F.relu(self.depthwise_norm(hidden_state), inplace=True)
        return self.pointwise(hidden_state)  # (B, out_channels, H, W)


class Classifier(nn.Conv2d):
    """Convolution to class logits: it starts from small weights, so that the first loss is about log(num_labels)."""


def resize_like(maps: torch.Tensor, size: tuple[int, int] | torch.Size, align_corners: bool = False) -> torch.Tensor:
    """Bring maps (B, C, h, w) to `size` (H, W) by bilinear interpolation; a map of that size is returned as it is."""
    if maps.shape[-2:] == tuple(size):
        return maps
    return F.interpolate(maps, size=tuple(size), mode="bilinear", align_corners=align_corners)  # (B, C, H, W)
