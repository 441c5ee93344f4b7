"""The switch for whoever doubts the fast forms: `CTXSEG_PLAIN=1` in the environment computes every formula as written.

Non-local operations then hold their matrix of pairs, loss and arg-max upsample the logits, atrous convolutions are
torch's own, and maps keep the memory format they come in. Results differ by rounding, time and memory by much more.
"""

import os

import torch


def plain_formulas() -> bool:
    """Whether the environment asks for the plain formulas; compiled models keep the form they were compiled with."""
    return not torch.compiler.is_compiling() and os.environ.get("CTXSEG_PLAIN", "0") not in ("", "0")
