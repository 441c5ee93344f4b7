"""Non-local networks for segmentation: a non-local block between two convolutions on a dilated backbone.

Wang, Girshick, Gupta, He: "Non-local Neural Networks", arXiv 1711.07971. The paper puts its blocks into the backbone
(`backbone_nonlocal_stages` does that for any model here); this head is mmsegmentation's: 3×3 convolution, block, 3×3
convolution, then a 3×3 convolution of the backbone's map joined with the result, in the order [input, result].
"""

from collections.abc import Sequence
from functools import partial

import torch

from .configuration_ctxseg import NONLOCAL_MODES, CtxSegConfig, check_choice, check_flags, check_number
from .layers import ConvNormAct
from .modeling_ctxseg import ContextHead, CtxSegForSemanticSegmentation, CtxSegModel
from .nonlocal_block import NonLocal2d


class NonLocalConfig(CtxSegConfig):
    """Configuration of the non-local head.

    Args:
        nonlocal_mode: Pairwise function: `gaussian`, `embedded_gaussian`, `dot_product` or `concatenation`
            (arXiv 1711.07971, section 3.2).
        reduction: The block's embeddings have hidden_size // reduction channels.
        use_scale: Divide the logits of `embedded_gaussian` by the square root of the embeddings' channels.
        sub_sample: Max-pool keys and values by 2: a quarter of the pairs.
        zeros_init: The block starts as the identity.
        concat_input: Join the backbone's map with the result and fuse both by a 3×3 convolution.

    The other fields are those of `CtxSegConfig`.
    """

    model_type = "ctxseg_nonlocal"

    nonlocal_mode: str = "embedded_gaussian"
    reduction: int = 2
    use_scale: bool = True
    sub_sample: bool = False
    zeros_init: bool = True
    concat_input: bool = True
    hidden_size: int = 512
    output_stride: int = 8

    def check_values(self) -> None:
        """Check the shared fields and those of the head; raises `ValueError`."""
        super().check_values()
        check_choice("nonlocal_mode", self.nonlocal_mode, NONLOCAL_MODES)
        check_number("reduction", self.reduction, 1, float("inf"), int)
        check_flags(self, "use_scale", "sub_sample", "zeros_init", "concat_input")


class NonLocalHead(ContextHead):
    """Convolution, non-local block, convolution, fusion with the input, on the deepest level of the backbone."""

    def __init__(self, config: NonLocalConfig, channels: Sequence[int], reductions: Sequence[int]) -> None:
        width = config.hidden_size
        super().__init__(config, out_channels=width)
        layer = partial(ConvNormAct, kernel_size=3, norm_eps=config.norm_eps, norm_momentum=config.norm_momentum)
        self.conv_in = layer(channels[-1], width)
        self.nonlocal_block = NonLocal2d(
            width,
            config.reduction,
            config.use_scale,
            config.nonlocal_mode,
            config.sub_sample,
            norm="batch",
            zeros_init=config.zeros_init,
            norm_eps=config.norm_eps,
            norm_momentum=config.norm_momentum,
        )
        self.conv_out = layer(width, width)
        self.fusion = layer(channels[-1] + width, width) if config.concat_input else None

    def forward(self, features: Sequence[torch.Tensor]) -> torch.Tensor:
        """Give the context features (B, hidden_size, h, w) of the deepest level."""
        hidden_state = self.conv_out(self.nonlocal_block(self.conv_in(features[-1])))
        if self.fusion is None:
            return hidden_state
        joined = torch.cat([features[-1], hidden_state], dim=1)  # (B, channels + hidden_size, h, w)
        return self.fusion(joined)


class NonLocalModel(CtxSegModel):
    """Backbone and non-local head without a classifier: `AutoModel` gives dense context features."""

    config_class = NonLocalConfig
    head_class = NonLocalHead


class NonLocalForSemanticSegmentation(CtxSegForSemanticSegmentation):
    """Non-local network with a pixel classifier."""

    config_class = NonLocalConfig
    model_class = NonLocalModel
