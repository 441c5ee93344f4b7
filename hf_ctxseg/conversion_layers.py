"""Pyramids and non-local blocks of other code bases, as layers by themselves.

Such layers go from project to project by copy, and their names with them. Where a convolution has a bias before its
batch normalisation, which does nothing but move the mean, the running mean takes it over.
"""

from collections.abc import Mapping, Sequence
from typing import TypeVar

import torch
from torch import nn

from .aspp import ASPP
from .conversion import Tensors, aspp_modules, rename, require
from .nonlocal_block import NonLocal1d, NonLocal2d, NonLocal3d, NonLocalBlock

Layer = TypeVar("Layer", bound=nn.Module)


def aspp_from_state_dict(
    state_dict: Tensors,
    *,
    atrous_rates: Sequence[int] = (6, 12, 18),
    norm_eps: float = 1e-5,
    norm_momentum: float = 0.1,
) -> ASPP:
    """Build our ASPP from a pyramid with a 1×1 branch, dilated branches, image pooling and a 1×1 projection.

    Known are the names of torchvision and those who follow it (`convs.0.0`, `project.0`), of pytorch-deeplab-xception
    (`aspp1.atrous_conv`, `global_avg_pool.1`, `conv1`) and of the often copied module with `branch1.0`,
    `branch5_conv` and `conv_cat.0`.

    Args:
        state_dict: The pyramid's tensors, named from within it.
        atrous_rates: Rates of the dilated branches, which the tensors do not tell.
        norm_eps: Epsilon of the normalisations.
        norm_momentum: Their momentum.

    Raises:
        ValueError: If tensors are missing, surplus or of another shape, or the rates are not one for each branch.
    """
    name = "A pyramid (ASPP)"
    tensors = _without_biases(rename(state_dict, _aspp_names(state_dict, len(atrous_rates)), name))
    first = require(tensors, "branches.0.conv.weight", name)
    aspp = ASPP(first.shape[1], first.shape[0], atrous_rates, norm_eps=norm_eps, norm_momentum=norm_momentum)
    return _filled(aspp, tensors, f"a pyramid with the atrous rates {list(atrous_rates)}")


def _aspp_names(tensors: Tensors, rates: int) -> dict[str, str]:
    """Our name of each module, by the layout that the tensors have."""
    if "branch1.0.weight" in tensors:
        layers = {f"branch{branch + 1}": f"branches.{branch}" for branch in range(rates + 1)}
        layers["conv_cat"] = "projection"
        modules = {f"{theirs}.0": f"{ours}.conv" for theirs, ours in layers.items()}
        modules |= {f"{theirs}.1": f"{ours}.norm" for theirs, ours in layers.items()}
        pooling = f"branch{rates + 2}"
        return modules | {f"{pooling}_conv": "image_pooling.conv", f"{pooling}_bn": "image_pooling.norm"}
    if "aspp1.atrous_conv.weight" in tensors:
        modules = {f"aspp{branch + 1}.atrous_conv": f"branches.{branch}.conv" for branch in range(rates + 1)}
        modules |= {f"aspp{branch + 1}.bn": f"branches.{branch}.norm" for branch in range(rates + 1)}
        modules |= {"global_avg_pool.1": "image_pooling.conv", "global_avg_pool.2": "image_pooling.norm"}
        return modules | {"conv1": "projection.conv", "bn1": "projection.norm"}
    modules = aspp_modules("aspp", "aspp", rates)
    return {theirs.removeprefix("aspp."): ours.removeprefix("aspp.") for theirs, ours in modules.items()}


def nonlocal_from_state_dict(
    state_dict: Tensors,
    *,
    mode: str = "embedded_gaussian",
    use_scale: bool | None = None,
    norm_eps: float = 1e-5,
    norm_momentum: float = 0.1,
) -> NonLocalBlock:
    """Build a `NonLocal1d`, `NonLocal2d` or `NonLocal3d` of ours from another code base's.

    Known are the names of mmcv (`g.conv`, `conv_out.conv`) and of Non-local_pytorch and those who follow it (`g`,
    `W.0`; also `W_z.0`), each also as sub-sampling changes them (`g.0`). The tensors tell dimensions, width,
    reduction, sub-sampling and norm, and contradict a wrong `mode` where they can: `embedded_gaussian` and
    `dot_product` have the same.

    Args:
        state_dict: The block's tensors, named from within it.
        mode: Pairwise function the block was built with.
        use_scale: Whether embedded Gaussian logits are scaled; None: as the code base does unless told otherwise,
            mmcv with a scale, the others without.
        norm_eps: Epsilon of the normalisation, where there is one.
        norm_momentum: Its momentum.

    Raises:
        ValueError: If tensors are missing, surplus or of another shape.
    """
    name = "A non-local block"
    tensors = _without_biases(rename(state_dict, _nonlocal_names(), name))
    value = require(tensors, "g.weight", name)
    block_class = {3: NonLocal1d, 4: NonLocal2d, 5: NonLocal3d}.get(value.dim())
    if block_class is None:
        raise ValueError(f"{name} has a weight of g of shape {list(value.shape)}: expected 3 to 5 dimensions.")
    block = block_class(
        in_channels=value.shape[1],
        reduction=max(1, value.shape[1] // value.shape[0]),
        use_scale="conv_out.conv.weight" in state_dict if use_scale is None else use_scale,
        mode=mode,
        sub_sample=any(key.startswith("g.0.") for key in state_dict),
        norm="batch" if "norm.weight" in tensors else None,
        norm_eps=norm_eps,
        norm_momentum=norm_momentum,
    )
    return _filled(block, tensors, f"a non-local block of mode {mode!r}")


def _nonlocal_names() -> dict[str, str]:
    layers = ("g", "theta", "phi", "concat_project")
    modules = {f"{layer}{form}": layer for layer in layers for form in ("", ".0", ".conv", ".0.conv")}
    for last in ("W", "W_z"):
        modules |= {last: "conv_out", f"{last}.0": "conv_out", f"{last}.1": "norm"}
    return modules | {"conv_out.conv": "conv_out", "conv_out.bn": "norm"}


def _without_biases(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Take the bias of each convolution before a batch normalisation into the running mean of that."""
    kept = dict(tensors)
    for key in tensors:
        layer, _, kind = key.rpartition(".")
        mean = f"{layer.rpartition('.')[0]}.norm.running_mean".removeprefix(".")
        if kind == "bias" and layer.rpartition(".")[2] in ("conv", "conv_out") and mean in kept:
            kept[mean] = kept[mean] - kept.pop(key)
    return kept


def _filled(layer: Layer, tensors: dict[str, torch.Tensor], source: str) -> Layer:
    counters = {key: value for key, value in layer.state_dict().items() if key.endswith("num_batches_tracked")}
    try:
        layer.load_state_dict(counters | tensors)
    except RuntimeError as error:
        raise ValueError(f"The tensors are not those of {source}: {error}") from error
    return layer
