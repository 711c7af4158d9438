"""The prediction: every part of a running model's memory, by what it is and where it lies."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from mopeq_edge.errors import SourceError
from mopeq_edge.gguf_file import GGUFHeader
from mopeq_edge.memory.allocate import CPU_ALIGNMENT, CUDA_ALIGNMENT, buffer_size
from mopeq_edge.memory.architectures import build_graph, is_exact
from mopeq_edge.memory.graph import Graph
from mopeq_edge.memory.kv_cache import KVCache, kv_cache
from mopeq_edge.memory.model import Model
from mopeq_edge.memory.overhead import CUDA_CONTEXT_BYTES, PROGRAM_FILE_BYTES, program_bytes
from mopeq_edge.memory.repack import Cpu
from mopeq_edge.memory.settings import Resolved, Settings, resolve
from mopeq_edge.memory.tower import LEFT_BYTES, TowerMemory
from mopeq_edge.memory.weights import place_weights
from mopeq_edge.memory.work_buffer import WorkBuffer

ANONYMOUS, MAPPED, GPU = "anonymous", "mapped", "gpu"
PLACES = (ANONYMOUS, MAPPED, GPU)
"""Memory of the process itself, pages of files, memory of the GPU (the same memory on unified devices)."""


@dataclass(frozen=True)
class Part:
    """One part, in bytes. ``droppable``: resident, but nothing reads it again, so the kernel can take it back."""

    name: str
    place: str
    nbytes: int
    droppable: bool = False
    estimated: bool = False


@dataclass(frozen=True)
class Prediction:
    """What a model takes at its peak: a full context and a whole batch in flight. Sizes in bytes.

    ``loading`` is the host's memory while the weights are read: then the whole file is mapped, but there is no cache
    yet. ``exact_graph``: the compute buffer is llama.cpp's to the byte, else an estimate.
    """

    parts: tuple[Part, ...]
    resolved: Resolved
    exact_graph: bool
    loading: int
    tower: int = 0
    """Memory of what sees pictures, which is gone before the model is loaded."""

    def total(self, *places: str) -> int:
        """Bytes in ``places``, or in all."""
        return sum(part.nbytes for part in self.parts if part.place in (places or PLACES))

    @property
    def host(self) -> int:
        """Resident in the host's memory while the model runs."""
        return self.total(ANONYMOUS, MAPPED)

    @property
    def peak(self) -> int:
        """The most that is resident in the host's memory, loading and seeing included."""
        return max(self.host, self.loading, self.tower)

    @property
    def droppable(self) -> int:
        return sum(part.nbytes for part in self.parts if part.droppable)

    @property
    def needed(self) -> int:
        """Host memory that has to be there for full speed: without the pages that nothing reads again."""
        return max(self.host - self.droppable, self.tower)

    @property
    def gpu(self) -> int:
        return self.total(GPU)

    def nbytes(self, name: str) -> int:
        """Bytes of the parts of that name."""
        return sum(part.nbytes for part in self.parts if part.name == name)

    def as_dict(self) -> dict[str, Any]:
        """Sizes in bytes."""
        return {
            "parts": [asdict(part) for part in self.parts],
            "settings": asdict(self.resolved),
            "exact_compute_buffer": self.exact_graph,
            "tower_bytes": self.tower,
            **{"host_bytes": self.host, "peak_bytes": self.peak, "needed_bytes": self.needed, "gpu_bytes": self.gpu},
            **{f"{place}_bytes": self.total(place) for place in PLACES},
        }


WEIGHTS_MAPPED = "weights, mapped"
WEIGHTS_UNREAD = "weights, mapped, copied elsewhere"
WEIGHTS_ALLOCATED = "weights, allocated"
WEIGHTS_REPACKED = "weights, repacked for the CPU"
WEIGHTS_GPU = "weights"
STAGING = "left of reading them"
CACHE, COMPUTE, OUTPUT = "KV cache", "compute buffer", "output buffer"
WORK, PROGRAM, LIBRARIES, VISION = "CPU work buffer", "llama.cpp itself", "program and libraries", "vision model"
PYTHON = "Python, for pictures"


def predict(
    model: Model,
    settings: Settings,
    cpu: Cpu,
    vision: tuple[GGUFHeader, ...] = (),
    tower: TowerMemory | None = None,
) -> Prediction:
    """What llama.cpp takes for ``model`` with ``settings`` on ``cpu``; ``vision`` is an mmproj file beside it.

    With a ``tower`` it runs in Python, behind what sees pictures.

    Raises :class:`MopeqError` for settings that llama.cpp refuses, and for a model whose numbers and tensors contradict
    each other.
    """
    try:
        return _predict(model, settings, cpu, vision, tower)
    except (ValueError, IndexError, TypeError, ArithmeticError) as error:
        # the graph follows the numbers of the file, of which not every contradiction has a check of its own
        raise SourceError(
            f"{model.name}: its numbers and the shapes of its tensors make no graph ({error}); convert the model again"
        ) from None


