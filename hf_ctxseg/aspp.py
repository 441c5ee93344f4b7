"""Atrous spatial pyramid pooling, the layer that DeepLabv3 and v3+ share.

Chen, Papandreou, Schroff, Adam: "Rethinking Atrous Convolution for Semantic Image Segmentation", arXiv 1706.05587,
section 3.3. A 1×1 convolution, parallel 3×3 convolutions at several atrous rates and image-level pooling are
concatenated, in the order [1×1, rates …, pooling], and projected. DeepLabv3+ (arXiv 1802.02611, section 3.1) makes
the 3×3 convolutions separable.
"""

import math
from collections.abc import Sequence
from functools import partial

import torch
from torch import nn
from torch.nn import functional as F
from transformers.utils import logging

from .configuration_ctxseg import check_choice, check_number, check_whole_numbers
from .layers import BatchNorm2d, ConvNormAct, SeparableConvNormAct, resize_like
from .memory_format import to_fast_format

logger = logging.get_logger(__name__)


class ImagePooling(nn.Module):
    """Image-level features: average, 1×1 convolution, normalisation, ReLU, brought back to the size of the map.

    A program that `torch.export` makes with a window, from a map larger than it, refuses maps that are not.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        window: (height, width) of the averaged window in cells of the map. It slides with stride 1 and is clipped to
            the map, as TensorFlow's DeepLab (`image_pooling_crop_size`) and detectron2 (`pool_kernel_size`) do; None:
            the whole map.
        norm: `"batch"`, `"group"` (up to 32 groups of 8 channels or more) or `"none"` (the convolution has a bias
            then).
        norm_eps: Epsilon of the normalisation.
        norm_momentum: Share of the new batch in the running statistics.
        bias: Whether the convolution has a bias before its normalisation too.
        align_corners: How the averages of a sliding window are resized.

    Shape:
        input (B, in_channels, h, w), output (B, out_channels, h, w)
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        window: tuple[int, int] | None = None,
        norm: str = "batch",
        norm_eps: float = 1e-5,
        norm_momentum: float = 0.1,
        bias: bool = False,
        align_corners: bool = False,
    ) -> None:
        super().__init__()
        check_choice("norm", norm, ("batch", "group", "none"))
        self.window = window
        self.align_corners = align_corners
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size=1, bias=bias or norm == "none")
        self.norm: nn.Module
        if norm == "batch":
            self.norm = BatchNorm2d(out_channels, eps=norm_eps, momentum=norm_momentum)
        elif norm == "group":
            # With one channel in a group, a map of one cell would be normalised to nothing.
            groups = math.gcd(32, max(1, out_channels // 8), out_channels)
            self.norm = nn.GroupNorm(groups, out_channels, eps=norm_eps)
        else:
            self.norm = nn.Identity()

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Give the image-level features at every position."""
        height, width = features.shape[-2:]
        if self.window is None:
            pooled = features.mean(dim=(2, 3), keepdim=True)  # (B, in_channels, 1, 1)
        else:  # the average over rows, then over columns, is that over the window, with far fewer additions
            pooled = F.avg_pool2d(features, (min(self.window[0], height), 1), stride=1)
            pooled = F.avg_pool2d(pooled, (1, min(self.window[1], width)), stride=1)  # (B, in_channels, h', w')
        pooled = F.relu(self.norm(self.conv(pooled)))
        if self.window is None:
            pooled = pooled.expand(-1, -1, height, width)
        else:
            pooled = resize_like(pooled, (height, width), self.align_corners)
        return to_fast_format(pooled)  # (B, out_channels, h, w); one branch in another format would decide for all


class ASPP(nn.Module):
    """Atrous spatial pyramid pooling.

    Args:
        in_channels: Channels of the backbone's deepest map.
        out_channels: Width of every branch and of the output.
        atrous_rates: Rates of the 3×3 branches as applied to this map; may be empty.
        image_pooling: Whether the pooled features are a branch.
        separable: Whether the 3×3 branches are separable convolutions.
        norm_between: Whether normalisation and ReLU stand between depthwise and pointwise convolution.
        projection_size: Kernel size of the projection: 1 in the paper, 3 in mmsegmentation.
        dropout: Probability of dropping a value after the projection, as in torchvision and smp.
        bias: Whether the convolutions have a bias before their normalisation (not the separable ones).
        pooling_window: (height, width) of the pooling in cells of the map; None: the whole map.
        pool_norm: Normalisation of the pooled branch: `"batch"`, `"group"` or `"none"`.
        align_corners: How the averages of a pooling window are resized.
        norm_eps: Epsilon of the normalisations.
        norm_momentum: Share of the new batch in the running statistics.

    Shape:
        input (B, in_channels, h, w), output (B, out_channels, h, w)

    Raises:
        ValueError: If rates, kernel size, window or norm are outside what is allowed.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int = 256,
        atrous_rates: Sequence[int] = (6, 12, 18),
        image_pooling: bool = True,
        separable: bool = False,
        norm_between: bool = True,
        projection_size: int = 1,
        dropout: float = 0.0,
        bias: bool = False,
        pooling_window: tuple[int, int] | None = None,
        pool_norm: str = "batch",
        align_corners: bool = False,
        norm_eps: float = 1e-5,
        norm_momentum: float = 0.1,
    ) -> None:
        super().__init__()
        check_whole_numbers("atrous_rates", atrous_rates, "[6, 12, 18]")
        check_number("projection_size", projection_size, 1, float("inf"), int)
        if projection_size % 2 == 0:
            raise ValueError(f"projection_size is {projection_size}, but must be odd, so that the map keeps its size.")
        if pooling_window is not None:
            check_whole_numbers("pooling_window", pooling_window, "[33, 33]")
        dense = partial(ConvNormAct, norm_eps=norm_eps, norm_momentum=norm_momentum, bias=bias)
        self.atrous_rates = tuple(atrous_rates)
        self.warned_about_rates = False
        self.branches = nn.ModuleList([dense(in_channels, out_channels)])
        for rate in atrous_rates:
            self.branches.append(
                SeparableConvNormAct(in_channels, out_channels, rate, norm_eps, norm_momentum, norm_between)
                if separable
                else dense(in_channels, out_channels, kernel_size=3, dilation=rate)
            )
        self.image_pooling: ImagePooling | None = None
        if image_pooling:
            self.image_pooling = ImagePooling(
                in_channels, out_channels, pooling_window, pool_norm, norm_eps, norm_momentum, bias, align_corners
            )
        width = out_channels * (len(self.branches) + int(image_pooling))
        self.projection = dense(width, out_channels, kernel_size=projection_size)
        self.dropout = nn.Dropout(dropout)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Give the context features of one map."""
        if not torch.compiler.is_compiling():
            self._warn_about_large_rates(*features.shape[-2:])
        features = to_fast_format(features)
        branches = [branch(features) for branch in self.branches]
        if self.image_pooling is not None:
            branches.append(self.image_pooling(features))
        joined = torch.cat(branches, dim=1)  # (B, out_channels * branches, h, w)
        return self.dropout(self.projection(joined))  # (B, out_channels, h, w)

    def _warn_about_large_rates(self, height: int, width: int) -> None:
        large = [rate for rate in self.atrous_rates if rate >= min(height, width)]
        if large and not self.warned_about_rates:
            self.warned_about_rates = True  # once for a model, not for every size of picture
            logger.warning(
                f"The atrous rates {large} reach over the whole feature map ({height}×{width}): these branches look "
                "at little or nothing but their own position. Use larger pictures, a smaller output_stride, or "
                "smaller atrous_rates."
            )
