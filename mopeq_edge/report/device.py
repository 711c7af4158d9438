"""Memory in llama.cpp at several contexts, on CPUs of two kinds: the report must not depend on where it is made."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from mopeq_edge.errors import MopeqError
from mopeq_edge.ggml.types import BY_NAME, F16
from mopeq_edge.gguf_file import GGUFHeader
from mopeq_edge.memory.command import command_line
from mopeq_edge.memory.model import model_of_gguf
from mopeq_edge.memory.predict import CACHE, COMPUTE, predict
from mopeq_edge.memory.repack import Cpu
from mopeq_edge.memory.settings import Settings

CPUS: dict[str, Cpu] = {
    "ARM, as in Jetson Orin": Cpu("aarch64", frozenset({"asimddp"})),
    "x86 with AVX2": Cpu("x86_64", frozenset({"avx", "avx2"})),
}
CONTEXTS = (2048, 4096, 8192, 16384, 32768, 65536, 131072)
THREADS = 4


@dataclass(frozen=True)
class MemoryAt:
    """Bytes of one slot of llama-server: ``needed`` to run at full speed, ``peak`` while loading or running."""

    cpu: str
    n_ctx: int
    cache_type: str
    needed: int
    peak: int
    cache: int
    compute: int


@dataclass(frozen=True)
class Memory:
    """``command`` starts the first of ``rows``."""

    rows: tuple[MemoryAt, ...]
    command: str

    def as_dict(self) -> dict[str, Any]:
        return {"command": self.command, "rows": [asdict(row) for row in self.rows], "threads": THREADS}


def memory(headers: tuple[GGUFHeader, ...], name: str) -> Memory:
    """At the contexts that the model was trained for, with the cache in F16 and, where llama.cpp takes it, Q8_0.

    Raises :class:`MopeqError` for a model whose memory cannot be predicted.
    """
    model = model_of_gguf(headers)
    most = model.hparams.n_ctx_train
    contexts = [n for n in CONTEXTS if n < most] + ([most] if most > 0 else list(CONTEXTS[:1]))
    rows = []
    for label, cpu in CPUS.items():
        for n_ctx in contexts:
            for kind in (F16, BY_NAME["Q8_0"]):
                settings = Settings(ctx=n_ctx, parallel=1, cache_type_k=kind, cache_type_v=kind, threads=THREADS)
                try:
                    found = predict(model, settings, cpu)
                except MopeqError:
                    if kind is F16:
                        raise
                    # heads that are no whole blocks: llama.cpp refuses that cache
                    continue
                cache, compute = found.nbytes(CACHE), found.nbytes(COMPUTE)
                rows.append(MemoryAt(label, n_ctx, kind.name, found.needed, found.peak, cache, compute))
    command = command_line(name, Settings(ctx=contexts[0], parallel=1, threads=THREADS))
    return Memory(tuple(rows), command)
