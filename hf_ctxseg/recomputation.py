"""Gradient checkpointing: blocks of backbone and head compute their activations again for the gradient.

Chen, Xu, Zhang, Guestrin: "Training Deep Nets with Sublinear Memory Cost", arXiv 1604.06174. Batch normalisations
count each batch once, as without it: the second computation moves copies of their statistics.
"""

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import nn

from .backbone_edit import NONLOCAL_NAME

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def find_blocks(module: nn.Module, transparent: Collection[nn.Module] = ()) -> Iterator[nn.Module]:
    """Give the blocks within a module that are worth recomputing: those of two layers with weights or more.

    Args:
        module: What is searched; itself never a block.
        transparent: Modules, beside plain containers, that are searched instead of being blocks.
    """
    for child in module.children():
        if isinstance(child, _CONTAINERS) or child in transparent:
            yield from find_blocks(child, transparent)
        elif sum(any(True for _ in part.parameters(recurse=False)) for part in child.modules()) > 1:
            yield child
            if NONLOCAL_NAME in dict(child.named_children()):  # comes after the block, by a hook
                yield child.get_submodule(NONLOCAL_NAME)


def set_recomputation(
    blocks: Iterator[nn.Module], checkpoint: Callable[..., Any] | None, every_n_layers: int = 1
) -> int:
    """Have every n-th block recompute, the others not; give the number of blocks.

    Args:
        blocks: The blocks, shallow to deep.
        checkpoint: `torch.utils.checkpoint.checkpoint`, or one with its arguments; None: no block recomputes.
        every_n_layers: The n.
    """
    count = 0
    for count, block in enumerate(blocks, start=1):
        plain = type(block).__mro__[2] if isinstance(block, RecomputedBlock) else type(block)
        if checkpoint is not None and (count - 1) % every_n_layers == 0:
            block.__class__ = _recomputed(plain)
            block._checkpoint = checkpoint  # type: ignore[assignment]
        else:
            block.__class__ = plain
    return count


class RecomputedBlock(nn.Module):
    """What is put before the class of a block that recomputes; its tensors and their names stay."""

    gradient_checkpointing = True  # what transformers looks for
    _checkpoint: Callable[..., Any]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Do what the block does; in training without keeping what lies between its input and output."""
        compute = super().forward
        if not (self.training and torch.is_grad_enabled()):
            return compute(*args, **kwargs)
        given = _copied(args)  # DenseNet's lists grow later, HRNet's blocks write into theirs
        is_first = True

        def compute_once(*args: Any, **kwargs: Any) -> Any:
            nonlocal is_first
            if is_first:
                is_first = False
                return compute(*_copied(args), **kwargs)
            with _statistics_kept(self):
                return compute(*_copied(args), **kwargs)

        return self._checkpoint(compute_once, *given, **kwargs)


def _copied(args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(list(value) if isinstance(value, list) else value for value in args)


@cache
def _recomputed(plain: type[nn.Module]) -> type[nn.Module]:
    return type(plain.__name__, (RecomputedBlock, plain), {"__module__": plain.__module__})


@contextmanager
def _statistics_kept(block: nn.Module) -> Iterator[None]:
    """Lend the block copies of its buffers."""
    own = [(module, name, buffer) for module in block.modules() for name, buffer in module._buffers.items()]
    try:
        for module, name, buffer in own:
            module._buffers[name] = None if buffer is None else buffer.clone()
        yield
    finally:
        for module, name, buffer in own:
            module._buffers[name] = buffer
