"""Tasks in this process, one after the other; each has all the threads."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

from mopeq_edge.engine.interface import R, T, Tools, Work
from mopeq_edge.ggml.library import Ggml
from mopeq_edge.source.model import Source


class LocalEngine:
    """``threads`` threads and one libggml."""

    part_weights = None

    def __init__(self, threads: int, ggml: Ggml) -> None:
        self._threads, self._ggml = threads, ggml

    def map(
        self, work: Work[T, R], source: Source, tasks: Iterable[T], advance: Callable[[float], None]
    ) -> Iterator[tuple[int, R]]:
        with ThreadPoolExecutor(self._threads) as pool:
            tools = Tools(self._ggml, pool, self._threads, advance)
            for number, task in enumerate(tasks):
                yield number, work(source, task, tools)
