"""What training may do with batch normalisations: keep them as loaded, or share their statistics between processes."""

import torch
from timm.layers import convert_sync_batchnorm
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from .modeling_ctxseg import CtxSegForSemanticSegmentation


def freeze_norms(model: CtxSegForSemanticSegmentation, part: str) -> list[nn.Module]:
    """Exclude batch normalisations from training, and give them: they are to be kept in evaluation mode.

    Args:
        model: The model.
        part: Which ones: `none`, `backbone` or `all`.
    """
    roots: dict[str, list[nn.Module]] = {"none": [], "backbone": [model.backbone], "all": [model]}
    norms: list[nn.Module] = [
        module for root in roots[part] for module in root.modules() if isinstance(module, _BatchNorm)
    ]
    for norm in norms:
        norm.requires_grad_(False)
    return norms


def synchronise_norms(model: nn.Module) -> None:
    """Have batch normalisations take their statistics over all processes; names and tensors stay.

    timm's, which apply the activation too, keep it.

    Raises:
        ValueError: If there is no process group, since then there is nothing to share.
    """
    if not torch.distributed.is_initialized():
        raise ValueError(
            "sync_batch_norm shares statistics between processes, but there is one only: leave it out, or start "
            "several with torchrun."
        )
    for name, child in model.named_children():
        setattr(model, name, convert_sync_batchnorm(child))
