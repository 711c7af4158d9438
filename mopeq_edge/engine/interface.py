"""What a stage asks of whoever runs its tasks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol, TypeVar

from mopeq_edge.ggml.library import Ggml
from mopeq_edge.source.model import Source

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class Tools:
    """What a task has where it runs: libggml, ``threads`` threads in ``pool``, and whom to tell of finished units."""

    ggml: Ggml
    pool: ThreadPoolExecutor
    threads: int
    advance: Callable[[float], None]


Work = Callable[[Source, T, Tools], R]
"""A task's function: importable by its name, and nothing but a function of its arguments and of what files hold. A task
may run twice, even at once, when a machine was taken for lost."""


class Engine(Protocol):
    """Runs tasks on one source."""

    @property
    def part_weights(self) -> int | None:
        """Weights of one task, at most (one matrix at least); None where tasks run in turn: a tensor is one task."""
        ...

    def map(
        self, work: Work[T, R], source: Source, tasks: Iterable[T], advance: Callable[[float], None]
    ) -> Iterator[tuple[int, R]]:
        """``work`` of every task: (number of the task, result), in the order in which they end.

        Tasks are taken from the iterator as they can be started. ``advance`` gets the units that tasks report.
        """
        ...
