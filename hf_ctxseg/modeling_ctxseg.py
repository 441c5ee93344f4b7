"""What every model shares: backbone + context head, the pixel classifier, the auxiliary head, the loss.

`XModel` gives dense context features; `XForSemanticSegmentation` adds dropout and a classifier and, in training, an
FCN head on the last but one stage (Zhao et al., arXiv 1612.01105, section 3.3). Logits come at the head's stride, as
those of transformers' own models do.
"""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import SafetensorError
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithNoAttention, SemanticSegmenterOutput
from typing_extensions import Self

from .backbone import DilatedBackbone
from .configuration_ctxseg import CtxSegConfig
from .dense_loss import upsampled_cross_entropy
from .layers import Classifier, ConvNormAct
from .memory_format import to_fast_format
from .nonlocal_block import NonLocalBlock
from .recomputation import find_blocks, set_recomputation
from .weight_files import check_weight_files, not_whole


class ContextHead(nn.Module):
    """Base of the context heads.

    A subclass is built from (config, channels, reductions) of the backbone's maps; its forward takes these maps and
    gives (B, out_channels, h, w).
    """

    def __init__(self, config: CtxSegConfig, out_channels: int) -> None:
        super().__init__()
        self.config = config
        self.out_channels = out_channels

    def build_classifier(self, in_channels: int) -> nn.Module:
        """Give the module that turns (B, in_channels, h, w) into logits (B, num_labels, h, w)."""
        return Classifier(in_channels, self.config.num_labels, kernel_size=1)


