"""smp's DeepLabV3+ in the clothes of a head of ours, so that the same code trains and scores it.

Importing this module registers the head `smp_deeplabv3plus`. The network is smp's own, untouched: its encoder,
decoder, initial weights, dropout and upsampling. Data, crops, loss, optimizer, schedule and scores are those of
`ctxseg train` and `ctxseg eval`.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import segmentation_models_pytorch as smp
import torch
from torch import nn
from torch.nn import functional as F
from transformers.modeling_outputs import SemanticSegmenterOutput
from typing_extensions import Self

from hf_ctxseg.backbone import DilatedBackbone
from hf_ctxseg.configuration_ctxseg import CtxSegConfig
from hf_ctxseg.modeling_ctxseg import CtxSegForSemanticSegmentation, CtxSegModel, CtxSegPreTrainedModel
from hf_ctxseg.registry import register


class SmpPeerConfig(CtxSegConfig):
    """Of the shared fields, backbone, num_channels, output_stride, hidden_size and the classes are used."""

    model_type = "ctxseg_smp_deeplabv3plus"


class SmpPeerModel(CtxSegModel):
    """Never built: registration asks for one beside the network with its classifier."""

    config_class = SmpPeerConfig


class SmpPeerForSemanticSegmentation(CtxSegForSemanticSegmentation):
    """`segmentation_models_pytorch.DeepLabV3Plus` with a `tu-` encoder.

    Shape:
        pixel_values (B, num_channels, H, W), logits (B, num_labels, H, W)
    """

    config_class = SmpPeerConfig
    model_class = SmpPeerModel

    def __init__(self, config: SmpPeerConfig) -> None:
        CtxSegPreTrainedModel.__init__(self, config)
        self.peer = smp.DeepLabV3Plus(
            encoder_name=f"tu-{config.backbone}",
            encoder_weights=None,
            encoder_output_stride=config.output_stride,
            decoder_channels=config.hidden_size,
            in_channels=config.num_channels,
            classes=config.num_labels,
        )
        self.auxiliary_head = None
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Leave smp's initial weights as they are."""

    @property
    def backbone(self) -> nn.Module:
        """What learns at the backbone's rate."""
        return self.peer.encoder

    @classmethod
    def from_pretrained_backbone(
        cls, config: CtxSegConfig, weights: str | Path | Mapping[str, torch.Tensor] | None = None
    ) -> Self:
        """Build the network and give its encoder the tensors that our backbone would have."""
        model = cls(config)
        with torch.random.fork_rng(devices=[]):
            ours = DilatedBackbone(config)
        ours.load_backbone_weights(weights)
        model.peer.encoder.model.load_state_dict(ours._backbone.state_dict())
        return model

    def forward(
        self,
        pixel_values: torch.Tensor,
        labels: torch.Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> SemanticSegmenterOutput | tuple[Any, ...]:
        """Give logits at full size and, with labels, the loss; smp takes multiples of the output stride alone."""
        height, width = pixel_values.shape[-2:]
        stride = self.config.output_stride
        padded = F.pad(pixel_values, (0, -width % stride, 0, -height % stride), mode="replicate")
        logits = self.peer(padded)[..., :height, :width].contiguous()
        output = SemanticSegmenterOutput(loss=None if labels is None else self._loss(logits, labels), logits=logits)
        return output.to_tuple() if return_dict is False else output


register(SmpPeerConfig, SmpPeerModel, SmpPeerForSemanticSegmentation)
