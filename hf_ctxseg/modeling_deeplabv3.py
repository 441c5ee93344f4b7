"""DeepLabv3: atrous spatial pyramid pooling on a dilated backbone.

Chen, Papandreou, Schroff, Adam: "Rethinking Atrous Convolution for Semantic Image Segmentation", arXiv 1706.05587,
section 3.3. The well-known code bases build heads that differ from the paper's; `variant` names them. A non-local
block (arXiv 1711.07971) may follow the pyramid.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch

from .aspp import ASPP
from .configuration_ctxseg import (
    NONLOCAL_MODES,
    CtxSegConfig,
    check_choice,
    check_flags,
    check_number,
    check_whole_numbers,
)
from .layers import ConvNormAct
from .modeling_ctxseg import ContextHead, CtxSegForSemanticSegmentation, CtxSegModel
from .nonlocal_block import NonLocal2d

BY_VARIANT: Any = None  # default of a field whose value follows from the variant; never None once a config is made


class DeepLabV3Config(CtxSegConfig):
    """Configuration of DeepLabv3.

    Args:
        variant: Structure of the head, and the defaults of `hidden_size`, `aspp_dropout`, `classifier_dropout` and
            `align_corners`:
            `"paper"`: 1×1 projection (256; dropout 0.1 before the classifier);
            `"mmseg"`: 3×3 projection (512 wide; otherwise as the paper), as in mmsegmentation;
            `"torchvision"`: a further 3×3 convolution (256; dropout 0.5 within the pyramid), as in torchvision and,
            with `align_corners=True`, segmentation_models_pytorch;
            `"plain"`: as the paper, every convolution with a bias before its normalisation (256; dropout 0.1;
            `align_corners=True`); its momentum is `norm_momentum`, its one multiplier of the rates is
            16 / `output_stride`.
            The variant of a saved model stays: another one has other weights.
        separable: Whether the 3×3 branches are separable convolutions (arXiv 1802.02611, section 3.1).
        atrous_rates: Rates of the 3×3 branches, stated for output stride 16; may be empty.
        absolute_rates: Take the rates as they are, instead of scaling them with 16 / output_stride.
        use_image_pooling: Whether the image-level features are a branch (section 3.3).
        pooling_window: Height and width, or side, in input pixels of the window over which image-level features are
            averaged, usually the training crop: a larger picture then gets features of its surroundings instead of
            one for all positions. None: the whole picture.
        pool_norm: Normalisation of the image-level branch: `"batch"`; `"group"` or `"none"`, which do not depend on
            the other pictures of a batch.
        aspp_dropout: Probability of dropping a value after the projection.
        nonlocal_mode: Pairwise function of a non-local block on the pyramid's output; None: no such block.

    The other fields are those of `CtxSegConfig`.
    """

    model_type = "ctxseg_deeplabv3"
    variants: ClassVar[dict[str, dict[str, Any]]] = {
        "paper": {"hidden_size": 256, "aspp_dropout": 0.0, "classifier_dropout": 0.1, "align_corners": False},
        "mmseg": {"hidden_size": 512, "aspp_dropout": 0.0, "classifier_dropout": 0.1, "align_corners": False},
        "torchvision": {"hidden_size": 256, "aspp_dropout": 0.5, "classifier_dropout": 0.0, "align_corners": False},
        "plain": {"hidden_size": 256, "aspp_dropout": 0.0, "classifier_dropout": 0.1, "align_corners": True},
    }

    variant: str = "paper"
    hidden_size: int = BY_VARIANT
    aspp_dropout: float = BY_VARIANT
    classifier_dropout: float = BY_VARIANT
    align_corners: bool = BY_VARIANT
    separable: bool = False
    atrous_rates: list[int] | tuple[int, ...] = (6, 12, 18)
    absolute_rates: bool = False
    use_image_pooling: bool = True
    pooling_window: list[int] | tuple[int, ...] | int | None = None
    pool_norm: str = "batch"
    nonlocal_mode: str | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        check_choice("variant", self.variant, list(self.variants))
        for name, value in self.variants[self.variant].items():
            if getattr(self, name) is BY_VARIANT:
                setattr(self, name, value)
        super().__post_init__(**kwargs)

    def check_values(self) -> None:
        """Check the shared fields and those of the head; raises `ValueError`."""
        super().check_values()
        check_choice("variant", self.variant, list(self.variants))
        check_whole_numbers("atrous_rates", self.atrous_rates, "[6, 12, 18]")
        check_flags(self, "separable", "absolute_rates", "use_image_pooling")
        check_number("aspp_dropout", self.aspp_dropout, 0, 1)
        check_choice("pool_norm", self.pool_norm, ("batch", "group", "none"))
        if self.nonlocal_mode is not None:
            check_choice("nonlocal_mode", self.nonlocal_mode, NONLOCAL_MODES)
        window = self.pooling_window
        if isinstance(window, (list, tuple)):
            check_whole_numbers("pooling_window", window, "[513, 513]")
            if len(window) != 2:
                raise ValueError(f"pooling_window is {window!r}, but must be [height, width], a side, or None.")
        elif window is not None:
            check_number("pooling_window", window, 1, float("inf"), int)

    @property
    def effective_rates(self) -> list[int]:
        """The rates at this output stride: a stride half as large doubles them (section 3.3)."""
        if self.absolute_rates:
            return list(self.atrous_rates)
        return [max(1, round(rate * 16 / self.output_stride)) for rate in self.atrous_rates]

    @property
    def window_cells(self) -> tuple[int, int] | None:
        """The pooling window in cells of the deepest map, rounded up as the map is."""
        if self.pooling_window is None:
            return None
        window = self.pooling_window
        height, width = (window, window) if isinstance(window, int) else window
        return -(-height // self.output_stride), -(-width // self.output_stride)


def build_aspp(config: DeepLabV3Config, in_channels: int) -> ASPP:
    """Give the pyramid of a configuration on a map of `in_channels`."""
    return ASPP(
        in_channels,
        config.hidden_size,
        config.effective_rates,
        image_pooling=config.use_image_pooling,
        separable=config.separable,
        norm_between=config.variant != "smp",
        projection_size=3 if config.variant == "mmseg" else 1,
        dropout=config.aspp_dropout,
        bias=config.variant == "plain",
        pooling_window=config.window_cells,
        pool_norm=config.pool_norm,
        align_corners=config.align_corners,
        norm_eps=config.norm_eps,
        norm_momentum=config.norm_momentum,
    )


def build_nonlocal_block(config: DeepLabV3Config) -> NonLocal2d | None:
    """Give the non-local block on the pyramid's output, or None where the configuration has none."""
    if config.nonlocal_mode is None:
        return None
    return NonLocal2d(
        config.hidden_size,
        mode=config.nonlocal_mode,
        norm="batch",
        zeros_init=True,
        norm_eps=config.norm_eps,
        norm_momentum=config.norm_momentum,
    )


