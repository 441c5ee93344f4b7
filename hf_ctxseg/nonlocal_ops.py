"""Pairwise functions of the non-local operation: y_i = sum_j f(theta_i, phi_j) g_j / C.

Wang, Girshick, Gupta, He: "Non-local Neural Networks", arXiv 1711.07971, sections 3.1 and 3.2. Positions are rows:
theta (B, Q, D), phi (B, K, D), g (B, K, G). No mode builds the (B, Q, K) matrix of pairs where that is large: time and
memory of `dot_product` and `concatenation`, memory of the softmax modes grow with Q + K.

Everything is computed in float32 (float64 for float64), also under autocast: sums over hundreds of channels leave the
range of float16. The one exception are the softmax modes on CUDA, whose kernels take half precision and keep logits
and sums in float32 by themselves.
"""

from contextlib import nullcontext
from typing import Any, Literal, get_args

import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend

from .pairwise_relu import pairwise_relu
from .plain_formulas import only_once, plain_formulas

Mode = Literal["gaussian", "embedded_gaussian", "dot_product", "concatenation"]
MODES: tuple[str, ...] = get_args(Mode)

_PAIRS = 2**21  # held at a time by the softmax without a kernel; with fewer in all, none is needed
_SORTED_FROM = 2**18  # pairs: with fewer, the formula as written is faster than sorting


def nonlocal_attention(
    theta: torch.Tensor,
    phi: torch.Tensor,
    g: torch.Tensor,
    mode: str,
    scale: float = 1.0,
    projection: torch.Tensor | None = None,
    plain: bool = False,
) -> torch.Tensor:
    """Give each query the weighted sum of the values.

    Args:
        theta: Queries (B, Q, D).
        phi: Keys (B, K, D).
        g: Values (B, K, G).
        mode: One of `MODES`: softmax over the keys of theta · phi for `gaussian` and `embedded_gaussian`, theta · phi
            / K for `dot_product`, relu(projection · [theta, phi]) / K for `concatenation`.
        scale: Factor of the softmax's logits.
        projection: (2 D,), for `concatenation` only: the theta part, then the phi part.
        plain: Compute the formulas as written, with their matrix of pairs. The results are the same.

    Returns:
        (B, Q, G) in the type of `g`; what lies beyond the range of float16 is held at its end.

    Raises:
        ValueError: If the mode is unknown, or concatenation has no projection.
    """
    _check(mode, projection)
    with _full_precision(theta):
        if plain or plain_formulas():
            y = nonlocal_weights(theta, phi, mode, scale, projection) @ _widened(g)
        elif mode == "dot_product":
            y = _dot_product(_widened(theta), _widened(phi), _widened(g))
        elif projection is not None and mode == "concatenation":
            y = _concatenation(*_summands(_widened(theta), _widened(phi), projection), _widened(g))
        else:
            y = _softmax(theta, phi, g, scale)
        if g.dtype == torch.float16:  # an infinity times a zero weight of the next layer would be NaN
            limit = torch.finfo(torch.float16).max
            y = y.clamp(-limit, limit)
    return y.to(g.dtype)  # (B, Q, G)


def nonlocal_weights(
    theta: torch.Tensor,
    phi: torch.Tensor,
    mode: str,
    scale: float = 1.0,
    projection: torch.Tensor | None = None,
) -> torch.Tensor:
    """Give the weights with which `nonlocal_attention` sums the values, for the queries given.

    Args:
        theta: The chosen queries (B, Q, D): memory grows with Q * K.
        phi: Keys (B, K, D).
        mode: One of `MODES`.
        scale: Factor of the softmax's logits.
        projection: (2 D,), for `concatenation` only.

    Returns:
        (B, Q, K), float32 or float64. Each row sums to 1 in the softmax modes; dot products may be negative.

    Raises:
        ValueError: If the mode is unknown, or concatenation has no projection.
    """
    _check(mode, projection)
    with _full_precision(theta):
        queries, keys = _widened(theta), _widened(phi)
        if projection is not None and mode == "concatenation":
            a, b = _summands(queries, keys, projection)
            return F.relu(a.unsqueeze(2) + b.unsqueeze(1)) / keys.shape[1]  # (B, Q, K)
        products = queries @ keys.transpose(1, 2)  # (B, Q, K)
        return products / keys.shape[1] if mode == "dot_product" else (products * scale).softmax(dim=-1)


def _softmax(theta: torch.Tensor, phi: torch.Tensor, g: torch.Tensor, scale: float) -> torch.Tensor:
    dtype = torch.promote_types(torch.promote_types(theta.dtype, phi.dtype), g.dtype)
    if theta.device.type != "cuda":
        dtype = torch.promote_types(dtype, torch.float32)
    queries, keys, values = theta.to(dtype), phi.to(dtype), g.to(dtype)
    # A few pairs fit into a processor's cache, where the formula as written is faster than the kernel.
    few = not torch.compiler.is_compiling() and queries.shape[0] * queries.shape[1] * keys.shape[1] <= _PAIRS
    one_width = queries.shape[2] == values.shape[2]
    if queries.is_cuda or torch.compiler.is_compiling() or (one_width and not few):
        # One head (B, 1, rows, channels), whose rows have to lie together in memory.
        if not one_width and torch.compiler.is_compiling() and not queries.is_cuda:
            # The kernel for CPUs takes one width only: zeros change neither products nor sums.
            width = max(queries.shape[2], values.shape[2])
            padded = (F.pad(rows, (0, width - rows.shape[2])) for rows in (queries, keys, values))
            query, key, value = (rows.contiguous().unsqueeze(1) for rows in padded)
            y = F.scaled_dot_product_attention(query, key, value, scale=scale)
            return y.squeeze(1)[:, :, : values.shape[2]]  # (B, Q, G)
        query, key, value = (rows.contiguous().unsqueeze(1) for rows in (queries, keys, values))
        if _has_kernel(query, key, value, scale):
            return F.scaled_dot_product_attention(query, key, value, scale=scale).squeeze(1)  # (B, Q, G)
    queries, keys, values = _widened(queries), _widened(keys), _widened(values)
    if few:
        return (queries @ keys.transpose(1, 2) * scale).softmax(dim=-1) @ values
    return _ChunkedSoftmax.apply(queries, keys, values, scale)


