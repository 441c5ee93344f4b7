"""What a timm network really gives: built and run without memory, since its own words are not always true.

Of timm's names about a third take `output_stride`; some refuse it with an empty message, some ignore it, some work at
one picture size only, some round sizes down and some stop at sizes that their patches do not divide.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import timm
import torch
from torch import nn
from torch.nn import functional as F

# Transformers with positions of a fixed grid take pictures of any size only when asked to.
_ANY_SIZE: tuple[dict[str, Any], ...] = ({}, {"dynamic_img_size": True}, {"strict_img_size": False})
_PROBE_SIZE = (96, 66)
# Steps of the deepest map that pictures may have to fill: MobileViT's patches, windows of MaxViT and halo attention.
_PADDINGS = (1, 2, 7, 8)


@dataclass(frozen=True)
class FeatureLevels:
    """The feature maps of a timm network at one output stride, shallow to deep.

    Attributes:
        reductions: Input pixels per step of each map.
        channels: Channels of each map.
        indices: timm's `out_indices` of the maps.
        modules: timm's names of the modules that give them.
        arguments: What `timm.create_model` needs so that pictures of any size are taken.
        pad_to: Pictures have to be padded to multiples of this many pixels; 1: they are taken as they are.
        num_parameters: Parameters of the network up to its deepest map.
    """

    reductions: tuple[int, ...]
    channels: tuple[int, ...]
    indices: tuple[int, ...]
    modules: tuple[str, ...]
    arguments: Mapping[str, Any]
    pad_to: int
    num_parameters: int


def probe(
    name: str, output_stride: int | None = None, num_channels: int = 3, arguments: Mapping[str, Any] | None = None
) -> FeatureLevels:
    """Find out what maps a timm network gives.

    Args:
        name: timm's name.
        output_stride: Asked of timm; None: the network's native stride.
        num_channels: Channels of the input picture.
        arguments: Further arguments of `timm.create_model`.

    Raises:
        ValueError: If the network cannot be built so, or its maps do not have the sizes that it states.
    """
    return _probe(name, output_stride, num_channels, json.dumps(dict(arguments or {}), sort_keys=True))


@lru_cache(maxsize=1024)
def _probe(name: str, output_stride: int | None, num_channels: int, arguments: str) -> FeatureLevels:
    given = json.loads(arguments) | {"in_chans": num_channels}
    if output_stride is not None:
        given["output_stride"] = output_stride
    first: Exception | None = None
    for further in _ANY_SIZE:
        try:
            net = build_without_memory(name, **given | further)
            info = net.feature_info
            reductions = tuple(info.reduction())
            pad_to = _find_padding(net, reductions, num_channels)
        except Exception as error:  # a thousand networks fail in every way there is
            first = first or error
            continue
        return FeatureLevels(
            reductions,
            tuple(info.channels()),
            tuple(info.out_indices),
            tuple(info.module_name()),
            further,
            pad_to,
            sum(parameter.numel() for parameter in net.parameters()),
        )
    reason = str(first) or "it refuses without giving a reason"
    raise ValueError(reason) from first


def build_without_memory(name: str, **arguments: Any) -> Any:
    """Build a timm feature network on the meta device."""
    with torch.device("meta"):
        return timm.create_model(name, features_only=True, **arguments).eval()


def _find_padding(net: Any, reductions: Sequence[int], num_channels: int) -> int:
    """Give the multiple to which pictures are padded so that maps have ceil(size / reduction) cells."""
    first: Exception | None = None
    for multiple in (1, *(steps * reductions[-1] for steps in _PADDINGS)):
        height, width = (-(-edge // multiple) * multiple for edge in _PROBE_SIZE)
        height += multiple  # 97 × 66, which no patch divides; later not square: a network of one size must not pass
        try:
            found = _map_sizes(net, (height, width), num_channels)
            if found == [(-(-height // reduction), -(-width // reduction)) for reduction in reductions]:
                return multiple
            stated = f"where it states {list(reductions)} pixels a step"
            raise ValueError(f"at {height}×{width} pixels its maps have the sizes {found}, {stated}")
        except Exception as error:  # the network says in its own way that it does not take such a size
            first = first if multiple == 1 or first is not None else error
    raise first or ValueError("it takes pictures of no size that was tried")


def _map_sizes(net: Any, size: tuple[int, int], num_channels: int) -> list[tuple[int, int]]:
    with torch.no_grad():
        maps = to_channels_first(net, net(torch.zeros(1, num_channels, *size, device="meta")))
    return [(level.shape[2], level.shape[3]) for level in maps]


def to_channels_first(net: nn.Module, maps: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Give a timm network's maps as (B, C, h, w); Swin and others put channels last."""
    if getattr(net, "output_fmt", "NCHW") == "NHWC":
        return [level.permute(0, 3, 1, 2) for level in maps]
    return list(maps)


def run_padded(
    net: nn.Module, pixel_values: torch.Tensor, pad_to: int, reductions: Sequence[int]
) -> list[torch.Tensor]:
    """Run a network that asks for whole patches: zeros to the right and below, cut off its maps again."""
    height, width = pixel_values.shape[-2:]
    below, right = (_steps(edge, pad_to) * pad_to - edge for edge in (height, width))
    padded = F.pad(pixel_values, (0, right, 0, below))  # (B, num_channels, H + below, W + right)
    maps = to_channels_first(net, net(padded))
    return [
        level[..., : _steps(height, reduction), : _steps(width, reduction)]  # (B, C, ceil(H / r), ceil(W / r))
        for level, reduction in zip(maps, reductions, strict=True)
    ]


def _steps(pixels: int, step: int) -> int:
    # Not -(-pixels // step): in ONNX the quotient of a negative number is rounded the other way.
    return (pixels + step - 1) // step
