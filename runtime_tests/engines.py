"""llama.cpp as a library or as llama-server, one at a time: a device may not have the memory for two."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from mopeq_edge.binding import UBATCH, LlamaModel
from mopeq_edge.device_report.build import Build
from mopeq_edge.errors import MopeqError
from mopeq_edge.runtime.server import Server, ServerError, serving
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
        self._server_error: MopeqError | None = None

    def library(self, *, plain: bool = False, n_batch: int = UBATCH) -> LlamaModel:
        """The model in this process; ``plain``: where one token and many are computed in nearly the same way."""
        key = ("library", plain, n_batch)
        if self._key != key:
            self.close()
            setup = self._setup
            self._open = self._stack.enter_context(
                LlamaModel(
                    setup.model,
                    n_ctx=setup.n_ctx,
                    n_batch=n_batch,
                    n_threads=setup.n_threads,
                    n_gpu_layers=setup.n_gpu_layers,
                    plain=plain,
                )
            )
            self._key = key
        assert isinstance(self._open, LlamaModel)
        return self._open

    def server(self) -> Server:
        """llama-server with :data:`SLOTS` slots. What kept it from starting is raised again at once."""
        if self._server_error is not None:
            raise self._server_error
        if self._key != ("server",):
            self.close()
            program = self._setup.build.tool("llama-server")
            assert program is not None
            arguments = self._setup.server_arguments(SLOTS)
            try:
                self._open = self._stack.enter_context(serving(program, arguments, self._folder / "llama-server.log"))
            except ServerError as error:
                self._server_error = error
                raise
            self._key = ("server",)
        assert isinstance(self._open, Server)
        return self._open

    def close(self) -> None:
        """Free whatever is open."""
        self._key, self._open = (), None
        self._stack.close()
