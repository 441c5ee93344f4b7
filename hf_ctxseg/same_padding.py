"""TensorFlow's "same" padding in a form that can be exported for pictures of any size.

timm pads by max((ceil(x / s) - 1) * s + (k - 1) * d + 1 - x, 0), after which the length of each map is a nested
expression of that kind: torch.export takes minutes to reason about it, cannot save it, and the ONNX that came of it
gave other results at some sizes. Here the lengths stay those of ordinary padding and only a start depends on the size.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import torch
from torch.nn import functional as F


def pad_same(
    x: torch.Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int] = (1, 1),
    value: float = 0,
) -> torch.Tensor:
    """Pad for a convolution or pooling without padding of its own, as timm's function of this name does.

    Args:
        x: Maps (B, C, h, w).
        kernel_size: Of rows and columns.
        stride: The same.
        dilation: The same.
        value: What is padded with.

    Returns:
        Maps (B, C, h + (k - 1) * d, w + …): up to s - 1 last rows and columns lie outside every window.
    """
    for dim, size, step, rate in zip((2, 3), kernel_size, stride, dilation, strict=True):
        length, reach = x.shape[dim], (size - 1) * rate
        missing: Any = reach + 1 - step + (-length) % step
        if reach + 1 < step:
            missing = torch.sym_max(missing, 0)
        least, most = max(reach + 1 - step, 0) // 2, reach // 2  # of the first pad, whatever the length
        pads = (most, reach - least)
        x = F.pad(x, pads if dim == 3 else (0, 0, *pads), value=value)
        if most > least:
            first = most - missing // 2
            x = x.index_select(dim, torch.arange(length + reach, device=x.device) + first)
    return x


@contextmanager
def patch_same_padding() -> Iterator[None]:
    """Let timm's layers pad in this form for a while."""
    # imported by name: functions in timm.layers are named as their modules
    modules: list[Any] = [import_module(f"timm.layers.{name}") for name in ("conv2d_same", "pool2d_same", "std_conv")]
    originals = [module.pad_same for module in modules]
    try:
        for module in modules:
            module.pad_same = pad_same
        yield
    finally:
        for module, original in zip(modules, originals, strict=True):
            module.pad_same = original
