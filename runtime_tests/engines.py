"""llama.cpp as a library or as llama-server, one at a time: a device may not have the memory for two."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mopeq_edge.binding import UBATCH, LlamaModel
from mopeq_edge.device_report.build import Build
from mopeq_edge.errors import MopeqError
from mopeq_edge.runtime.server import Server, serving
from runtime_tests.prompts import SLOTS


@dataclass(frozen=True)
class Setup:
    """The file under test and how it is run; ``n_ctx`` tokens for every sequence."""

    model: Path
    build: Build
    n_ctx: int
    n_threads: int
    n_gpu_layers: int

    def server_arguments(self, slots: int) -> list[str]:
        """Options of llama-server for so many sequences."""
        numbers = {"-c": slots * self.n_ctx, "--parallel": slots, "-t": self.n_threads, "-ngl": self.n_gpu_layers}
        # a cache of earlier prompts would be in the measured memory
        words = ["-m", str(self.model), "--cache-ram", "0"]
        return words + [str(word) for pair in numbers.items() for word in pair]


class Engines:
    """Whatever was opened last stays open until something else is asked for."""

    def __init__(self, setup: Setup, folder: Path) -> None:
        self._setup, self._folder = setup, folder
        self._stack = ExitStack()
        self._key: tuple[object, ...] = ()
        self._open: LlamaModel | Server | None = None
        self._errors: dict[tuple[object, ...], MopeqError] = {}

    def library(self, *, plain: bool = False, n_batch: int = UBATCH) -> LlamaModel:
        """The model in this process; ``plain``: where one token and many are computed in nearly the same way."""
        key = ("library", plain, n_batch)
        if self._key != key:
            setup = self._setup
            options: dict[str, Any] = {"n_threads": setup.n_threads, "n_gpu_layers": setup.n_gpu_layers}
            self._start(
                key, lambda: LlamaModel(setup.model, n_ctx=setup.n_ctx, n_batch=n_batch, plain=plain, **options)
            )
        assert isinstance(self._open, LlamaModel)
        return self._open

    def server(self) -> Server:
        """llama-server with :data:`SLOTS` slots."""
        if self._key != ("server",):
            program = self._setup.build.tool("llama-server")
            assert program is not None
            arguments, log = self._setup.server_arguments(SLOTS), self._folder / "llama-server.log"
            self._start(("server",), lambda: serving(program, arguments, log))
        assert isinstance(self._open, Server)
        return self._open

    def _start(self, key: tuple[object, ...], make: Callable[[], AbstractContextManager[LlamaModel | Server]]) -> None:
        """What failed once is not tried again: the same error comes at once."""
        self.close()
        if key in self._errors:
            raise self._errors[key]
        try:
            self._open = self._stack.enter_context(make())
        except MopeqError as error:
            self._errors[key] = error
            raise
        self._key = key

    def close(self) -> None:
        """Free whatever is open."""
        self._key, self._open = (), None
        self._stack.close()
