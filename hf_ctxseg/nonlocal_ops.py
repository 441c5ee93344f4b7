"""Pairwise functions of the non-local operation: y_i = sum_j f(theta_i, phi_j) g_j / C.

Wang, Girshick, Gupta, He: "Non-local Neural Networks", arXiv 1711.07971, sections 3.1 and 3.2. Positions are rows:
theta (B, Q, D), phi (B, K, D), g (B, K, G). Everything is computed in float32 (float64 for float64), also under
autocast: sums over hundreds of channels leave the range of float16.
"""

from contextlib import nullcontext
from typing import Literal, get_args

import torch
from torch.nn import functional as F

Mode = Literal["gaussian", "embedded_gaussian", "dot_product", "concatenation"]
MODES: tuple[str, ...] = get_args(Mode)


def nonlocal_attention(
    theta: torch.Tensor,
    phi: torch.Tensor,
    g: torch.Tensor,
    mode: str,
    scale: float = 1.0,
    projection: torch.Tensor | None = None,
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

    Returns:
        (B, Q, G) in the type of `g`; what lies beyond the range of float16 is held at its end.

    Raises:
        ValueError: If the mode is unknown, or concatenation has no projection.
    """
    _check(mode, projection)
    with _full_precision(theta):
        queries, keys, values = _widened(theta), _widened(phi), _widened(g)
        if mode == "dot_product":
            y = _dot_product(queries, keys, values)
        elif projection is not None and mode == "concatenation":
            y = _pairwise_relu(queries, keys, projection) @ (values / values.shape[1])
        else:
            y = _softmax(queries, keys, values, scale)
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
            return _pairwise_relu(queries, keys, projection) / keys.shape[1]
        products = queries @ keys.transpose(1, 2)  # (B, Q, K)
        return products / keys.shape[1] if mode == "dot_product" else (products * scale).softmax(dim=-1)


def _softmax(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float) -> torch.Tensor:
    # One head. The kernels without a Q × K matrix need rows that lie together in memory.
    query, key, value = (rows.contiguous().unsqueeze(1) for rows in (queries, keys, values))  # (B, 1, rows, channels)
    return F.scaled_dot_product_attention(query, key, value, scale=scale).squeeze(1)  # (B, Q, G)


def _dot_product(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    # theta (phi^T g): linear in the positions, and never dearer than the convolutions that made theta, phi and g.
    summary = (keys / keys.shape[1]).transpose(1, 2) @ values  # (B, D, G)
    return queries @ summary


def _pairwise_relu(queries: torch.Tensor, keys: torch.Tensor, projection: torch.Tensor) -> torch.Tensor:
    # The projection of a concatenation is a sum of two projections: no (B, 2 D, Q, K) tensor.
    # Columns, not vectors: onnxruntime 1.31 multiplies a transposed matrix with a vector wrongly.
    query_part, key_part = _widened(projection).reshape(2, -1, 1)
    return F.relu(queries @ query_part + (keys @ key_part).transpose(1, 2))  # (B, Q, K)


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