def _predict(
    model: Model, settings: Settings, cpu: Cpu, vision: tuple[GGUFHeader, ...], tower: TowerMemory | None
) -> Prediction:
    hparams = model.hparams
    resolved = resolve(settings, hparams)
    cache = kv_cache(hparams, settings, resolved)
    graphs = [
        build_graph(model, settings, resolved, cache, n_tokens, n_outputs)
        for n_tokens, n_outputs in dict.fromkeys(
            ((resolved.n_tokens, resolved.n_outputs), (resolved.n_seq, resolved.n_seq))
        )
    ]
    weights = place_weights(model, settings, cpu)
    on_gpu = settings.gpu_layers > 0
    parts = [
        Part(WEIGHTS_MAPPED, MAPPED, weights.mapped - weights.unread),
        Part(WEIGHTS_UNREAD, MAPPED, weights.unread, droppable=True),
        Part(WEIGHTS_ALLOCATED, ANONYMOUS, weights.allocated),
        Part(WEIGHTS_REPACKED, ANONYMOUS, weights.repacked),
        Part(STAGING, ANONYMOUS, weights.staging, estimated=True),
        Part(WEIGHTS_GPU, GPU, weights.gpu),
        *_cache_parts(cache, settings),
        *_compute_parts(graphs, settings, hparams.n_layer, is_exact(hparams.architecture)),
        Part(OUTPUT, ANONYMOUS, 4 * hparams.n_vocab * resolved.n_seq),
        Part(WORK, ANONYMOUS, work_bytes(model, graphs, settings, cpu)),
        Part(PROGRAM, ANONYMOUS, program_bytes(hparams, resolved, graphs[0]), estimated=True),
        Part(LIBRARIES, MAPPED, PROGRAM_FILE_BYTES, estimated=True),
    ]
    if on_gpu:
        parts.append(Part("CUDA itself", GPU, CUDA_CONTEXT_BYTES, estimated=True))
    if vision:
        nbytes = sum(tensor.nbytes for header in vision for tensor in header.tensors)
        parts.append(Part(VISION, GPU if on_gpu else ANONYMOUS, nbytes, estimated=True))
    if tower is not None:
        parts.append(Part(PYTHON, ANONYMOUS, LEFT_BYTES, estimated=True))
    program = sum(p.nbytes for p in parts if p.name in (PROGRAM, LIBRARIES, PYTHON))
    loading = program + weights.allocated + weights.repacked + (model.file_bytes if settings.mmap else 0)
    exact = is_exact(hparams.architecture) and not on_gpu
    seeing = 0 if tower is None else tower.nbytes
    return Prediction(tuple(p for p in parts if p.nbytes), resolved, exact, loading, seeing)


def _cache_parts(cache: KVCache, settings: Settings) -> list[Part]:
    n_layer = len(cache.layers)
    gpu = sum(c.nbytes for c in cache.layers if c.layer > n_layer - settings.gpu_layers)
    return [Part(CACHE, ANONYMOUS, cache.nbytes - gpu), Part(CACHE, GPU, gpu)]


def _compute_parts(graphs: list[Graph], settings: Settings, n_layer: int, exact: bool) -> list[Part]:
    """On a GPU as much as on the CPU, but for alignment; with some of the layers there both have a whole buffer.

    With all of them the CPU keeps the inputs and looks up the embedding.
    """
    host = max(buffer_size(graph, CPU_ALIGNMENT) for graph in graphs)
    if settings.gpu_layers <= 0:
        return [Part(COMPUTE, ANONYMOUS, host, estimated=not exact)]
    gpu = max(buffer_size(graph, CUDA_ALIGNMENT) for graph in graphs)
    if settings.gpu_layers > n_layer:
        host = max(sum(t.nbytes for t in (*graph.leafs, graph.nodes[0]) if not t.external) for graph in graphs)
    return [Part(COMPUTE, ANONYMOUS, host, estimated=True), Part(COMPUTE, GPU, gpu, estimated=True)]


def work_bytes(model: Model, graphs: list[Graph], settings: Settings, cpu: Cpu) -> int:
    """Bytes of the CPU's work buffer for the greediest of ``graphs``."""
    stacks = model.stacks()
    work = WorkBuffer(lambda weight: stacks.get(weight.name, ()), cpu, settings.threads, settings.repack)
    return max(work.size(graph) for graph in graphs)