def _has_kernel(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> bool:
    # Where no kernel takes the shapes or the device, scaled_dot_product_attention builds the matrix without a word.
    # Asked in advance rather than forbidden by `sdpa_kernel`, which would hold for all threads.
    if torch.compiler.is_compiling():
        return True
    if query.device.type not in ("cpu", "cuda"):
        return False
    return bool(torch._fused_sdp_choice(query, key, value, scale=scale) != SDPBackend.MATH.value)


class _ChunkedSoftmax(torch.autograd.Function):
    """softmax(scale * queries keys^T) values, for some queries at a time; the backward computes the weights again."""

    @staticmethod
    def forward(
        ctx: Any, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float
    ) -> torch.Tensor:
        y = values.new_empty(*queries.shape[:2], values.shape[2])
        highest, totals = queries.new_empty(2, *queries.shape[:2], 1)
        for part in _chunks(queries, keys):
            weights = _product(queries[:, part], keys.transpose(1, 2), scale)  # (B, chunk, K)
            highest[:, part] = weights.amax(dim=-1, keepdim=True)
            weights.sub_(highest[:, part]).exp_()
            totals[:, part] = weights.sum(dim=-1, keepdim=True)
            y[:, part] = (weights @ values).div_(totals[:, part])
        ctx.save_for_backward(queries, keys, values, y, highest, totals)
        ctx.scale = scale
        return y  # (B, Q, G)

    @staticmethod
    @only_once
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, None]:
        queries, keys, values, y, highest, totals = ctx.saved_tensors
        d_queries, d_keys, d_values = torch.empty_like(queries), torch.zeros_like(keys), torch.zeros_like(values)
        with _full_precision(queries):
            dy = dy / totals  # instead of the weights
            inner = (dy * y).sum(dim=-1, keepdim=True)
            for part in _chunks(queries, keys):
                weights = _product(queries[:, part], keys.transpose(1, 2), ctx.scale)  # (B, chunk, K)
                weights.sub_(highest[:, part]).exp_()
                d_values.baddbmm_(weights.transpose(1, 2), dy[:, part])
                d_logits = (dy[:, part] @ values.transpose(1, 2)).sub_(inner[:, part]).mul_(weights)
                d_queries[:, part] = _product(d_logits, keys, ctx.scale)
                d_keys.baddbmm_(d_logits.transpose(1, 2), queries[:, part], alpha=ctx.scale)
        return d_queries, d_keys, d_values, None


def _product(left: torch.Tensor, right: torch.Tensor, scale: float) -> torch.Tensor:
    return torch.baddbmm(left.new_empty(1, 1, 1), left, right, beta=0, alpha=scale)  # scale * left @ right


def _chunks(queries: torch.Tensor, keys: torch.Tensor) -> list[slice]:
    rows = max(1, _PAIRS // max(1, keys.shape[0] * keys.shape[1]))
    return [slice(start, start + rows) for start in range(0, queries.shape[1], rows)]


def _dot_product(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    # theta (phi^T g) is linear in the positions; where these are few, (theta phi^T) g takes fewer operations.
    (count, width), values_width = keys.shape[1:], values.shape[2]
    through_pairs = queries.shape[1] * count * (width + values_width)
    through_summary = (queries.shape[1] + count) * width * values_width
    if not torch.compiler.is_exporting() and through_pairs < through_summary:
        return queries @ keys.transpose(1, 2) @ (values / count)
    return queries @ (keys.transpose(1, 2) @ values / count)  # (B, Q, D) @ (B, D, G)


def _concatenation(a: torch.Tensor, b: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    count = values.shape[1]
    # ONNX has no search in a sorted list, and CUDA no running sums that are the same each time.
    deterministic = a.is_cuda and torch.are_deterministic_algorithms_enabled()
    if torch.compiler.is_exporting() or deterministic or a.shape[1] * count < _SORTED_FROM:
        return F.relu(a.unsqueeze(2) + b.unsqueeze(1)) @ (values / count)
    return pairwise_relu(a, b, values) / count


def _summands(
    queries: torch.Tensor, keys: torch.Tensor, projection: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    # The projection of a concatenation is a sum of two projections: no (B, 2 D, Q, K) tensor.
    # Columns, not vectors: onnxruntime 1.31 multiplies a transposed matrix with a vector wrongly.
    query_part, key_part = _widened(projection).reshape(2, -1, 1)
    return (queries @ query_part).squeeze(2), (keys @ key_part).squeeze(2)  # (B, Q), (B, K)


def _widened(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _full_precision(tensor: torch.Tensor) -> "torch.autocast | nullcontext[None]":
    kind = tensor.device.type
    if kind == "meta" or not torch.is_autocast_enabled(kind):  # the meta device has no autocast to ask about
        return nullcontext()
    return torch.autocast(kind, enabled=False)


def _check(mode: str, projection: torch.Tensor | None) -> None:
    if mode not in MODES:
        raise ValueError(f"mode is {mode!r}, but must be one of {', '.join(MODES)}.")
    if mode == "concatenation" and projection is None:
        raise ValueError("mode is 'concatenation', which needs a projection of length 2 * D: pass one.")