class FCNHead(nn.Module):
    """Auxiliary head: 3×3 convolution, dropout, 1×1 classifier on the last but one stage.

    Shape:
        input (B, in_channels, h, w), output (B, num_labels, h, w)
    """

    def __init__(self, config: CtxSegConfig, in_channels: int) -> None:
        super().__init__()
        width = config.auxiliary_hidden_size
        self.conv = ConvNormAct(
            in_channels, width, kernel_size=3, norm_eps=config.norm_eps, norm_momentum=config.norm_momentum
        )
        self.dropout = nn.Dropout2d(config.auxiliary_dropout)
        self.classifier = Classifier(width, config.num_labels, kernel_size=1)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Give the auxiliary logits."""
        return self.classifier(self.dropout(self.conv(features)))


class CtxSegPreTrainedModel(PreTrainedModel):
    """Base of every model: initialisation, and where pretrained backbones come in."""

    config_class = CtxSegConfig
    base_model_prefix = "model"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    # Trainer infers from a forward with **kwargs that the model divides its loss by num_items_in_batch: it does not.
    accepts_loss_kwargs = False
    # Names of the normalisations that `fold_batch_norm` made part of convolutions, in the copy that it gives.
    folded_batch_norms: tuple[str, ...] | None = None
    # Of the non-local blocks: "sdpa" is the fast form of every pairwise function, "eager" the formula as written.
    _supports_sdpa = True
    supports_gradient_checkpointing = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Conv2d):
            if isinstance(module, Classifier):  # He initialisation would start the loss far above log(num_labels)
                init.normal_(module.weight, std=0.01)
            else:  # He initialisation by the outputs of one group; torch counts all of a depthwise convolution's
                fan_out = module.weight[:, 0].numel() // module.groups
                init.normal_(module.weight, std=math.sqrt(2) / math.sqrt(fan_out))
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.GroupNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, nn.modules.batchnorm._BatchNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
            init.zeros_(module.running_mean)
            init.ones_(module.running_var)
            init.zeros_(module.num_batches_tracked)
        elif isinstance(module, NonLocalBlock):  # comes after its convolutions, whose weights it draws otherwise
            module.reset_parameters(init)
        else:  # layers that a head from outside the package may have
            super()._init_weights(module)

    def _initialize_weights(self, module: nn.Module, is_custom_code: bool = False) -> None:
        # Of code outside itself, transformers passes over modules without tensors of their own: the blocks. It does so
        # to protect loaded tensors, which the functions of transformers.initialization leave alone anyway.
        super()._initialize_weights(module, is_custom_code=False)

    def _set_gradient_checkpointing(
        self,
        enable: bool = True,
        gradient_checkpointing_func: Callable[..., Any] = checkpoint,
        every_n_layers: int = 1,
    ) -> None:
        searched = self.backbone.stages
        if enable and not any(find_blocks(self.backbone, searched)):
            raise ValueError(
                f"The backbone {self.config.backbone!r} has no blocks whose activations could be computed again: "
                "train without --gradient_checkpointing, or choose another backbone."
            )
        base: Any = getattr(self, self.base_model_prefix, self)
        blocks = find_blocks(self, {base, self.backbone, base.decode_head, *searched})
        set_recomputation(blocks, gradient_checkpointing_func if enable else None, every_n_layers)

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """Save configuration and weights as transformers does; refuses a copy that `fold_batch_norm` gave."""
        if self.folded_batch_norms is not None:
            raise ValueError(
                "This is a copy for inference: its batch normalisations are folded into its convolutions, so that its "
                "tensors are no longer those of the architecture. Save the model that it was made from."
            )
        super().save_pretrained(*args, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Open a model as transformers does, but from whole safetensors files only, and with every weight in them.

        `ctxseg convert` reads pickles. Layers that name classes and non-local blocks may be missing, others too if
        `ignore_mismatched_sizes` is given, for training.

        Raises:
            ValueError: If weights of backbone or head are missing, or a file is torn, holds what is no weights, or is
                an index that leads elsewhere.
        """
        name = pretrained_model_name_or_path
        if kwargs.get("use_safetensors") is None:
            kwargs["use_safetensors"] = True
        if name is not None:
            check_weight_files(Path(name) / kwargs.get("subfolder", ""), kwargs.get("variant"))
        wanted = kwargs.pop("output_loading_info", False)
        try:
            model, info = super().from_pretrained(name, *args, output_loading_info=True, **kwargs)
        except SafetensorError as error:
            raise not_whole(name, error) from error
        # Non-local blocks may be added to a saved model: they start as the identity.
        lacking = [
            key
            for key in info["missing_keys"]
            if not key.startswith(("classifier.", "auxiliary_head.")) and ".nonlocal_block." not in key
        ]
        if lacking and not kwargs.get("ignore_mismatched_sizes"):
            raise ValueError(
                f"{name} lacks {len(lacking)} tensors of backbone or head ({', '.join(sorted(lacking)[:5])}, …), "
                "which would be random: it is no whole model (ignore_mismatched_sizes=True opens it to be trained)."
            )
        return (model, info) if wanted else model

    @classmethod
    def from_pretrained_backbone(
        cls, config: CtxSegConfig, weights: str | Path | Mapping[str, torch.Tensor] | None = None
    ) -> Self:
        """Build a model whose backbone has pretrained weights and whose head is new.

        Args:
            config: The configuration; `backbone` names the timm network.
            weights: A file or state dict in timm's names; None: timm's own weights from the Hub.

        Raises:
            ValueError: If the weights do not fit the backbone.
            ConnectionError: If the Hub cannot be reached.
        """
        model = cls(config)
        model.backbone.load_backbone_weights(weights)
        return model


class CtxSegModel(CtxSegPreTrainedModel):
    """Backbone and context head; a subclass names its `config_class` and `head_class`."""

    head_class: ClassVar[Callable[..., ContextHead]]
    # The base model opens checkpoints of the segmentation model.
    _keys_to_ignore_on_load_unexpected: ClassVar[list[str]] = [r"^classifier\.", r"^auxiliary_head\."]
    # One NaN that reaches the running statistics in training stays there: such pictures are refused before.
    refuses_nan = True

    def __init__(self, config: CtxSegConfig) -> None:
        super().__init__(config)
        config.check_values()
        self.backbone = DilatedBackbone(config)
        self.decode_head = self.head_class(config, self.backbone.channels, self.backbone.reductions)
        for module in self.modules():
            if isinstance(module, NonLocalBlock):
                module.config = config  # its attn_implementation may change at any time
        self.post_init()

    def forward(
        self, pixel_values: torch.Tensor, output_hidden_states: bool | None = None, return_dict: bool | None = None
    ) -> BaseModelOutputWithNoAttention | tuple[Any, ...]:
        """Give dense context features.

        Args:
            pixel_values: (B, num_channels, H, W) as the image processor makes them.
            output_hidden_states: Whether to give the backbone's maps too.
            return_dict: Whether to give an output object (default) or a tuple.

        Returns:
            `last_hidden_state` (B, C, h, w) with C the head's `out_channels`; `hidden_states`, the backbone's maps,
            where asked.
        """
        check_pixel_values(pixel_values, self.config.num_channels)
        if self.training and self.refuses_nan:
            check_finite(pixel_values)
        features = self.backbone(to_fast_format(pixel_values))
        hidden_state = self.decode_head(features)
        output = BaseModelOutputWithNoAttention(
            last_hidden_state=hidden_state,
            hidden_states=tuple(features) if _chosen(output_hidden_states, self.config.output_hidden_states) else None,
        )
        return output if _chosen(return_dict, self.config.return_dict) else output.to_tuple()


