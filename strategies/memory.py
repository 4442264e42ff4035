"""Memory that was freed, given back to the operating system."""

from __future__ import annotations

import contextlib
import ctypes

__all__ = ["release_free_memory"]


def release_free_memory() -> None:
    """Return freed memory at once where the C library is glibc, which else keeps a model's tensors.

    Per thread it keeps what was freed for later; a server that averages in several threads then
    holds several models' worth of nothing.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
