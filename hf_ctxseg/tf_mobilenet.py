"""MobileNetV2 as TensorFlow's DeepLab builds it, under a name of its own in timm: `mobilenetv2_tf`.

timm's `mobilenetv2_*` differ from it in four things that no tensor's shape tells, or that no argument of theirs sets:
convolutions of stride 2 pad below and to the right first ("SAME"), batch normalisation has an epsilon of 1e-3 and a
decay of 0.997, channels of narrow networks are rounded to whole numbers instead of multiples of 8, and the map of
stride 4 is that after a depthwise convolution (`layer_4/depthwise_output` in `deeplab/core/feature_extractor.py` of
tensorflow/models, with `slim/nets/mobilenet/mobilenet_v2.py`). The deepest map is `layer_18`, 320 channels wide. Both
give the first block of a dilated stage the rate of the stage before.

Sandler, Howard, Zhu, Zhmoginov, Chen: "MobileNetV2: Inverted Residuals and Linear Bottlenecks", arXiv 1801.04381.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import timm
import torch
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._efficientnet_builder import decode_arch_def, round_channels
from timm.models.efficientnet import EfficientNetFeatures
from torch import nn
from torch.utils.checkpoint import checkpoint

TF_MOBILENET = "mobilenetv2_tf"

# arXiv 1801.04381, table 2, in timm's words: r blocks, k kernel, s stride, e expansion, c channels.
_STAGES = (
    *("ds_r1_k3_s1_c16", "ir_r2_k3_s2_e6_c24", "ir_r3_k3_s2_e6_c32", "ir_r4_k3_s2_e6_c64"),
    *("ir_r3_k3_s1_e6_c96", "ir_r3_k3_s2_e6_c160", "ir_r1_k3_s1_e6_c320"),
)
_WIDTHS = (32, 16, 24, 32, 64, 96, 160, 320)  # of the stem and of each stage
_LOW_STAGE = 1  # its last block gives the map of stride 4

default_cfgs = generate_default_cfgs(  # timm looks for this name
    {
        f"{TF_MOBILENET}.untrained": {
            "url": "",
            "input_size": (3, 224, 224),
            "mean": (0.5, 0.5, 0.5),
            "std": (0.5, 0.5, 0.5),
            "first_conv": "conv_stem",
            "classifier": "classifier",
        }
    }
)


class TfMobileNetFeatures(EfficientNetFeatures):
    """Feature maps of MobileNetV2; that of stride 4 is taken before the projection of its block."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        level = next(level for level in self.feature_info.info if level["stage"] == _LOW_STAGE + 1)
        block = len(self.blocks[_LOW_STAGE]) - 1
        level["module"] = f"blocks.{_LOW_STAGE}.{block}.bn2"
        level["num_chs"] = self.blocks[_LOW_STAGE][block].conv_pwl.in_channels

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Give the chosen maps, shallow to deep, of a picture (B, in_chans, H, W)."""
        x = self.bn1(self.conv_stem(x))
        features = [x] if 0 in self._stage_out_idx else []
        for number, stage in enumerate(self.blocks):
            low = None
            if number == _LOW_STAGE:
                x, low = self._run(_run_low_stage, stage, x)
            else:
                x = self._run(stage, x)
            if number + 1 in self._stage_out_idx:
                features.append(x if low is None else low)
        return features

    def _run(self, function: Any, *arguments: Any) -> Any:
        if self.grad_checkpointing and self.training:
            return checkpoint(function, *arguments, use_reentrant=False)
        return function(*arguments)


def _run_low_stage(stage: nn.Sequential, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Give the output of a stage of inverted residual blocks, and what the projection of its last block takes."""
    last: Any = stage[-1]
    for block in stage[:-1]:
        x = block(x)
    low = last.bn2(last.conv_dw(last.bn1(last.conv_pw(x))))  # (B, 6 * C, h, w)
    projected = last.bn3(last.conv_pwl(low))  # (B, C, h, w)
    return projected + x if last.has_skip else projected, low


def mobilenetv2_tf(
    pretrained: bool = False,
    channel_multiplier: float = 1.0,
    channel_divisor: int = 8,
    bn_eps: float = 1e-3,
    bn_momentum: float = 0.003,
    **kwargs: Any,
) -> nn.Module:
    """Build the feature network; timm's entry point, called through `timm.create_model`.

    Args:
        pretrained: Whether weights are loaded, which timm has none of.
        channel_multiplier: Width of the network, TensorFlow's `depth_multiplier`.
        channel_divisor: Channels are rounded to multiples of it: 8 in TensorFlow's DeepLab at width 1, else 1. What
            blocks expand to is rounded to multiples of 8 always.
        bn_eps: Epsilon of batch normalisation.
        bn_momentum: Share of the new batch in its running statistics.
        **kwargs: What timm passes to `EfficientNetFeatures`.

    Raises:
        ValueError: If the multiplier or the divisor is no number above 0.
    """
    if not channel_multiplier > 0 or channel_divisor < 1:
        raise ValueError(
            f"{TF_MOBILENET} got channel_multiplier={channel_multiplier!r} and channel_divisor={channel_divisor!r}, "
            "but needs a multiplier above 0 and a whole divisor from 1."
        )
    kwargs.pop("features_only", None)
    network: nn.Module = build_model_with_cfg(
        TfMobileNetFeatures,
        TF_MOBILENET,
        pretrained,
        pretrained_strict=False,
        kwargs_filter=("num_classes", "num_features", "head_conv", "global_pool"),
        block_args=decode_arch_def([[stage] for stage in _STAGES]),
        stem_size=_WIDTHS[0],
        round_chs_fn=partial(round_channels, multiplier=channel_multiplier, divisor=channel_divisor),
        norm_layer=partial(nn.BatchNorm2d, eps=bn_eps, momentum=bn_momentum),
        act_layer=nn.ReLU6,
        pad_type="same",
        **kwargs,
    )
    return network


def fit_channels(widths: Sequence[int]) -> dict[str, float | int]:
    """Find the arguments of `mobilenetv2_tf` that give a network its channels.

    Args:
        widths: Channels of the stem and of the outputs of the seven stages.

    Returns:
        `channel_multiplier` and `channel_divisor`, as `backbone_kwargs` take them.

    Raises:
        ValueError: If no multiplier does.
    """
    found = list(widths)
    multipliers = [1.0, 0.5, 0.75, 0.35, 0.25, 1.3, 1.4]
    multipliers += [last / _WIDTHS[-1] for last in found[-1:] if last > 0]
    for divisor in (8, 1, 4, 2):
        for multiplier in multipliers:
            if found == [round_channels(width, multiplier, divisor) for width in _WIDTHS]:
                return {"channel_multiplier": multiplier, "channel_divisor": divisor}
    raise ValueError(
        f"A MobileNetV2 with the channels {found} is not known: expected {list(_WIDTHS)} times one factor, rounded to "
        "multiples of 8, 4, 2 or 1."
    )


if not timm.is_model(TF_MOBILENET):  # code saved beside a model is imported beside the package
    register_model(mobilenetv2_tf)
