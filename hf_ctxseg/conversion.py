"""Weights of other codebases under our names: what the converters share.

A converter takes a peer's state dict and what the dict cannot say (rates, strides, corner alignment), and gives a
configuration and a state dict of ours whose model computes the same. None reads a file, copies a tensor that it only
renames, or needs the peer. What a peer does that a model of ours cannot do is refused, as is a tensor too many or too
few.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from transformers import AutoModelForSemanticSegmentation

from .configuration_ctxseg import CtxSegConfig
from .wording import listed_tensors

ConfigT = TypeVar("ConfigT", bound=CtxSegConfig)
Tensors = Mapping[str, torch.Tensor]

BACKBONE = "model.backbone._backbone"
HEAD = "model.decode_head"


@dataclass
class Conversion:
    """What a converter makes of a checkpoint.

    Args:
        config: Configuration of ours; labels are in its `id2label` where the checkpoint names them.
        tensors: State dict in our names.
        preprocessing: Fields of `CtxSegImageProcessor` that the network was trained with, as far as known.
        notes: Sentences for the model card: what was carried over, what the checkpoint does not tell.
    """

    config: CtxSegConfig
    tensors: dict[str, torch.Tensor]
    preprocessing: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def rename(tensors: Tensors, modules: Mapping[str, str], source: str) -> dict[str, torch.Tensor]:
    """Move tensors to other modules.

    Args:
        tensors: A peer's state dict.
        modules: Our name of each module of the peer; a module that is not named moves with the one it lies in.
        source: What the tensors are, for the message.

    Raises:
        ValueError: If a tensor lies in none of the modules, or comes to lie where another does, with the list.
    """
    renamed, surplus = {}, []
    for key, value in tensors.items():
        module = key.rpartition(".")[0]
        while module and module not in modules:
            module = module.rpartition(".")[0]
        name = modules.get(module, "") + key.removeprefix(module)
        if module and name not in renamed:
            renamed[name] = value
        else:
            surplus.append(key)
    if surplus:
        raise ValueError(f"{source} has no place for {listed_tensors(surplus)}: remove them if they take no part.")
    return renamed


def checked(config: ConfigT, tensors: Tensors, source: str) -> tuple[ConfigT, dict[str, torch.Tensor]]:
    """Give both as they are if the configuration's model consists of exactly these tensors.

    Args:
        config: A configuration of ours.
        tensors: A state dict in our names; counters of batches that old files lack are added, as torch does.
        source: What the tensors were, for the message.

    Raises:
        ValueError: If tensors are missing, are too many, have another shape or are not finite, with the list.
    """
    with torch.device("meta"):
        expected = AutoModelForSemanticSegmentation.from_config(config).state_dict()
    counters = (key for key in expected if key.endswith(".num_batches_tracked"))
    tensors = {key: torch.tensor(0) for key in counters} | dict(tensors)
    findings = []
    if missing := [key for key in expected if key not in tensors]:
        findings.append(f"lacks {listed_tensors(missing)}")
    if surplus := [key for key in tensors if key not in expected]:
        findings.append(f"has no place for {listed_tensors(surplus)}")
    if wrong := [
        f"{key} {list(tensors[key].shape)} instead of {list(value.shape)}"
        for key, value in expected.items()
        if key in tensors and tensors[key].shape != value.shape
    ]:
        findings.append(f"has other shapes: {listed_tensors(wrong)}")
    if broken := [
        key
        for key, value in tensors.items()
        if not value.is_meta and value.is_floating_point() and not value.isfinite().all()
    ]:
        findings.append(f"has values that are not finite in {listed_tensors(broken)}")
    if findings:
        raise ValueError(
            f"{source} does not fit a {config.model_type} model with the backbone {config.backbone!r}: it "
            f"{'; it '.join(findings)} (in our names). Check what was given beside the weights."
        )
    return config, tensors


def require(tensors: Tensors, key: str, source: str) -> torch.Tensor:
    """Give the tensor of this name; raises `ValueError`, with the names there are, if it is missing."""
    if key not in tensors:
        raise ValueError(f"{source} needs a tensor {key!r}, but was given {listed_tensors(tensors)}.")
    return tensors[key]


def aspp_modules(theirs: str, ours: str, rates: int, separable: bool = False) -> dict[str, str]:
    """The modules of torchvision's ASPP, which smp shares, under our names.

    Args:
        theirs: Name of the peer's ASPP.
        ours: Name of ours.
        rates: Number of dilated branches.
        separable: Whether the dilated branches are a depthwise and a pointwise convolution each.
    """
    modules = {
        f"{theirs}.convs.{rates + 1}.1": f"{ours}.image_pooling.conv",
        f"{theirs}.convs.{rates + 1}.2": f"{ours}.image_pooling.norm",
        f"{theirs}.project.0": f"{ours}.projection.conv",
        f"{theirs}.project.1": f"{ours}.projection.norm",
    }
    for branch in range(rates + 1):
        layer, name = f"{theirs}.convs.{branch}", f"{ours}.branches.{branch}"
        if separable and branch > 0:
            modules |= separable_modules(layer, name)
        else:
            modules |= {f"{layer}.0": f"{name}.conv", f"{layer}.1": f"{name}.norm"}
    return modules


def separable_modules(theirs: str, ours: str) -> dict[str, str]:
    """The modules of smp's separable convolution and the normalisation after it, under our names."""
    return {
        f"{theirs}.0.0": f"{ours}.depthwise",
        f"{theirs}.0.1": f"{ours}.pointwise.conv",
        f"{theirs}.1": f"{ours}.pointwise.norm",
    }


def check_rates(rates: Iterable[int], projection: torch.Tensor, source: str) -> list[int]:
    """Give the rates as a list, if there is one for each dilated branch.

    Args:
        rates: The rates.
        projection: Weight (C, C * branches, 1, 1) of what follows the branches: the dilated ones, 1×1 and pooling.
        source: What the rates belong to, for the message.

    Raises:
        ValueError: If there are more or fewer.
    """
    rates, dilated = list(rates), projection.shape[1] // projection.shape[0] - 2
    if len(rates) != dilated:
        raise ValueError(f"{source} was given the atrous rates {rates}, but its ASPP has {dilated} dilated branches.")
    return rates
