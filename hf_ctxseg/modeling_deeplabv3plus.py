"""DeepLabv3+: the pyramid of DeepLabv3 and a decoder with atrous separable convolutions.

Chen, Zhu, Papandreou, Schroff, Adam: "Encoder-Decoder with Atrous Separable Convolution for Semantic Image
Segmentation", arXiv 1802.02611, section 3.1 and figure 2. The context is brought to the size of the backbone's map of
stride 4, joined with that map, projected to few channels, in the order [context, low level], and refined: logits have
stride 4. The well-known code bases build heads that differ in part; `variant` names them. timm takes Xception's map of
stride 4 after its ReLU, the authors' TensorFlow code before it.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import nn

from .configuration_ctxseg import check_number
from .layers import ConvNormAct, SeparableConvNormAct, resize_like
from .modeling_ctxseg import ContextHead, CtxSegForSemanticSegmentation, CtxSegModel
from .modeling_deeplabv3 import DeepLabV3Config, build_aspp, build_nonlocal_block


class DeepLabV3PlusConfig(DeepLabV3Config):
    """Configuration of DeepLabv3+.

    Args:
        variant: Structure of the head, and the defaults of `hidden_size`, `aspp_dropout`, `classifier_dropout` and
            `align_corners`:
            `"paper"`: 1×1 projection, two refining convolutions, normalisation and ReLU between depthwise and
            pointwise convolution (256; dropout 0.1 before the classifier);
            `"mmseg"`: 3×3 projection (512 wide; otherwise as the paper), as in mmsegmentation;
            `"smp"`: nothing between depthwise and pointwise convolution, one refining convolution before the decoder
            and one within (256; dropout 0.5 within the pyramid; `align_corners=True`), as in
            segmentation_models_pytorch, whose rates at output stride 16 are `atrous_rates=[12, 24, 36]` with
            `absolute_rates=True`.
        low_level_channels: Width of the projected map of stride 4.
        separable: Whether the 3×3 convolutions of the pyramid and the decoder are separable. The 3×3 projection of
            `"mmseg"` never is.

    The other fields are those of `DeepLabV3Config` and `CtxSegConfig`.
    """

    model_type = "ctxseg_deeplabv3plus"
    low_level_reduction: ClassVar[int | None] = 4
    variants: ClassVar[dict[str, dict[str, Any]]] = {
        "paper": {"hidden_size": 256, "aspp_dropout": 0.0, "classifier_dropout": 0.1, "align_corners": False},
        "mmseg": {"hidden_size": 512, "aspp_dropout": 0.0, "classifier_dropout": 0.1, "align_corners": False},
        "smp": {"hidden_size": 256, "aspp_dropout": 0.5, "classifier_dropout": 0.0, "align_corners": True},
    }

    low_level_channels: int = 48
    separable: bool = True

    def check_values(self) -> None:
        """Check the fields of DeepLabv3 and those of the decoder; raises `ValueError`."""
        super().check_values()
        check_number("low_level_channels", self.low_level_channels, 1, float("inf"), int)


class DeepLabV3PlusHead(ContextHead):
    """ASPP on the deepest level of the backbone, refined with the level of stride 4."""

    def __init__(self, config: DeepLabV3PlusConfig, channels: Sequence[int], reductions: Sequence[int]) -> None:
        super().__init__(config, out_channels=config.hidden_size)
        width = config.hidden_size
        self.low_level = max(i for i, reduction in enumerate(reductions) if reduction == config.low_level_reduction)
        self.aspp = build_aspp(config, channels[-1])
        self.nonlocal_block = build_nonlocal_block(config)
        self.context_refinement = _refining_conv(config, width) if config.variant == "smp" else None
        self.low_level_projection = ConvNormAct(
            channels[self.low_level],
            config.low_level_channels,
            norm_eps=config.norm_eps,
            norm_momentum=config.norm_momentum,
        )
        self.refinement = nn.Sequential(_refining_conv(config, width + config.low_level_channels))
        if config.variant != "smp":
            self.refinement.append(_refining_conv(config, width))

    def forward(self, features: Sequence[torch.Tensor]) -> torch.Tensor:
        """Give the refined features (B, hidden_size, H / 4, W / 4)."""
        context = self.aspp(features[-1])
        for layer in (self.nonlocal_block, self.context_refinement):
            if layer is not None:
                context = layer(context)
        low = self.low_level_projection(features[self.low_level])  # (B, low_level_channels, H / 4, W / 4)
        context = resize_like(context, low.shape[-2:], self.config.align_corners)  # (B, hidden_size, H / 4, W / 4)
        joined = torch.cat([context, low], dim=1)  # (B, hidden_size + low_level_channels, H / 4, W / 4)
        return self.refinement(joined)  # (B, hidden_size, H / 4, W / 4)


def _refining_conv(config: DeepLabV3PlusConfig, in_channels: int) -> nn.Module:
    eps, momentum = config.norm_eps, config.norm_momentum
    if config.separable:
        between = config.variant != "smp"
        return SeparableConvNormAct(in_channels, config.hidden_size, 1, eps, momentum, norm_between=between)
    return ConvNormAct(in_channels, config.hidden_size, kernel_size=3, norm_eps=eps, norm_momentum=momentum)


class DeepLabV3PlusModel(CtxSegModel):
    """Backbone, ASPP and decoder without a classifier: `AutoModel` gives features at stride 4."""

    config_class = DeepLabV3PlusConfig
    head_class = DeepLabV3PlusHead


class DeepLabV3PlusForSemanticSegmentation(CtxSegForSemanticSegmentation):
    """DeepLabv3+ with a pixel classifier; logits at stride 4."""

    config_class = DeepLabV3PlusConfig
    model_class = DeepLabV3PlusModel
