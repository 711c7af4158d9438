"""Bytes as people write them: GB is 1e9 bytes, GiB is 2**30."""

from __future__ import annotations

GB = 10**9
GIB = 2**30


def format_bytes(n: int) -> str:
    """``n`` bytes for a table, in GB, MB or kB (powers of ten), e.g. ``8.500 MB``."""
    for size, unit in ((GB, "GB"), (10**6, "MB"), (10**3, "kB")):
        if n >= size:
            return f"{n / size:.3f} {unit}"
    return f"{n} B"


def plural(n: int, word: str) -> str:
    """``3 tensors``, ``1 tensor``."""
    return f"{n} {word}" if n == 1 else f"{n} {word}s"
