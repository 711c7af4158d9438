"""How the C library keeps freed memory: what makes a stream of matrices fast, and as small as one of them.

By itself glibc gives back what is freed at the end of a heap at once, which costs a page fault for every page of the
next array, and keeps every hole, so that a process grows from block to block. Here it keeps what is freed while a block
computes, in one heap for all threads, and gives back all of it when the block is done.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8
"""Names of ``mallopt`` (glibc's malloc.h)."""

LARGE = 2**25
"""Bytes from which an allocation gets pages of its own, such as a stack of experts: the most that glibc takes."""
KEPT = 2**30
"""Free bytes at the end of the heap that are kept."""


def keep_freed_memory() -> None:
    """Have glibc keep what is freed until :func:`return_freed_memory`; where there is no glibc nothing is done."""
    for option, value in ((_M_MMAP_THRESHOLD, LARGE), (_M_TRIM_THRESHOLD, KEPT), (_M_ARENA_MAX, 1)):
        mallopt = _glibc("mallopt")
        if mallopt is not None:
            mallopt(option, value)


def return_freed_memory() -> None:
    """Give all freed pages back to the system."""
    trim = _glibc("malloc_trim")
    if trim is not None:
        trim(0)


@cache
def _glibc(name: str) -> Any:
    return getattr(ctypes.CDLL(None), name, None)