class DeepLabV3Head(ContextHead):
    """ASPP on the deepest level of the backbone, with what the variant and `nonlocal_mode` add."""

    def __init__(self, config: DeepLabV3Config, channels: Sequence[int], reductions: Sequence[int]) -> None:
        super().__init__(config, out_channels=config.hidden_size)
        self.aspp = build_aspp(config, channels[-1])
        self.nonlocal_block = build_nonlocal_block(config)
        self.refinement: ConvNormAct | None = None
        if config.variant == "torchvision":
            self.refinement = ConvNormAct(
                config.hidden_size,
                config.hidden_size,
                kernel_size=3,
                norm_eps=config.norm_eps,
                norm_momentum=config.norm_momentum,
            )

    def forward(self, features: Sequence[torch.Tensor]) -> torch.Tensor:
        """Give the context features (B, hidden_size, h, w) of the deepest level."""
        context = self.aspp(features[-1])
        for layer in (self.nonlocal_block, self.refinement):
            if layer is not None:
                context = layer(context)
        return context  # (B, hidden_size, h, w)


class DeepLabV3Model(CtxSegModel):
    """Backbone and ASPP without a classifier: `AutoModel` gives dense context features."""

    config_class = DeepLabV3Config
    head_class = DeepLabV3Head


class DeepLabV3ForSemanticSegmentation(CtxSegForSemanticSegmentation):
    """DeepLabv3 with a pixel classifier."""

    config_class = DeepLabV3Config
    model_class = DeepLabV3Model
