"""Sums y_i = sum_j relu(a_i + b_j) g_j in O(N log N), where the plain formula takes O(N^2).

The pairwise function of a non-local concatenation (Wang, Girshick, Gupta, He: "Non-local Neural Networks", arXiv
1711.07971, section 3.2) comes to relu(a_i + b_j). For query i the keys with b_j > -a_i are active, and these come
first where the keys are sorted by falling b. With S0 and S1, the running sums of g and b * g in that order, and k_i
active keys, y_i = a_i S0[k_i] + S1[k_i]. The gradients are sums of the same kind: da_i = dy_i · S0[k_i]; with T0 and
T1, the running sums of dy and a * dy over the queries sorted by falling a, and m_j active queries,
dg_j = b_j T0[m_j] + T1[m_j] and db_j = g_j · T0[m_j].
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch.nn import functional as F

from .plain_formulas import only_once

_ROWS = 16  # in a block of rows; the best of 16, 32 and 64
_CHANNELS = 64  # taken at a time: memory stays a few times rows * _CHANNELS


def pairwise_relu(a: torch.Tensor, b: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
    """Sum the values with the weights relu(a_i + b_j), without a matrix of pairs.

    Args:
        a: What the queries add (B, Q), float32 or float64 as the others.
        b: What the keys add (B, K).
        g: Values (B, K, G).

    Returns:
        (B, Q, G). The gradient is relu's, 0 for a pair whose sum is 0. It cannot be differentiated again.
    """
    if 0 in (*a.shape, *g.shape):
        return F.relu(a.unsqueeze(2) + b.unsqueeze(1)) @ g
    return _PairwiseReLU.apply(a, b, g)


class _PairwiseReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: torch.Tensor, b: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(a, b, g)
        near_a, near_b = _centred(a, b)
        keys = _RunningSums(a, b, near_b)
        y = g.new_empty(*a.shape, g.shape[-1])  # (B, Q, G)
        for part in _channels(g):
            y[..., part] = keys.at_seekers(keys.table(g[..., part].contiguous()), near_a)
        return y

    @staticmethod
    @only_once
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        a, b, g = ctx.saved_tensors
        near_a, near_b = _centred(a, b)
        keys, queries = _RunningSums(a, b), _RunningSums(b, a, near_a)
        da, db, dg = torch.zeros_like(a), torch.zeros_like(b), torch.empty_like(g)
        with torch.autocast(g.device.type, enabled=False):
            for part in _channels(g):
                some_dy, some_g = dy[..., part].contiguous(), g[..., part].contiguous()
                da += (some_dy * keys.at_seekers(keys.table(some_g))).sum(-1)
                table = queries.table(some_dy)
                db += (some_g * queries.at_seekers(table)).sum(-1)
                dg[..., part] = queries.at_seekers(table, near_b)
        return da, db, dg


class _RunningSums:
    """Running sums over the sought, sorted by falling value, up to the last one whose sum with a seeker is above 0.

    Sums within blocks of rows come from one small matrix product per block, those of whole blocks from their running
    sum: several times faster than a running sum along all rows.

    Args:
        seekers: Values (B, Q).
        sought: Values (B, K).
        factors: (B, K); given, sums of factor times row are kept beside the sums of the rows.
    """

    def __init__(self, seekers: torch.Tensor, sought: torch.Tensor, factors: torch.Tensor | None = None) -> None:
        batch, count = sought.shape
        self.batch, self.blocks, self.kinds = batch, -(-count // _ROWS), 1 if factors is None else 2
        rising, order = (-sought).sort(dim=-1)
        counts = torch.searchsorted(rising, seekers.contiguous())  # (B, Q), of those with -sought < seeker
        sample = torch.arange(batch, device=sought.device).unsqueeze(1)
        # The last block is filled up with rows that come after all others: no sum that is asked for holds them.
        self.order = (F.pad(order, (0, self.blocks * _ROWS - count)) + sample * count).flatten()
        self.products = sought.new_ones(_ROWS, _ROWS).tril().expand(batch * self.blocks, -1, -1)
        if factors is not None:
            weighted = self.products * factors.flatten()[self.order].view(-1, 1, _ROWS)
            self.products = torch.cat([self.products, weighted], dim=1)  # (B * blocks, 2 * _ROWS, _ROWS)
        self.any = (counts > 0).flatten().to(sought.dtype)
        last = (counts - 1).clamp_(min=0)
        block = (last // _ROWS + sample * self.blocks) * self.kinds
        places = (block * _ROWS + last % _ROWS, block + batch * self.blocks * self.kinds * _ROWS)
        self.places = torch.stack(places, dim=-1).flatten(0, 1)  # (B * Q, 2), rows of the table

    def table(self, rows: torch.Tensor) -> torch.Tensor:
        """Give the sums within the blocks of rows (B, K, C), then those of all blocks before each: (places, C).

        It is several times faster where each row lies together in memory.
        """
        width, blocks = rows.shape[-1], self.batch * self.blocks
        rows = rows.flatten(0, 1).index_select(0, self.order).view(blocks, _ROWS, width)
        table = rows.new_empty(blocks * self.kinds * (_ROWS + 1), width)
        within, before = table.tensor_split([blocks * self.kinds * _ROWS])
        torch.bmm(self.products, rows, out=within.view(blocks, -1, width))
        totals = within.view(self.batch, self.blocks, self.kinds, _ROWS, width)[:, :, :, -1]
        before = before.view(totals.shape)
        before[:, :1] = 0
        before[:, 1:] = totals[:, :-1].cumsum(1)
        return table

    def at_seekers(self, table: torch.Tensor, factors: torch.Tensor | None = None) -> torch.Tensor:
        """Give each seeker its sum (B, Q, C); with factors (B, Q), factor times this, plus its sum of the second kind.

        A sum is that of two rows of the table, picked and added in one go.
        """
        places, weights = self.places, self.any.unsqueeze(1).expand(-1, 2)
        if factors is not None:
            second = places + places.new_tensor([_ROWS, 1])
            places = torch.cat([places, second], dim=1)  # (B * Q, 4)
            weights = torch.cat([weights * factors.flatten().unsqueeze(1), weights], dim=1)
        sums = F.embedding_bag(places, table, mode="sum", per_sample_weights=weights.contiguous())
        return sums.view(self.batch, -1, table.shape[1])  # (B, Q, C)


def _centred(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    # The same relu(a_i + b_j), but neither a common offset nor what no partner reaches swallows the digits of b.
    b = torch.maximum(b, -a.amax(dim=-1, keepdim=True))
    mean = b.mean(dim=-1, keepdim=True)
    return a + mean, b - mean


def _channels(g: torch.Tensor) -> Iterator[slice]:
    return (slice(start, start + _CHANNELS) for start in range(0, g.shape[-1], _CHANNELS))
