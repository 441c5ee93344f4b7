"""Convolutions that spare products, for maps with the channels last in memory on a CPU.

At rate r a 3×3 kernel on a map of H×W cells meets the map with its outer taps in (H - r) / H of the rows only: with
DeepLabv3's rates of 12, 24 and 36 (Chen et al., arXiv 1706.05587, section 3.3) on 33×33 cells a third of the products
remain. The library leaves out the others in the forward of dense convolutions; here their backward does too, as a
product of matrices for each tap, and depthwise convolutions, whose library form is slow at large rates, are computed
row by row or, at small rates, as a convolution without a rate on every r-th cell. In inference, wide dense 3×3
convolutions with little padding go through Winograd's filtering, at small rates on every r-th cell too. All are exact.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from .plain_formulas import is_traced, only_once, plain_formulas, product
from .winograd import winograd_conv

_WORTH_SKIPPING = 0.9  # share of products outside the padding below which the backward tap by tap is faster
_LARGE, _OUTPUTS = 1 << 22, 64  # weights of a kernel that is taken in pieces, outputs of a piece
_BY_ROWS = 6  # rate from which depthwise convolution row by row is the fastest
# Winograd's filtering pays, in inference, from so many channels in and out and blocks of outputs, and up to this rate.
_WIDE, _BLOCKS, _TILED = 256, 128, 4


class FastConv2d(nn.Conv2d):
    """`nn.Conv2d` that chooses among equal ways to compute itself.

    The plain one is taken on GPUs, under autocast, in exports, for maps in another memory format, and wherever size or
    padding are not of the usual kind (odd kernel, stride 1, zeros that keep the size). The gradients of the others
    cannot be differentiated again.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Convolve `input` (B, in_channels, H, W) to (B, out_channels, H, W)."""
        is_depthwise = self.groups == self.in_channels == self.out_channels
        rate, size = self.dilation[0], self.kernel_size[0]
        if not self._keeps_size() or not (is_depthwise or self.groups == 1):
            return super().forward(input)
        if torch.compiler.is_exporting():
            return super().forward(input)
        if torch.compiler.is_compiling():
            if is_depthwise and rate >= _BY_ROWS and input.device.type == "cpu":
                return super().forward(input.contiguous()).contiguous(memory_format=torch.channels_last)
            return super().forward(input)
        if not _is_fast(input) or plain_formulas():
            return super().forward(input)
        trains = torch.is_grad_enabled() and (input.requires_grad or self.weight.requires_grad)
        if not is_depthwise:
            if not trains and self._suits_winograd(input):
                output = _winograd(input, self.weight, rate)
            elif trains and _live_share(input, self.weight, rate) < _WORTH_SKIPPING:
                output = _TapByTap.apply(input, self.weight, rate)
            else:
                output = _convolve(input, self.weight, rate)
        elif rate >= _BY_ROWS:
            output = _RowByRow.apply(input, self.weight, rate)
        elif rate > 1 and (trains or size > 3):
            output = _InTiles.apply(input, self.weight, rate)
        else:
            return super().forward(input)
        return output if self.bias is None else output + self.bias.view(-1, 1, 1)  # (B, out_channels, H, W)

    def _suits_winograd(self, x: torch.Tensor) -> bool:
        rate = self.dilation[0]
        blocks = x.shape[0] * rate**2
        for edge in x.shape[2:]:
            blocks *= -(-edge // (2 * rate))
        return (
            self.kernel_size == (3, 3)
            and min(self.in_channels, self.out_channels) >= _WIDE
            and rate <= min(_TILED, *x.shape[2:])
            and blocks >= _BLOCKS
            # Of the products outside the padding, 9 for a cell, it must spare a quarter.
            and 16 * blocks <= 0.75 * 9 * x.shape[0] * x.shape[2] * x.shape[3] * _live_share(x, self.weight, rate)
        )

    def _keeps_size(self) -> bool:
        size, rate = self.kernel_size[0], self.dilation[0]
        return (
            self.kernel_size == (size, size)
            and size % 2 == 1
            and self.dilation == (rate, rate)
            and self.stride == (1, 1)
            and self.padding == (rate * (size // 2), rate * (size // 2))
            and self.padding_mode == "zeros"
        )


def use_fast_convs(net: nn.Module) -> None:
    """Make the convolutions that can gain by it choose how to compute themselves; tensors keep their names."""
    for module in net.modules():
        if type(module) is nn.Conv2d and (max(module.dilation) > 1 or _is_wide(module)):
            module.__class__ = FastConv2d


def _is_wide(conv: nn.Conv2d) -> bool:
    return conv.kernel_size == (3, 3) and conv.stride == (1, 1) and min(conv.weight.shape[:2]) >= _WIDE


def _is_fast(x: torch.Tensor) -> bool:
    return (
        x.device.type == "cpu"
        and x.dtype in (torch.float32, torch.float64)
        and x.dim() == 4
        and x.numel() > 0
        and x.is_contiguous(memory_format=torch.channels_last)
        and not torch.is_autocast_enabled("cpu")
        and not is_traced()
    )


def _reach(x: torch.Tensor, weight: torch.Tensor, rate: int) -> tuple[int, int]:
    """How many rows and columns of the kernel, to either side of its centre, meet the map."""
    return tuple(min(weight.shape[-1] // 2, (edge - 1) // rate) for edge in x.shape[-2:])  # type: ignore[return-value]


def _live_share(x: torch.Tensor, weight: torch.Tensor, rate: int) -> float:
    share = 1.0
    for edge, reach in zip(x.shape[-2:], _reach(x, weight, rate), strict=True):
        share *= sum(edge - abs(step) * rate for step in range(-reach, reach + 1)) / (edge * weight.shape[-1])
    return share


def _convolve(x: torch.Tensor, weight: torch.Tensor, rate: int) -> torch.Tensor:
    """Dense convolution without the rows and columns of the kernel that never meet the map."""
    centre, (rows, columns) = weight.shape[-1] // 2, _reach(x, weight, rate)
    live = weight[:, :, centre - rows : centre + rows + 1, centre - columns : centre + columns + 1]
    # The library copies the weights twice, to other formats: a large kernel goes in pieces where nothing has to stay.
    in_pieces = live.numel() > _LARGE and not torch.is_grad_enabled()
    pieces = torch.split(live, _OUTPUTS) if in_pieces else (live,)
    maps = [F.conv2d(x, piece, padding=(rows * rate, columns * rate), dilation=rate) for piece in pieces]
    return torch.cat(maps, dim=1) if in_pieces else maps[0]  # (B, O, H, W)


def _steps(edge: int, reach: int, rate: int) -> Iterator[tuple[int, slice, slice]]:
    """Index in the kernel, the outputs that the tap adds to, and the inputs that it takes, along one edge."""
    for step in range(-reach, reach + 1):
        shift = step * rate
        yield step, slice(max(0, -shift), edge - max(0, shift)), slice(max(0, shift), edge + min(0, shift))


def _winograd(x: torch.Tensor, weight: torch.Tensor, rate: int) -> torch.Tensor:
    if rate == 1:
        return winograd_conv(x, weight)
    return _from_tiles(winograd_conv(_to_tiles(x, rate), weight), rate, x.shape)  # (B, O, H, W)


class _TapByTap(torch.autograd.Function):
    """Dense convolution whose backward multiplies, for each tap, only the part of the map that the tap meets."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, rate: int) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.rate = rate
        return _convolve(x, weight, rate)

    @staticmethod
    @only_once
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None]:
        x, weight = ctx.saved_tensors
        centre, (rows, columns) = weight.shape[-1] // 2, _reach(x, weight, ctx.rate)
        height, width = x.shape[-2:]
        cells, gradients = _cells(x), _cells(gradient)  # (B, H, W, I), (B, H, W, O)
        to_x = torch.zeros_like(cells) if ctx.needs_input_grad[0] else None
        to_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        for row, top, source_top in _steps(height, rows, ctx.rate):
            for column, left, source_left in _steps(width, columns, ctx.rate):
                tap = (..., centre + row, centre + column)
                outer = gradients[:, top, left]
                flat = outer.reshape(-1, weight.shape[0])  # (B * rows * columns, O)
                if to_x is not None:
                    to_x[:, source_top, source_left] += product(flat, weight[tap]).view(*outer.shape[:3], -1)
                if to_weight is not None:
                    inner = cells[:, source_top, source_left].reshape(-1, weight.shape[1])
                    to_weight[tap] = product(flat.t(), inner)
        return None if to_x is None else to_x.permute(0, 3, 1, 2), to_weight, None


