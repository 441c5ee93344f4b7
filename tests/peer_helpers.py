"""How a converted model is compared with its peer."""

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from hf_ctxseg.registry import find_head, head_name

TOLERANCE = 1e-4  # of the range of the logits
GRADIENT_TOLERANCE = 1e-6  # of a tensor's largest gradient, in float64: rounding may turn a ReLU on or off


def make_peer(build, *inputs):
    """Build a peer with weights and statistics that all matter, in evaluation mode.

    The weights are random, the statistics those of `inputs`, a batch of two or more, under them: no layer saturates
    and none is drowned, however deep the peer.
    """
    with torch.device("meta"):  # its own initialisation would be lost
        peer = build()
    peer = peer.to_empty(device="cpu").eval()
    generator = torch.Generator().manual_seed(0)
    for module in peer.modules():
        _draw_weights(module, generator)
    norms = [module for module in peer.modules() if isinstance(module, _BatchNorm)]
    usual = [norm.momentum for norm in norms]
    for norm in norms:
        norm.train()
        norm.momentum = 1.0
    with torch.no_grad():
        peer(*inputs)
    for norm, momentum in zip(norms, usual, strict=True):
        norm.eval()
        norm.momentum = momentum
        norm.running_var.clamp_(min=0.3)  # that of two pooled values says little
    return peer


def _draw_weights(module, generator):
    for name, value in module.named_parameters(recurse=False):
        if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)) and name == "weight":
            nn.init.kaiming_normal_(value, mode="fan_in", generator=generator)
        elif name == "bias":
            nn.init.normal_(value, std=0.3, generator=generator)
        else:  # the weight of a normalisation, or a scale
            nn.init.uniform_(value, 0.5, 1.5, generator=generator)
    if isinstance(module, _BatchNorm):
        module.reset_running_stats()
    elif list(module.buffers(recurse=False)):
        raise ValueError(f"How to draw the buffers of {module} is not known.")


def build(converted):
    """Give our model with the converted tensors."""
    config, tensors = converted
    _, _, model_class = find_head(head_name(type(config)))
    model, info = model_class.from_pretrained(None, config=config, state_dict=tensors, output_loading_info=True)
    assert not (info["missing_keys"] or info["unexpected_keys"] or info["mismatched_keys"])
    return model.eval()


def picture(size, count=1):
    return torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(count))


def full_size_logits(model, x):
    """Our logits brought to the size of the picture as the configuration says."""
    logits = model(x).logits
    return F.interpolate(logits, size=x.shape[-2:], mode="bilinear", align_corners=model.config.align_corners)


def difference(found, expected):
    """Largest absolute difference in parts of the range of what is expected."""
    assert found.shape == expected.shape and found.dtype == expected.dtype == torch.float32
    spread = (expected.max() - expected.min()).item()
    assert 1 < spread < 1e3
    return (found - expected).abs().max().item() / spread


def logit_difference(model, peer_logits, size, dtype=torch.float32):
    """Difference of the logits for a picture, computed in `dtype`; `peer_logits` gives them at its size."""
    x = picture(size).to(dtype)
    with torch.no_grad():
        return difference(full_size_logits(model, x).float(), peer_logits(x).float())


def gradient_difference(model, peer, peer_logits, convert, size):
    """Largest difference of the gradients of the picture and of each parameter, in parts of the tensor's largest.

    The logits are weighted at random. The peer's gradients go through the converter, which renames and permutes.
    """
    model, peer = model.double(), peer.double()
    ours, theirs = (picture(size).double().requires_grad_() for _ in range(2))
    logits = peer_logits(theirs)
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1)).double()
    (logits * weights).sum().backward()
    (full_size_logits(model, ours) * weights).sum().backward()
    gradients = dict(peer.state_dict())  # buffers have none
    for name, parameter in peer.named_parameters():
        gradients[name] = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    peer.float().zero_grad()
    expected = {"picture": theirs.grad, **convert(gradients)[1]}
    found = {"picture": ours.grad}
    for name, parameter in model.named_parameters():
        found[name] = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    return largest_difference(found, expected)


def largest_difference(found, expected):
    """Largest difference of the tensors, each in parts of its own largest value.

    Some gradients are zero but for rounding (a bias of what a softmax makes relative): their scale is that of all.
    """
    largest = {name: expected[name].abs().max().item() for name in found}
    floor = 1e-3 * max(largest.values())
    assert sum(value > 0 for value in largest.values()) > 0.9 * len(found)
    return max(
        (value - expected[name]).abs().max().item() / max(largest[name], floor) for name, value in found.items()
    )
