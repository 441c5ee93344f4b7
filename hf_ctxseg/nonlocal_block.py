"""Non-local blocks for sequences, pictures and videos, as layers of their own.

Wang, Girshick, Gupta, He: "Non-local Neural Networks", arXiv 1711.07971, section 3.3: z = x + W_z y, where y sums what
every position holds, weighted by a pairwise function. W_z starts at zero, so that a block put into a trained network
leaves it as it was. The keys of the state dict do not depend on `sub_sample`, since pooling has no parameters.
"""

from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn import functional as F

from .configuration_ctxseg import NONLOCAL_MODES, check_choice, check_number
from .layers import BatchNorm2d
from .nonlocal_ops import nonlocal_attention, nonlocal_weights

_ORDERS = ("conv_first", "pool_first")


class NonLocalBlock(nn.Module):
    """Base of the non-local blocks; use `NonLocal1d`, `NonLocal2d` or `NonLocal3d`.

    Args:
        in_channels: Channels of input and output.
        reduction: The embeddings have in_channels // reduction channels.
        use_scale: Divide the logits of `embedded_gaussian` by the square root of the embeddings' channels. The paper
            has no such scale, the authors' code does it by default.
        mode: Pairwise function: `gaussian`, `embedded_gaussian`, `dot_product` or `concatenation` (section 3.2).
        sub_sample: Max-pool keys and values by 2, in `NonLocal3d` over height and width only; a dimension of size 1
            stays.
        norm: "batch" for batch normalisation after the last convolution, which has no bias then; None for none.
        zeros_init: Start as the identity: the norm's weight is 0, or without a norm the last convolution.
        norm_eps: Epsilon of the normalisation.
        norm_momentum: Share of the new batch in the running statistics.
        sub_sample_order: Pool after the convolutions ("conv_first", as mmcv) or before ("pool_first", as the authors'
            code); the results differ.

    Shape:
        input (B, in_channels, *positions), output the same

    Raises:
        ValueError: If an argument is outside what is allowed.
    """

    conv_class: ClassVar[type[nn.Conv1d] | type[nn.Conv2d] | type[nn.Conv3d]]
    norm_class: ClassVar[type[nn.BatchNorm1d] | type[nn.BatchNorm2d] | type[nn.BatchNorm3d]]
    pool_size: ClassVar[tuple[int, ...]]  # of each dimension, where sub-sampled

    def __init__(
        self,
        in_channels: int,
        reduction: int = 2,
        use_scale: bool = True,
        mode: str = "embedded_gaussian",
        sub_sample: bool = False,
        norm: str | None = None,
        zeros_init: bool = True,
        norm_eps: float = 1e-5,
        norm_momentum: float = 0.1,
        sub_sample_order: str = "conv_first",
    ) -> None:
        super().__init__()
        for name, number in (("in_channels", in_channels), ("reduction", reduction)):
            check_number(name, number, 1, float("inf"), int)
        check_choice("mode", mode, NONLOCAL_MODES)
        check_choice("sub_sample_order", sub_sample_order, _ORDERS)
        if norm not in (None, "batch"):
            raise ValueError(f"norm is {norm!r}, but must be 'batch' or None.")
        inter_channels = max(in_channels // reduction, 1)
        self.config: Any = None  # of the model that the block is part of, if any
        self.in_channels, self.mode, self.zeros_init = in_channels, mode, zeros_init
        self.sub_sample, self.sub_sample_order = sub_sample, sub_sample_order
        self.scale = inter_channels**-0.5 if use_scale and mode == "embedded_gaussian" else 1.0
        self.g = self.conv_class(in_channels, inter_channels, 1)
        if mode != "gaussian":
            self.theta = self.conv_class(in_channels, inter_channels, 1)
            self.phi = self.conv_class(in_channels, inter_channels, 1)
        if mode == "concatenation":  # applied to the plane of pairs, whatever the dimension of the positions
            self.concat_project = nn.Conv2d(2 * inter_channels, 1, 1, bias=False)
        self.conv_out = self.conv_class(inter_channels, in_channels, 1, bias=norm is None)
        self.norm = self.norm_class(in_channels, eps=norm_eps, momentum=norm_momentum) if norm else None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self, init: Any = nn.init) -> None:
        """Draw the weights anew.

        Args:
            init: Module of the drawing functions; transformers' own leave alone what it has loaded.
        """
        for module in self.children():
            if isinstance(module, self.norm_class):
                init.ones_(module.weight)
                init.zeros_(module.bias)
                init.zeros_(module.running_mean)
                init.ones_(module.running_var)
                init.zeros_(module.num_batches_tracked)
            else:
                init.normal_(module.weight, std=0.01)
                if module.bias is not None:
                    init.zeros_(module.bias)
        if self.zeros_init:
            init.zeros_(self.conv_out.weight if self.norm is None else self.norm.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Add to each position of `x` (B, in_channels, *positions) what it takes from all of them."""
        theta, phi = self._queries_and_keys(x)
        g = _rows(self._pooled(self.g, x))  # (B, K, inter_channels)
        plain = getattr(self.config, "_attn_implementation", None) == "eager"
        y = nonlocal_attention(theta, phi, g, self.mode, self.scale, self._projection, plain)
        y = y.transpose(1, 2).reshape(x.shape[0], y.shape[2], *x.shape[2:])  # (B, inter_channels, *positions)
        y = self.conv_out(y)
        return x + (y if self.norm is None else self.norm(y))

    def weights_of(self, x: torch.Tensor, queries: torch.Tensor) -> torch.Tensor:
        """Give the weights with which chosen positions sum what the others hold.

        Args:
            x: Input of the block (B, in_channels, *positions).
            queries: Indices (Q,) of positions, counted row by row.

        Returns:
            (B, Q, *positions of the keys), float32 or float64; with `sub_sample` there are fewer keys than positions.
        """
        theta, phi = self._queries_and_keys(x)
        weights = nonlocal_weights(theta[:, queries], phi, self.mode, self.scale, self._projection)
        kernel = self._kernel(x)
        keys = [size // step for size, step in zip(x.shape[2:], kernel, strict=True)]
        return weights.reshape(*weights.shape[:2], *keys)  # (B, Q, *positions of the keys)

    def _queries_and_keys(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        dimensions = len(self.pool_size)
        if x.dim() != dimensions + 2 or x.shape[1] != self.in_channels:
            raise ValueError(
                f"{type(self).__name__} got a tensor of shape {tuple(x.shape)}, but takes (batch, {self.in_channels}) "
                f"and {dimensions} dimension{'s' if dimensions > 1 else ''} of positions."
            )
        if self.mode == "gaussian":
            return _rows(x), _rows(self._pooled(None, x))
        return _rows(self.theta(x)), _rows(self._pooled(self.phi, x))  # (B, Q, inter_channels), (B, K, ...)

    def _pooled(self, conv: nn.Module | None, x: torch.Tensor) -> torch.Tensor:
        if not self.sub_sample:
            return x if conv is None else conv(x)
        pool = (F.max_pool1d, F.max_pool2d, F.max_pool3d)[len(self.pool_size) - 1]
        if conv is not None and self.sub_sample_order == "conv_first":
            return pool(conv(x), self._kernel(x))
        pooled = pool(x, self._kernel(x))
        return pooled if conv is None else conv(pooled)

    def _kernel(self, x: torch.Tensor) -> list[int]:
        if not self.sub_sample:
            return [1] * len(self.pool_size)
        return [step if size > 1 else 1 for step, size in zip(self.pool_size, x.shape[2:], strict=True)]

    @property
    def _projection(self) -> torch.Tensor | None:
        return self.concat_project.weight.flatten() if self.mode == "concatenation" else None

    def extra_repr(self) -> str:
        """Say what the sub-modules do not show."""
        return f"mode={self.mode}, sub_sample={self.sub_sample}, sub_sample_order={self.sub_sample_order}"


class NonLocal1d(NonLocalBlock):
    """Non-local block over sequences; arguments as `NonLocalBlock`.

    Shape:
        input (B, in_channels, L), output the same
    """

    conv_class = nn.Conv1d
    norm_class = nn.BatchNorm1d
    pool_size = (2,)


class NonLocal2d(NonLocalBlock):
    """Non-local block over pictures; arguments as `NonLocalBlock`.

    Shape:
        input (B, in_channels, H, W), output the same
    """

    conv_class = nn.Conv2d
    norm_class = BatchNorm2d
    pool_size = (2, 2)


class NonLocal3d(NonLocalBlock):
    """Non-local block over videos; arguments as `NonLocalBlock`.

    Shape:
        input (B, in_channels, T, H, W), output the same
    """

    conv_class = nn.Conv3d
    norm_class = nn.BatchNorm3d
    pool_size = (1, 2, 2)


def _rows(maps: torch.Tensor) -> torch.Tensor:
    return maps.flatten(2).transpose(1, 2)  # (B, positions, channels)