class CtxSegForSemanticSegmentation(CtxSegPreTrainedModel):
    """Context features, dropout, classifier, optional auxiliary head, loss; a subclass names its `model_class`."""

    model_class: ClassVar[type[CtxSegModel]]
    # The loss in training where it is not the cross-entropy: called with logits (B, K, h, w) and labels (B, H, W).
    training_loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None

    def __init__(self, config: CtxSegConfig) -> None:
        super().__init__(config)
        self.model = self.model_class(config)
        self.dropout = nn.Dropout2d(config.classifier_dropout)
        self.classifier = self.model.decode_head.build_classifier(self.model.decode_head.out_channels)
        self.auxiliary_head = FCNHead(config, self.backbone.channels[-2]) if config.use_auxiliary_head else None
        self.post_init()

    @property
    def backbone(self) -> DilatedBackbone:
        """The dilated backbone."""
        return self.model.backbone

    def forward(
        self,
        pixel_values: torch.Tensor,
        labels: torch.Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> SemanticSegmenterOutput | tuple[Any, ...]:
        """Give class logits at the head's stride and, with labels, the loss.

        Args:
            pixel_values: (B, num_channels, H, W) as the image processor makes them.
            labels: (B, H', W') class indices, `semantic_loss_ignore_index` where a pixel has none.
            output_hidden_states: Whether to give the backbone's maps too.
            return_dict: Whether to give an output object (default) or a tuple.

        Returns:
            `logits` (B, num_labels, h, w); `loss`, a float32 scalar, with labels; `hidden_states` where asked.
        """
        outputs = self.model(pixel_values, output_hidden_states=True, return_dict=True)
        logits = self.classifier(self.dropout(outputs.last_hidden_state)).contiguous()  # (B, num_labels, h, w)
        loss = None
        if labels is not None:
            loss = self._loss(logits, labels)
            if self.auxiliary_head is not None and self.training:
                auxiliary_logits = self.auxiliary_head(outputs.hidden_states[-2])
                loss = loss + self.config.auxiliary_loss_weight * self._loss(auxiliary_logits, labels)
        keep = _chosen(output_hidden_states, self.config.output_hidden_states)
        output = SemanticSegmenterOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states if keep else None
        )
        return output if _chosen(return_dict, self.config.return_dict) else output.to_tuple()

    def _loss(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        if self.training and self.training_loss is not None:
            return self.training_loss(logits, labels)
        return upsampled_cross_entropy(
            logits, labels, self.config.semantic_loss_ignore_index, self.config.align_corners
        )


def check_pixel_values(pixel_values: torch.Tensor, num_channels: int) -> None:
    """Raise `ValueError` unless `pixel_values` is a float (B, num_channels, H, W) tensor."""
    if pixel_values.dim() == 4 and pixel_values.shape[1] == num_channels and pixel_values.is_floating_point():
        return
    raise ValueError(
        f"pixel_values is a {pixel_values.dtype} tensor of shape {tuple(pixel_values.shape)}, but must be floating "
        f"point of shape (batch, {num_channels}, height, width): pass pictures through the image processor."
    )


def check_finite(pixel_values: torch.Tensor) -> None:
    """Raise `ValueError` if a value is NaN or infinite, which one sum tells."""
    if torch.compiler.is_compiling() or pixel_values.is_meta:
        return
    accurate = torch.promote_types(pixel_values.dtype, torch.float32)
    if not bool(pixel_values.detach().sum(dtype=accurate).isfinite()):
        raise ValueError(
            "pixel_values holds NaN or infinite values: look at the pictures of this batch and pass them through the "
            "image processor, which tells which are broken."
        )


def _chosen(argument: bool | None, default: bool | None) -> bool:
    return bool(default) if argument is None else argument
