"""How the C library keeps freed memory: what makes a stream of blocks stay as small as one block."""

from __future__ import annotations

import ctypes

_M_MMAP_THRESHOLD = -3
"""``mallopt``'s name for the size from which an allocation gets pages of its own (glibc's malloc.h)."""

LARGE = 2**20


def return_large_blocks() -> None:
    """Have glibc give allocations of a mebibyte or more back to the system when they are freed.

    By itself it raises that size with what it sees, up to 32 MiB, so that matrices and activations come from heaps
    whose holes it keeps, and a process grows from block to block. Where there is no such call nothing is done.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, LARGE)
