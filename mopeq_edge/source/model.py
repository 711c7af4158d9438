"""What every stage sees of a checkpoint: named tensors that are read one piece at a time."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from mopeq_edge.errors import SourceError
from mopeq_edge.ggml.types import GgmlType
from mopeq_edge.gguf_file import KV
from mopeq_edge.source.roles import Role, layer_of, projection_of, role_of

SMALL_MATRIX = 2**17
"""Weights up to which a matrix is read whole for some of its rows: one read instead of many (and a head's matrix of
latent attention, which is stored transposed, cannot be read in part)."""

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class SourceTensor:
    """One tensor under its GGUF name; ``shape`` is ggml's ``ne``: [n_in, n_out, n_expert]."""

    name: str
    shape: tuple[int, ...]
    type: GgmlType
    """How the source stores it (for a Hugging Face checkpoint: how llama.cpp's converter would)."""
    mtp: bool = False
    """Whether its block predicts further tokens: no text runs through it, so nothing is known of its matrices."""

    @property
    def role(self) -> Role:
        found = role_of(self.name)
        return Role.MTP if self.mtp and found not in (Role.NORM, Role.ROUTER) else found

    @property
    def layer(self) -> int | None:
        return layer_of(self.name)

    @property
    def projection(self) -> str | None:
        return None if self.mtp else projection_of(self.name)

    @property
    def n_in(self) -> int:
        return self.shape[0]

    @property
    def n_out(self) -> int:
        return self.shape[1] if len(self.shape) > 1 else 1

    @property
    def n_matrices(self) -> int:
        """Experts of a stack; 1 for every other tensor."""
        return self.shape[2] if len(self.shape) > 2 else 1

    @property
    def n_weights(self) -> int:
        return self.n_in * self.n_out * self.n_matrices

    @property
    def nbytes(self) -> int:
        return self.type.nbytes(self.n_weights)

    @property
    def quantizable(self) -> bool:
        """Whether llama.cpp would quantize it: matrices, but no norms, routers or biases."""
        return len(self.shape) > 1 and self.name.endswith(".weight") and self.role not in (Role.NORM, Role.ROUTER)


@dataclass(frozen=True)
class MoeShape:
    """Numbers of a Mixture-of-Experts model."""

    n_layer: int
    n_expert: int
    n_expert_used: int


class Source(Protocol):
    """A model that can be read lazily. Nothing is kept in memory but names and shapes.

    Both reads check what they give: a NaN or an infinity raises :class:`SourceError` that names the
    tensor and the expert.
    """

    @property
    def path(self) -> Path: ...

    @property
    def kind(self) -> str:
        """``huggingface`` or ``gguf``."""
        ...

    @property
    def architecture(self) -> str:
        """GGUF architecture, e.g. ``olmoe``."""
        ...

    @property
    def kvs(self) -> Mapping[str, KV]:
        """Key-values of the GGUF that this model becomes, tokenizer included, in writing order."""
        ...

    @property
    def tensors(self) -> tuple[SourceTensor, ...]:
        """In writing order."""
        ...

    @property
    def warnings(self) -> tuple[str, ...]:
        """What the user should know about this source, a line each."""
        ...

    @property
    def files(self) -> tuple[Path, ...]:
        """Every file that is read: what may not be overwritten and what a hash of the source covers."""
        ...

    def read(self, tensor: SourceTensor, matrix: int = 0, rows: slice | None = None) -> Floats:
        """Weights as float32 [n_rows, n_in] of one expert (``matrix``) of a stack, or of a tensor."""
        ...

    def read_stored(self, tensor: SourceTensor, matrix: int = 0, rows: slice | None = None) -> Bytes:
        """The same part in the bytes of ``tensor.type``: [n_rows, row bytes]."""
        ...


def moe_shape(source: Source) -> MoeShape:
    """Layers and experts from the key-values. Raises :class:`SourceError` for a dense model."""
    arch = source.architecture

    def number(key: str) -> int:
        kv = source.kvs.get(f"{arch}.{key}")
        return int(kv.value) if kv is not None and isinstance(kv.value, int) else 0

    shape = MoeShape(number("block_count"), number("expert_count"), number("expert_used_count"))
    if shape.n_expert < 2 or not any(t.role is Role.EXPERT for t in source.tensors):
        raise SourceError(
            f"{source.path}: a dense model ({arch}, no experts found); mopeq-edge is for Mixture-of-Experts "
            "models, use llama-quantize for this one"
        )
    return shape


def mark_mtp(tensors: Iterable[SourceTensor], architecture: str, kvs: Mapping[str, KV]) -> tuple[SourceTensor, ...]:
    """``tensors`` with those marked that are in the last blocks, ``nextn_predict_layers`` of ``block_count``."""
    n_block, n_further = (kvs.get(f"{architecture}.{key}") for key in ("block_count", "nextn_predict_layers"))
    if n_block is None or n_further is None or not all(isinstance(kv.value, int) for kv in (n_block, n_further)):
        return tuple(tensors)
    first = n_block.value - n_further.value
    return tuple(replace(t, mtp=True) if t.layer is not None and t.layer >= first else t for t in tensors)


def read_rows(source: Source, tensor: SourceTensor, matrix: int, rows: npt.NDArray[np.integer[Any]]) -> Floats:
    """The given rows [len(rows), n_in], sorted; runs of neighbours are read in one piece, a small matrix whole."""
    if tensor.n_in * tensor.n_out <= SMALL_MATRIX:
        found: Floats = source.read(tensor, matrix)[rows]
        return found
    breaks = np.flatnonzero(np.diff(rows) != 1) + 1
    runs = np.split(rows, breaks)
    return np.concatenate([source.read(tensor, matrix, slice(int(r[0]), int(r[-1]) + 1)) for r in runs])


def magnitude(values: Floats) -> float:
    """The largest |value|; 0 for none."""
    return float(max(values.max(), -values.min())) if values.size else 0.0


def require_finite(values: Floats, path: Path, tensor: SourceTensor, matrix: int) -> Floats:
    """``values``, or :class:`SourceError` naming tensor and expert if one is NaN or infinite."""
    if np.isfinite(values).all():
        return values
    bad = int(np.count_nonzero(~np.isfinite(values)))
    where = f", expert {matrix}" if tensor.role is Role.EXPERT else ""
    raise SourceError(
        f"{path}: tensor '{tensor.name}'{where}: {bad} of {values.size} weights are NaN or infinite; "
        "the checkpoint is damaged, download it again"
    )
