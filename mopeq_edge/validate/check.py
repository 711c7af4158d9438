"""What a check says."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any


class Names(IntEnum):
    """What the message of a failed check puts its finger on; the more specific, the higher."""

    FILE = 0
    TENSOR = 1
    """Or a key, or a layer."""
    EXPERT = 2
    BLOCK = 3
    """Or rows."""


@dataclass(frozen=True)
class Check:
    """One thing that was looked at. ``passed`` is None where it was left out, and ``message`` then says why.

    ``value`` is what was found and ``threshold`` what it was compared with, None where there is no number.
    """

    name: str
    looked_at: str
    value: float | None
    threshold: float | None
    passed: bool | None
    message: str
    names: Names = Names.FILE

    def as_dict(self) -> dict[str, Any]:
        """Plain values; numbers that JSON has no word for are strings."""
        return {
            "name": self.name,
            "looked_at": self.looked_at,
            "value": _plain(self.value),
            "threshold": _plain(self.threshold),
            "passed": self.passed,
            "message": self.message,
        }


def skipped(name: str, looked_at: str, reason: str) -> Check:
    """A check that was left out, because of ``reason``."""
    return Check(name, looked_at, None, None, None, reason)


def failed(checks: Iterable[Check]) -> list[Check]:
    """Those that did not pass, the most specific first."""
    return sorted((c for c in checks if c.passed is False), key=lambda check: -check.names)


def shortened(names: Sequence[object], most: int = 8) -> str:
    """``a, b and 5 more``"""
    shown = ", ".join(str(name) for name in names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"


def count_matrices(n: int) -> str:
    """``1 matrix``, ``3 matrices``"""
    return "1 matrix" if n == 1 else f"{n} matrices"


def _plain(number: float | None) -> float | str | None:
    return number if number is None or math.isfinite(number) else str(number)
