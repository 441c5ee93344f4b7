"""Changes to a timm network that its own arguments cannot express: atrous rates of single blocks, non-local blocks.

They are made after construction, on every path that builds a model, and none renames a tensor of timm's.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeGuard

import torch
from torch import nn

NONLOCAL_NAME = "nonlocal_block"


def dilate_first_blocks(net: nn.Module, native: nn.Module, rates: Mapping[str, int]) -> None:
    """Give the first block of every dilated stage the rate of the stage; timm gives it that of the stage before.

    Args:
        net: The dilated network.
        native: The same network at its native stride.
        rates: The rate of each stage, by timm's name of the module that is it.
    """
    undilated: dict[str, Any] = dict(native.named_modules())
    for key, module in net.named_modules():
        if _is_spatial(module):
            stride = undilated[key].stride[0]
            if module.stride[0] < stride:
                _set_rate(module, module.dilation[0] * stride)
    for stage, rate in rates.items():  # where the stride sits in a pooling layer
        name, module = _find(net, stage)
        for key, part in module.named_modules(prefix=name):
            if _is_spatial(part):
                _set_rate(part, undilated[key].dilation[0] * rate)


def set_multi_grid(net: nn.Module, native: nn.Module, stage: str, multi_grid: Sequence[int], rate: int) -> None:
    """Multiply the rate of the last stage by a factor of its own in each block.

    Chen et al., arXiv 1706.05587, section 3.1.1: with output stride 16 and (1, 2, 4) the three blocks of a ResNet's
    last stage have the rates (2, 4, 8). In Xception the units are the three separable convolutions of the last block.

    Args:
        net: The network.
        native: The same network at its native stride; what its convolutions are dilated by there is kept as a factor.
        stage: timm's name of the module that is the last stage.
        multi_grid: One factor for each block.
        rate: The rate of the stage.

    Raises:
        ValueError: If the network has no such blocks, or another number of them.
    """
    undilated: dict[str, Any] = dict(native.named_modules())
    blocks = _blocks(net, stage)
    if len(blocks) != len(multi_grid):
        raise ValueError(
            f"multi_grid is {list(multi_grid)}, but takes a factor for each of the {len(blocks)} blocks with spatial "
            "convolutions in the last stage; None keeps timm's rates"
        )
    for (name, block), factor in zip(blocks.items(), multi_grid, strict=True):
        for key, module in block.named_modules(prefix=name):
            if _is_spatial(module):
                _set_rate(module, undilated[key].dilation[0] * rate * factor)


def set_rates(net: nn.Module, rates: Mapping[str, int]) -> None:
    """Set the rates of single convolutions.

    Args:
        net: The network.
        rates: The rate of each, by timm's name of the convolution.

    Raises:
        ValueError: If the network has no such spatial convolution, or one with a stride.
    """
    modules = dict(net.named_modules())
    for name, rate in rates.items():
        module = modules.get(name)
        if module is None or not _is_spatial(module) or module.stride != (1, 1):
            spatial = [key for key, part in modules.items() if _is_spatial(part) and part.stride == (1, 1)]
            raise ValueError(
                f"backbone_rates names {name!r}, which is no convolution larger than 1×1 without stride, as "
                f"{', '.join(spatial[-3:])} are"
            )
        _set_rate(module, rate)


def insert_nonlocal_blocks(net: nn.Module, stage: str, build: Callable[..., nn.Module]) -> None:
    """Put a non-local block after every second residual block of a stage.

    Wang et al., arXiv 1711.07971, section 4.1, with the settings of the authors' code: sub-sampled, scaled, and a
    normalisation that starts at zero, so that a pretrained network starts unchanged.

    Args:
        net: The network.
        stage: timm's name of the module that is the stage.
        build: Gives a block, from the keyword arguments of `NonLocal2d` other than channels and mode.

    Raises:
        ValueError: If the stage has fewer than two blocks.
    """
    blocks = list(_blocks(net, stage).values())
    if len(blocks) < 2:
        raise ValueError(f"its stage {stage!r} has {len(blocks)} blocks with spatial convolutions, but needs two")
    for block in blocks[1::2]:
        block.add_module(NONLOCAL_NAME, build(sub_sample=True, norm="batch", zeros_init=True))
        # A function of the module alone: the network can still be copied and pickled.
        block.register_forward_hook(_then_nonlocal)


def _then_nonlocal(block: nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
    return block.get_submodule(NONLOCAL_NAME)(output)  # (B, C, h, w)


def _blocks(net: nn.Module, stage: str) -> dict[str, nn.Module]:
    """The residual blocks of a stage by name, shallow to deep, in the ways that timm arranges them."""
    name, module = _find(net, stage)
    for inner in ("blocks", "stack"):  # ConvNeXt and ResNetV2; the separable convolutions of Xception
        if inner in dict(module.named_children()):
            name, module = f"{name}.{inner}", module.get_submodule(inner)
    if not list(module.children()):
        raise ValueError(f"its {stage!r} is no stage of residual blocks")
    blocks = {f"{name}.{child}": block for child, block in module.named_children()}
    return {key: block for key, block in blocks.items() if any(_is_spatial(part) for part in block.modules())}


def _find(net: nn.Module, stage: str) -> tuple[str, nn.Module]:
    modules = dict(net.named_modules())
    name = stage if stage in modules else stage.replace(".", "_")
    if name not in modules:
        raise ValueError(f"its {stage!r} is no stage of residual blocks")
    return name, modules[name]


def _is_spatial(module: nn.Module) -> TypeGuard[nn.Conv2d]:
    return isinstance(module, nn.Conv2d) and module.kernel_size[0] > 1 and module.kernel_size[0] % 2 == 1


def _set_rate(conv: nn.Conv2d, rate: int) -> None:
    if any(conv.padding):  # otherwise it pads by itself, as TensorFlow does
        conv.padding = (rate * (conv.kernel_size[0] // 2), rate * (conv.kernel_size[1] // 2))
    conv.dilation = (rate, rate)