class _RowByRow(torch.autograd.Function):
    """Depthwise convolution that adds up, row by row of the output, shifted rows of the input: they stay in cache."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, rate: int) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.rate = rate
        return _add_shifted_rows(x, weight, rate)

    @staticmethod
    @only_once
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None]:
        x, weight = ctx.saved_tensors
        gradient = gradient.contiguous(memory_format=torch.channels_last)
        to_x = _add_shifted_rows(gradient, weight.flip(2, 3), ctx.rate) if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:
            return to_x, None, None
        centre, (rows, columns) = weight.shape[-1] // 2, _reach(x, weight, ctx.rate)
        height, width = x.shape[-2:]
        cells, gradients = _cells(x), _cells(gradient)  # (B, H, W, C)
        taps = x.new_zeros(*weight.shape[-2:], x.shape[1])  # (k, k, C)
        held = torch.empty_like(cells[:, 0])  # (B, W, C)
        for row, top, _ in _steps(height, rows, ctx.rate):
            for y in range(top.start, top.stop):
                source = cells[:, y + row * ctx.rate]
                for column, left, source_left in _steps(width, columns, ctx.rate):
                    torch.mul(gradients[:, y, left], source[:, source_left], out=held[:, left])
                    taps[centre + row, centre + column] += held[:, left].sum((0, 1))
        return to_x, taps.permute(2, 0, 1).unsqueeze(1), None


def _add_shifted_rows(x: torch.Tensor, weight: torch.Tensor, rate: int) -> torch.Tensor:
    output = torch.empty_like(x, memory_format=torch.channels_last)
    cells, sums, taps = _cells(x), _cells(output), weight[:, 0].permute(1, 2, 0).contiguous()  # (k, k, C)
    centre, (rows, columns) = weight.shape[-1] // 2, _reach(x, weight, rate)
    across = list(_steps(x.shape[3], columns, rate))
    across.sort(key=lambda step: step[0] != 0)  # the centre first: it alone writes the whole row
    for y in range(x.shape[2]):
        for row in sorted(range(-rows, rows + 1), key=abs):
            source = y + row * rate
            if not 0 <= source < x.shape[2]:
                continue
            for column, left, source_left in across:
                tap = taps[centre + row, centre + column]
                if row == column == 0:
                    torch.mul(cells[:, y], tap, out=sums[:, y])
                else:
                    sums[:, y, left].addcmul_(cells[:, source, source_left], tap)
    return output  # (B, C, H, W)


class _InTiles(torch.autograd.Function):
    """Depthwise convolution without a rate on the tiles that every rate-th row and column of the map make."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, rate: int) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.rate = rate
        tiles = F.conv2d(_to_tiles(x, rate), weight, padding=weight.shape[-1] // 2, groups=weight.shape[0])
        return _from_tiles(tiles, rate, x.shape)  # (B, C, H, W)

    @staticmethod
    @only_once
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None]:
        x, weight = ctx.saved_tensors
        pad = [weight.shape[-1] // 2] * 2
        tiles, gradients = _to_tiles(x, ctx.rate), _to_tiles(gradient, ctx.rate)
        wanted = [*ctx.needs_input_grad[:2], False]
        to_tiles, to_weight, _ = torch.ops.aten.convolution_backward(
            gradients, tiles, weight, None, [1, 1], pad, [1, 1], False, [0, 0], weight.shape[0], wanted
        )
        return _from_tiles(to_tiles, ctx.rate, x.shape) if wanted[0] else None, to_weight, None


def _to_tiles(x: torch.Tensor, rate: int) -> torch.Tensor:
    """Give every rate-th cell, from each of the rate * rate first ones, as a map of its own, filled with zeros."""
    count, channels, height, width = x.shape
    down, right = -height % rate, -width % rate
    cells = _cells(F.pad(x, (0, right, 0, down)) if down or right else x)
    tiles = cells.view(count, (height + down) // rate, rate, (width + right) // rate, rate, channels)
    tiles = tiles.permute(0, 2, 4, 1, 3, 5)  # (B, rate, rate, h, w, C)
    return tiles.flatten(0, 2).permute(0, 3, 1, 2)  # (B * rate * rate, C, h, w)


def _from_tiles(tiles: torch.Tensor, rate: int, shape: torch.Size) -> torch.Tensor:
    height, width = shape[-2:]
    cells = _cells(tiles)
    cells = cells.view(-1, rate, rate, *cells.shape[1:]).permute(0, 3, 1, 4, 2, 5)  # (B, h, rate, w, rate, C)
    cells = cells.flatten(3, 4).flatten(1, 2)[:, :height, :width]  # (B, H, W, C)
    return cells.permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)  # (B, C, H, W)


def _cells(x: torch.Tensor) -> torch.Tensor:
    """Give a map (B, C, H, W) as contiguous (B, H, W, C): with the channels last in memory, the same memory."""
    return x.permute(0, 2, 3, 1).contiguous()
