"""The largest file that a device has room for: what its memory leaves beside cache, buffers and program."""

from __future__ import annotations

from dataclasses import dataclass, replace

from mopeq_edge.errors import PlanError
from mopeq_edge.ggml.types import BY_NAME, GgmlType
from mopeq_edge.memory.model import Model, StoredTensor
from mopeq_edge.memory.predict import (
    WEIGHTS_ALLOCATED,
    WEIGHTS_GPU,
    WEIGHTS_MAPPED,
    WEIGHTS_REPACKED,
    WEIGHTS_UNREAD,
    Prediction,
    predict,
)
from mopeq_edge.memory.repack import Cpu
from mopeq_edge.memory.settings import Settings
from mopeq_edge.source.model import SourceTensor
from mopeq_edge.units import format_bytes

HEADROOM = 0.05
"""Share of the device's memory that stays free: predictions are right to 3 %."""

TRIED_TYPES = ("Q2_K", "Q3_K", "Q4_K", "Q8_0", "F16")
"""The work buffer depends on the types of the weights; the greediest of these and the model's own counts."""

_WEIGHTS = (WEIGHTS_MAPPED, WEIGHTS_UNREAD, WEIGHTS_ALLOCATED, WEIGHTS_REPACKED, WEIGHTS_GPU)


@dataclass(frozen=True)
class FileBudget:
    """Bytes. ``budget``: the largest file. ``rest``: everything but weights. ``headroom``: what stays free."""

    memory: int
    budget: int
    rest: int
    headroom: int

    def sentence(self) -> str:
        """How the budget comes about."""
        return (
            f"{format_bytes(self.memory)} of memory, less {format_bytes(self.rest)} for cache, buffers and program and "
            f"{format_bytes(self.headroom)} that stay free: a file of at most {self.budget:,} bytes"
        )


def file_budget(
    model: Model, settings: Settings, cpu: Cpu, memory: int, headroom: float = HEADROOM, beside: int = 0
) -> FileBudget:
    """The largest file of ``model``, in whatever types, that runs with ``settings`` in ``memory`` bytes.

    ``beside``: bytes that are taken at the same time by something else.

    ``model`` may be stored in any types. Every weight counts once: copies that llama.cpp makes for the CPU leave pages
    of the file behind that nothing reads again. With layers on a GPU, ``memory`` is what both share. Raises
    :class:`PlanError` if there is no room for any file.
    """
    kept = int(memory * headroom)
    variants = [model, *(_in_type(model, BY_NAME[name]) for name in TRIED_TYPES)]
    rest = max(_rest(predict(variant, settings, cpu), variant) for variant in variants) + beside
    budget = memory - kept - rest
    if budget <= 0:
        raise PlanError(
            f"{model.name}: {memory:,} bytes of memory leave no room for weights: cache, buffers and program take "
            f"{rest:,} with a context of {settings.ctx or model.hparams.n_ctx_train}, {kept:,} stay free; "
            "ask for a smaller context or a smaller cache type"
        )
    return FileBudget(memory, budget, rest, kept)


def _rest(found: Prediction, model: Model) -> int:
    """What is needed beside the file: also an embedding that is there a second time as the output."""
    weights = sum(found.nbytes(name) for name in _WEIGHTS) - found.droppable
    return found.needed + found.gpu - weights + max(0, weights - model.file_bytes)


def _in_type(model: Model, kind: GgmlType) -> Model:
    """The model with every matrix in ``kind`` that it fits."""
    tensors = tuple(replace(t, type=kind) if _is_matrix(t) and kind.fits(t.shape[0]) else t for t in model.tensors)
    before, after = (sum(t.nbytes for t in some) for some in (model.tensors, tensors))
    return replace(model, tensors=tensors, file_bytes=model.file_bytes + after - before)


def _is_matrix(tensor: StoredTensor) -> bool:
    return not tensor.is_map and SourceTensor(tensor.name, tensor.shape, tensor.type).quantizable
