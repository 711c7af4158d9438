"""How long work reports its progress, without knowing who shows it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

BYTES = "bytes"
"""The unit of a step that counts bytes: its rate is shown as kB/s, MB/s or GB/s."""


class Step(Protocol):
    """One piece of long work with a known total."""

    def advance(self, amount: float = 1.0) -> None:
        """Add ``amount`` units of finished work. Safe to call from any thread."""


class Progress(Protocol):
    """Where stages report to. The CLI gives one that draws bars; the default is silent."""

    @contextmanager
    def step(self, title: str, total: float | None, unit: str = "") -> Iterator[Step]:
        """Open a step of ``total`` units under ``title``; it ends with the block.

        ``total`` is None where the end cannot be told before. ``unit`` is what is counted, in the plural ("windows"),
        :data:`BYTES`, or nothing where a rate would say nothing.
        """
        yield _SilentStep()

    def note(self, message: str) -> None:
        """Say one line that a user should see (a warning, a choice that was made)."""


class _SilentStep:
    def advance(self, amount: float = 1.0) -> None:
        pass


class SilentProgress:
    """Reports to nobody."""

    @contextmanager
    def step(self, title: str, total: float | None, unit: str = "") -> Iterator[Step]:
        yield _SilentStep()

    def note(self, message: str) -> None:
        pass
