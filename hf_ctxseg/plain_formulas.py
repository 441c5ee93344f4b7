"""The switch for whoever doubts the fast forms: `CTXSEG_PLAIN=1` in the environment computes every formula as written.

Non-local operations then hold their matrix of pairs, losses and arg-max upsample the logits, convolutions are torch's
own, atrous ones and those by Winograd's filtering alike, and maps keep the memory format they come in. Results differ
by rounding, time and memory by much more. Beside the switch lies what the fast forms share.
"""

import os
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch


def plain_formulas() -> bool:
    """Whether the environment asks for the plain formulas; compiled models keep the form they were compiled with."""
    return not torch.compiler.is_compiling() and os.environ.get("CTXSEG_PLAIN", "0") not in ("", "0")


def is_traced() -> bool:
    """Whether `torch.jit.trace` records, which would keep the form that suits the example."""
    return bool(torch.jit.is_tracing())  # type: ignore[attr-defined, no-untyped-call]


def product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """The product of two matrices in their own type; a backward pass may be called under autocast."""
    with torch.autocast(left.device.type, enabled=False):
        return left @ right


def only_once(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Refuse to record a backward pass for a second derivative, whose terms would be lost without a word.

    torch's `once_differentiable` notices it only where the incoming gradient has a history; that of a loss has none.
    """

    @wraps(backward)
    def guarded(ctx: Any, *gradients: torch.Tensor) -> Any:
        if torch.is_grad_enabled():  # so in a backward pass under create_graph=True alone
            raise RuntimeError(
                "This fast form has no second derivative: set CTXSEG_PLAIN=1 in the environment, which computes the "
                "formulas as written, or leave out create_graph=True."
            )
        return backward(ctx, *gradients)

    return guarded
