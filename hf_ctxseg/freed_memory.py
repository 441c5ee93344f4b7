"""Freed memory that stays with the process, for training on CPUs."""

import ctypes
import os

# malloc.h of the GNU C library: which freed memory goes back to the system, and which blocks are always mapped anew.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4


def keep_freed_memory() -> None:
    """Have the GNU C library, where there is one, keep what a step frees for the next one.

    It maps large blocks anew each time, filled with zeros: a third of the time of a training step. Environment
    variables for malloc (mallopt(3)) are respected.
    """
    if any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ):
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library or system
        return
    mallopt(_MMAP_MAX, 0)
    mallopt(_TRIM_THRESHOLD, -1)
    mallopt(_TOP_PAD, 1 << 28)
