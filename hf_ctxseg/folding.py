"""Batch normalisation folded into the convolutions before it: the same outputs from fewer layers.

In evaluation a batch normalisation multiplies and shifts each channel by constants, which the convolution before it
can do at no cost. Which convolution feeds which normalisation is found by running the network, whatever its code, and
the outputs are compared before a pair counts.
"""

import copy
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_eval
from transformers.utils import logging

from .modeling_ctxseg import CtxSegPreTrainedModel

logger = logging.get_logger(__name__)

Model = TypeVar("Model", bound=CtxSegPreTrainedModel)

_PROBE_SIZE = (64, 96)
_TOLERANCE = 1e-6  # of the largest output, in float64


@torch.inference_mode(False)
def fold_batch_norm(model: Model) -> Model:
    """Give a copy for inference whose batch normalisations are part of its convolutions; the model stays as it is.

    The outputs are the same up to rounding. The copy cannot be saved or trained: keep the model for that. A
    normalisation that no convolution feeds alone, or whose convolution computes its weights, stays.

    Args:
        model: A model of this package, in evaluation mode.

    Returns:
        The copy, on the device and in the number format of the model. `folded_batch_norms` names what was folded.

    Raises:
        ValueError: If the model is in training mode, is a folded copy, or gives NaN or infinite values.
    """
    if model.folded_batch_norms is not None:
        raise ValueError("The model is a folded copy already: fold the model that it was made from.")
    if any(module.training for module in model.modules()):
        raise ValueError("The model is in training mode, in which batch statistics count: call model.eval() first.")
    folded = copy.deepcopy(model).requires_grad_(False)
    tensors = {**dict(folded.named_parameters()), **dict(folded.named_buffers())}
    kinds = {name: tensor.dtype for name, tensor in tensors.items()}
    folded.to("cpu", torch.float64)  # rounding must not look like a wrong pair
    expected = _run(folded)
    if not all(bool(torch.isfinite(output).all()) for output in expected):
        raise ValueError("The model gives values that are not finite: some of its weights are NaN or infinite.")
    pairs = _find_pairs(folded)
    _fold(folded, pairs, expected)
    for name, tensor in (*folded.named_parameters(), *folded.named_buffers()):
        tensor.data = tensor.data.to(kinds.get(name, model.dtype))  # only a new bias has no kind of its own
    folded.to(model.device)
    if model.device.type == "cpu":
        folded.to(memory_format=torch.channels_last)
    left = {name for name, module in folded.named_modules() if isinstance(module, _BatchNorm)}
    names = tuple(norm for _, norm in pairs if norm not in left)
    logger.info(f"Folded {len(names)} batch normalisations into convolutions; {len(left)} stay.")
    for module in folded.modules():
        if isinstance(module, CtxSegPreTrainedModel):
            module.folded_batch_norms = names
    return folded


def _find_pairs(model: CtxSegPreTrainedModel) -> list[tuple[str, str]]:
    """Name the pairs of a convolution and the batch normalisation that takes its output, in every call of either."""
    outputs: dict[int, tuple[str, torch.Tensor, int]] = {}
    takers: dict[str, set[str | None]] = {}
    givers: dict[str, set[str | None]] = {}

    def after_conv(name: str, module: nn.Module, inputs: Any, output: torch.Tensor) -> None:
        takers.setdefault(name, set())
        outputs[id(output)] = (name, output, output._version)  # the tensor is held: its id is not given to another

    def before_norm(name: str, module: nn.Module, inputs: Any) -> None:
        conv, output, version = outputs.get(id(inputs[0]), (None, None, 0))
        if output is not None and output._version != version:  # an operation in place came between
            conv = None
        givers.setdefault(name, set()).add(conv)
        if conv is not None:
            takers[conv].add(name)

    hooks = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            hooks.append(module.register_forward_hook(_named(after_conv, name)))
        elif isinstance(module, _BatchNorm) and module.running_mean is not None:
            hooks.append(module.register_forward_pre_hook(_named(before_norm, name)))
    try:
        _run(model)
    finally:
        for hook in hooks:
            hook.remove()
    return [
        (conv, norm)
        for norm, (conv, *others) in ((norm, tuple(found)) for norm, found in givers.items())
        if conv is not None and not others and takers[conv] == {norm}
    ]


def _named(function: Any, name: str) -> Any:
    return lambda *arguments: function(name, *arguments)


def _fold(model: CtxSegPreTrainedModel, pairs: Sequence[tuple[str, str]], expected: Sequence[torch.Tensor]) -> None:
    """Fold the pairs that leave the outputs as they are: all at once if that works, else by halves."""
    if not pairs:
        return
    modules = dict(model.named_modules())
    before = {name: modules[name] for pair in pairs for name in pair}
    for conv_name, norm_name in pairs:
        conv, norm = before[conv_name], before[norm_name]
        model.set_submodule(conv_name, fuse_conv_bn_eval(conv, norm).requires_grad_(False))
        parts = [getattr(norm, part) for part in ("drop", "act") if hasattr(norm, part)]  # timm's with activation
        model.set_submodule(norm_name, nn.Sequential(*parts) if parts else nn.Identity())
    if _agree(_run(model), expected):
        return
    for name, module in before.items():
        model.set_submodule(name, module)
    if len(pairs) > 1:
        _fold(model, pairs[: len(pairs) // 2], expected)
        _fold(model, pairs[len(pairs) // 2 :], expected)


def _agree(found: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> bool:
    return all(
        bool((one - other).abs().max() <= _TOLERANCE * other.abs().max())
        for one, other in zip(found, expected, strict=True)
    )


@torch.no_grad()
def _run(model: CtxSegPreTrainedModel) -> list[torch.Tensor]:
    """Give all outputs for a picture of noise."""
    noise = torch.randn(1, model.config.num_channels, *_PROBE_SIZE, generator=torch.Generator().manual_seed(0))
    outputs = model(noise.to(model.device, torch.float64), output_hidden_states=True, return_dict=True)
    auxiliary = getattr(model, "auxiliary_head", None)
    maps = [*outputs.hidden_states, *(value for name, value in outputs.items() if name != "hidden_states")]
    return maps if auxiliary is None else [*maps, auxiliary(outputs.hidden_states[-2])]
