"""DeepLabv3: atrous spatial pyramid pooling on a dilated backbone.

Chen, Papandreou, Schroff, Adam: "Rethinking Atrous Convolution for Semantic Image Segmentation", arXiv 1706.05587,
section 3.3. A 1×1 convolution, parallel 3×3 convolutions at several atrous rates and image-level pooling, each with
batch normalisation, are concatenated and projected by a 1×1 convolution. The branches are joined in the order
[1×1, rates …, pooling].
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers.utils import logging

from .configuration_ctxseg import CtxSegConfig, check_number
from .layers import ConvNormAct
from .modeling_ctxseg import ContextHead, CtxSegForSemanticSegmentation, CtxSegModel

logger = logging.get_logger(__name__)


class DeepLabV3Config(CtxSegConfig):
    """Configuration of DeepLabv3.

    Args:
        atrous_rates: Rates of the 3×3 branches, stated for output stride 16; may be empty.
        absolute_rates: Take the rates as they are, instead of scaling them with 16 / output_stride.
        use_image_pooling: Whether the image-level features are a branch (section 3.3).

    The other fields are those of `CtxSegConfig`.
    """

    model_type = "ctxseg_deeplabv3"

    atrous_rates: list[int] | tuple[int, ...] = (6, 12, 18)
    absolute_rates: bool = False
    use_image_pooling: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        if isinstance(self.atrous_rates, tuple):
            self.atrous_rates = list(self.atrous_rates)
        super().__post_init__(**kwargs)

    def check_values(self) -> None:
        """Check the shared fields and those of the head; raises `ValueError`."""
        super().check_values()
        if not isinstance(self.atrous_rates, (list, tuple)):
            raise ValueError(f"atrous_rates is {self.atrous_rates!r}, but must be a list such as [6, 12, 18].")
        for index, rate in enumerate(self.atrous_rates):
            check_number(f"atrous_rates[{index}]", rate, 1, float("inf"), int)
        for name in ("absolute_rates", "use_image_pooling"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} is {getattr(self, name)!r}, but must be true or false.")

    @property
    def effective_rates(self) -> list[int]:
        """The rates at this output stride: a stride half as large doubles them (section 3.3)."""
        if self.absolute_rates:
            return list(self.atrous_rates)
        return [max(1, round(rate * 16 / self.output_stride)) for rate in self.atrous_rates]


class ASPP(nn.Module):
    """Atrous spatial pyramid pooling.

    Args:
        in_channels: Channels of the backbone's deepest map.
        out_channels: Width of every branch and of the output.
        atrous_rates: Rates of the 3×3 branches as applied to this map; may be empty.
        image_pooling: Whether the globally pooled features are a branch.
        norm_eps: Epsilon of the normalisations.
        norm_momentum: Share of the new batch in the running statistics.

    Shape:
        input (B, in_channels, h, w), output (B, out_channels, h, w)
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int = 256,
        atrous_rates: Sequence[int] = (6, 12, 18),
        image_pooling: bool = True,
        norm_eps: float = 1e-5,
        norm_momentum: float = 0.1,
    ) -> None:
        super().__init__()
        layer = partial(ConvNormAct, norm_eps=norm_eps, norm_momentum=norm_momentum)
        self.atrous_rates = tuple(atrous_rates)
        self.warned_about_rates = False
        self.branches = nn.ModuleList([layer(in_channels, out_channels)])
        self.branches.extend(layer(in_channels, out_channels, kernel_size=3, dilation=rate) for rate in atrous_rates)
        self.image_pooling = layer(in_channels, out_channels) if image_pooling else None
        width = out_channels * (len(self.branches) + int(image_pooling))
        self.projection = layer(width, out_channels)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Give the context features of one map."""
        if not torch.compiler.is_compiling():
            self._warn_about_large_rates(*features.shape[-2:])
        branches = [branch(features) for branch in self.branches]
        if self.image_pooling is not None:
            pooled = self.image_pooling(features.mean(dim=(2, 3), keepdim=True))  # (B, out_channels, 1, 1)
            branches.append(pooled.expand(-1, -1, *features.shape[-2:]))
        joined = torch.cat(branches, dim=1)  # (B, out_channels * branches, h, w)
        return self.projection(joined)

    def _warn_about_large_rates(self, height: int, width: int) -> None:
        large = [rate for rate in self.atrous_rates if rate >= min(height, width)]
        if large and not self.warned_about_rates:
            self.warned_about_rates = True  # once for a model, not for every size of picture
            logger.warning(
                f"The atrous rates {large} reach over the whole feature map ({height}×{width}): these branches look "
                "at little or nothing but their own position. Use larger pictures, a smaller output_stride, or "
                "smaller atrous_rates."
            )


class DeepLabV3Head(ContextHead):
    """ASPP on the deepest level of the backbone."""

    def __init__(self, config: DeepLabV3Config, channels: Sequence[int], reductions: Sequence[int]) -> None:
        super().__init__(config, out_channels=config.hidden_size)
        self.aspp = ASPP(
            channels[-1],
            config.hidden_size,
            config.effective_rates,
            image_pooling=config.use_image_pooling,
            norm_eps=config.norm_eps,
            norm_momentum=config.norm_momentum,
        )

    def forward(self, features: Sequence[torch.Tensor]) -> torch.Tensor:
        """Give the context features (B, hidden_size, h, w) of the deepest level."""
        return self.aspp(features[-1])


class DeepLabV3Model(CtxSegModel):
    """Backbone and ASPP without a classifier: `AutoModel` gives dense context features."""

    config_class = DeepLabV3Config
    head_class = DeepLabV3Head


class DeepLabV3ForSemanticSegmentation(CtxSegForSemanticSegmentation):
    """DeepLabv3 with a pixel classifier."""

    config_class = DeepLabV3Config
    model_class = DeepLabV3Model
