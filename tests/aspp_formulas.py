"""The heads of DeepLabv3 and v3+ from their weights by the formulas, for comparison with the modules."""

import torch
from torch.nn import functional as F


def norm_relu(weights, x, prefix, eps=1e-5):
    """Batch normalisation with stored statistics, then ReLU."""
    mean, variance, scale, shift = (
        weights[f"{prefix}.{name}"][:, None, None] for name in ("running_mean", "running_var", "weight", "bias")
    )
    return ((x - mean) / torch.sqrt(variance + eps) * scale + shift).clamp(min=0)


def conv_norm_relu(weights, x, prefix, rate=1, eps=1e-5):
    """Convolution, with its bias where it has one, then normalisation and ReLU."""
    kernel = weights[f"{prefix}.conv.weight"]
    y = F.conv2d(x, kernel, padding=rate * (kernel.shape[-1] // 2), dilation=rate)
    if f"{prefix}.conv.bias" in weights:
        y = y + weights[f"{prefix}.conv.bias"][:, None, None]
    return norm_relu(weights, y, f"{prefix}.norm", eps)


def separable(weights, x, prefix, between, rate=1, eps=1e-5):
    """Each channel's own 3×3 convolution, `between` normalisation and ReLU or nothing, then the 1×1 convolution."""
    kernel = weights[f"{prefix}.depthwise.weight"]
    y = F.conv2d(x, kernel, padding=rate, dilation=rate, groups=x.shape[1])
    if between:
        y = norm_relu(weights, y, f"{prefix}.depthwise_norm", eps)
    return conv_norm_relu(weights, y, f"{prefix}.pointwise", eps=eps)


def aspp(weights, x, rates, pooling=True, prefix="", eps=1e-5, between=None):
    """ASPP with global pooling; `between` of separable branches, None for dense ones."""
    branches = [conv_norm_relu(weights, x, f"{prefix}branches.0", eps=eps)]
    for index, rate in enumerate(rates, start=1):
        name = f"{prefix}branches.{index}"
        if between is None:
            branches.append(conv_norm_relu(weights, x, name, rate, eps))
        else:
            branches.append(separable(weights, x, name, between, rate, eps))
    if pooling:
        mean = x.sum(dim=(2, 3), keepdim=True) / (x.shape[2] * x.shape[3])
        pooled = conv_norm_relu(weights, mean, f"{prefix}image_pooling", eps=eps)
        branches.append(pooled * torch.ones_like(branches[0]))
    return conv_norm_relu(weights, torch.cat(branches, dim=1), f"{prefix}projection", eps=eps)
