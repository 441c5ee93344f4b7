"""DeepLab v1 and v2: dilated classifiers at several atrous rates, summed.

Chen, Papandreou, Kokkinos, Murphy, Yuille: "Semantic Image Segmentation with Deep Convolutional Nets and Fully
Connected CRFs", arXiv 1412.7062, section 5: LargeFOV, one rate of 12. The same: "DeepLab", arXiv 1606.00915,
section 3.2: ASPP, branches at several rates whose scores are summed, ASPP-S [2, 4, 8, 12] and ASPP-L [6, 12, 18, 24];
section 4.1.1: the network sees the picture at several scales and the maximum of the scores counts. There is neither
batch normalisation in the head nor image pooling. The papers' other backbone, VGG-16, cannot dilate in timm: it works
at its native `output_stride=32` only.
"""

from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers.modeling_outputs import SemanticSegmenterOutput

from .configuration_ctxseg import CtxSegConfig, check_number, check_whole_numbers
from .fast_conv import FastConv2d
from .layers import Classifier, resize_like
from .modeling_ctxseg import ContextHead, CtxSegForSemanticSegmentation, CtxSegModel


class DeepLabV2Config(CtxSegConfig):
    """Configuration of DeepLab v1 and v2.

    Args:
        atrous_rates: Rates of the 3×3 branches, applied as they are at every output stride; the papers state theirs
            for 8. [12] is LargeFOV (v1).
        branch_channels: Width of the branches of the VGG form (1024 in the papers); None: the ResNet-101 form, whose
            branches are the classifiers themselves.
        branch_dropout: Probability of dropping a value after each layer of a branch; without effect in the ResNet-101
            form.
        input_scales: Scales at which the network sees the picture, 1 among them; the paper's are [0.5, 0.75, 1.0].

    The other fields are those of `CtxSegConfig`. `hidden_size` is without effect: the features keep the backbone's
    width or that of the branches. `norm_eps` and `norm_momentum` concern the auxiliary head alone.
    """

    model_type = "ctxseg_deeplabv2"

    output_stride: int = 8
    classifier_dropout: float = 0.0
    atrous_rates: list[int] | tuple[int, ...] = (6, 12, 18, 24)
    branch_channels: int | None = None
    branch_dropout: float = 0.5
    input_scales: list[float] | tuple[float, ...] = (1.0,)

    def check_values(self) -> None:
        """Check the shared fields and those of the head; raises `ValueError`."""
        super().check_values()
        check_whole_numbers("atrous_rates", self.atrous_rates, "[6, 12, 18, 24]")
        if not self.atrous_rates:
            raise ValueError("atrous_rates is empty, but must hold one rate or more: [12] is LargeFOV.")
        if self.branch_channels is not None:
            check_number("branch_channels", self.branch_channels, 1, float("inf"), int)
        check_number("branch_dropout", self.branch_dropout, 0, 1)
        if not isinstance(self.input_scales, (list, tuple)):
            raise ValueError(f"input_scales is {self.input_scales!r}, but must be a list such as [0.5, 0.75, 1.0].")
        for index, scale in enumerate(self.input_scales):
            check_number(f"input_scales[{index}]", scale, 1 / 16, 16)
        if 1 not in self.input_scales or len(set(self.input_scales)) < len(self.input_scales):
            raise ValueError(
                f"input_scales is {self.input_scales!r}, but must hold 1, and no scale twice: [0.5, 0.75, 1.0]."
            )


class AtrousBranch(nn.Module):
    """One branch of the VGG form: 3×3 convolution with a rate, 1×1 convolution, each with ReLU and dropout.

    The papers call these layers fc6 and fc7, after the layers of VGG-16 that they were.

    Args:
        in_channels: Channels of the backbone's deepest map.
        out_channels: Width of both convolutions.
        rate: Atrous rate of the 3×3 convolution.
        dropout: Probability of dropping a value after each convolution.

    Shape:
        input (B, in_channels, h, w), output (B, out_channels, h, w)
    """

    def __init__(self, in_channels: int, out_channels: int, rate: int, dropout: float) -> None:
        super().__init__()
        self.fc6 = FastConv2d(in_channels, out_channels, kernel_size=3, padding=rate, dilation=rate)
        self.fc7 = nn.Conv2d(out_channels, out_channels, kernel_size=1)
        self.dropout = nn.Dropout(dropout)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Give the features that this branch's classifier sees."""
        features = self.dropout(F.relu(self.fc6(features)))
        return self.dropout(F.relu(self.fc7(features)))  # (B, out_channels, h, w)


class SummedClassifiers(nn.Module):
    """The ResNet-101 form: one 3×3 classifier for each atrous rate, summed.

    Args:
        in_channels: Channels of the backbone's deepest map.
        num_labels: Number of classes.
        atrous_rates: Rate of each classifier.

    Shape:
        input (B, in_channels, h, w), output (B, num_labels, h, w)
    """

    def __init__(self, in_channels: int, num_labels: int, atrous_rates: Sequence[int]) -> None:
        super().__init__()
        self.branches = nn.ModuleList(
            Classifier(in_channels, num_labels, kernel_size=3, padding=rate, dilation=rate) for rate in atrous_rates
        )

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Give the sum of the branches' logits."""
        logits = self.branches[0](features)
        for branch in self.branches[1:]:
            logits = logits + branch(features)
        return logits  # (B, num_labels, h, w)


class DeepLabV2Head(ContextHead):
    """The part of the branches before their classifiers.

    In the ResNet-101 form that is nothing: the features pass as they are. In the VGG form the branches' features are
    concatenated: one 1×1 classifier on them is the sum of the branches' own 1×1 classifiers.
    """

    config: DeepLabV2Config

    def __init__(self, config: DeepLabV2Config, channels: Sequence[int], reductions: Sequence[int]) -> None:
        width = config.branch_channels
        super().__init__(config, channels[-1] if width is None else width * len(config.atrous_rates))
        self.branches = nn.ModuleList()
        if width is not None:
            rates = config.atrous_rates
            self.branches.extend(AtrousBranch(channels[-1], width, rate, config.branch_dropout) for rate in rates)

    def forward(self, features: Sequence[torch.Tensor]) -> torch.Tensor:
        """Give the features that the classifier sees (B, out_channels, h, w)."""
        deepest = features[-1]
        if not self.branches:
            return deepest
        return torch.cat([branch(deepest) for branch in self.branches], dim=1)  # (B, width * branches, h, w)

    def build_classifier(self, in_channels: int) -> nn.Module:
        """Give the summed dilated classifiers, or for the VGG form a 1×1 classifier."""
        if self.branches:
            return super().build_classifier(in_channels)
        return SummedClassifiers(in_channels, self.config.num_labels, self.config.atrous_rates)


class DeepLabV2Model(CtxSegModel):
    """Backbone and branches without classifiers: `AutoModel` gives what the classifiers see, at scale 1.

    `last_hidden_state` is (B, C, h, w): C is the backbone's deepest width, or `branch_channels` for each rate.
    """

    config_class = DeepLabV2Config
    head_class = DeepLabV2Head


class DeepLabV2ForSemanticSegmentation(CtxSegForSemanticSegmentation):
    """DeepLab v1 or v2 with its classifiers, and multi-scale inputs where `input_scales` names several.

    Then the same network sees the picture at each scale, the logits are brought to the size of the largest, and
    their element-wise maximum counts. The loss in evaluation is that of these fused logits. In training the loss of
    each scale's own logits is added (a plain sum, as in arXiv 1511.03339, from which the paper takes the scheme). The
    auxiliary head and `hidden_states` follow the picture at scale 1. The backbone's running statistics, unless frozen
    as in the paper, move once for each scale.
    """

    config_class = DeepLabV2Config
    model_class = DeepLabV2Model

    def forward(
        self,
        pixel_values: torch.Tensor,
        labels: torch.Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> SemanticSegmenterOutput | tuple[Any, ...]:
        """Give class logits at the head's stride, of the largest scale, and, with labels, the loss.

        Arguments and result are those of `CtxSegForSemanticSegmentation.forward`.
        """
        scales = [scale for scale in self.config.input_scales if scale != 1]
        if not scales:
            return super().forward(pixel_values, labels, output_hidden_states, return_dict)
        # The loss at scale 1, with the auxiliary head's, counts in training only.
        single: Any = super().forward(pixel_values, labels if self.training else None, output_hidden_states, True)
        logits: dict[float, torch.Tensor] = {1: single.logits}
        for scale in scales:
            features = self.model(self._rescale(pixel_values, scale), return_dict=True).last_hidden_state
            logits[scale] = self.classifier(self.dropout(features))  # (B, num_labels, ~h * scale, ~w * scale)
        size = logits[max(logits)].shape[-2:]
        # Not resize_like: its comparison of sizes would bind an exported program to how the traced ones compared.
        fused = torch.stack(
            [
                F.interpolate(level, size=size, mode="bilinear", align_corners=self.config.align_corners)
                for level in logits.values()
            ]
        ).amax(dim=0)  # (B, num_labels, h, w)
        loss = None
        if labels is not None:
            loss = self._loss(fused, labels)
            if self.training:
                loss = sum((self._loss(logits[scale], labels) for scale in scales), loss + single.loss)
        output = SemanticSegmenterOutput(loss=loss, logits=fused, hidden_states=single.hidden_states)
        as_object = self.config.return_dict if return_dict is None else return_dict
        return output if as_object else output.to_tuple()

    def _rescale(self, pixel_values: torch.Tensor, scale: float) -> torch.Tensor:
        # Whole numbers, since torch.export cannot round a size that it holds open.
        over, under = Fraction(scale).limit_denominator(1000).as_integer_ratio()
        height, width = pixel_values.shape[-2:]
        if self.config.align_corners:  # 321 pixels become 161 at scale 0.5: every second one
            size = ((height - 1) * over // under + 1, (width - 1) * over // under + 1)
        else:
            size = (max(1, height * over // under), max(1, width * over // under))
        return resize_like(pixel_values, size, self.config.align_corners)  # (B, num_channels, ~H * scale, ~W * scale)
