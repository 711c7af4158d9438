"""Every matrix of a finished file, and where its bytes are; experts by their router ids, whatever the layout."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from mopeq_edge.expert_groups.layout import group_name, map_name
from mopeq_edge.expert_groups.read import is_part, read_groups
from mopeq_edge.ggml.types import GgmlType
from mopeq_edge.gguf_file import KV, GGUFHeader, TensorInfo
from mopeq_edge.source.file_bytes import read_bytes
from mopeq_edge.source.roles import projection_of

Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Matrix:
    """One matrix of a tensor: an expert, a head, or all of it. ``tensor`` is its name in a stock file.

    ``number`` is the router id of an expert. ``place`` is set for an expert in a group: the group's tensor, and its row
    there.
    """

    tensor: str
    number: int
    n_in: int
    n_out: int
    n_matrices: int
    type: GgmlType
    path: Path
    start: int
    """In bytes from the beginning of the file."""
    place: tuple[str, int] | None = None

    @property
    def row_bytes(self) -> int:
        return self.type.nbytes(self.n_in)

    @property
    def nbytes(self) -> int:
        return self.row_bytes * self.n_out

    @property
    def is_expert(self) -> bool:
        return projection_of(self.tensor) is not None

    @property
    def label(self) -> str:
        """``expert 5 of blk.1.ffn_up_exps.weight``, or the tensor's name where it is one matrix."""
        if self.is_expert:
            return f"expert {self.number} of {self.tensor}"
        return self.tensor if self.n_matrices == 1 else f"matrix {self.number} of {self.tensor}"

    @property
    def where(self) -> str:
        """Where an expert in a group is, for the end of a sentence; else nothing."""
        if self.place is None:
            return ""
        return f" (row {self.place[1]} of {self.place[0]}, by {map_name(self.tensor)})"

    def read(self, first: int, n_rows: int) -> Bytes:
        """Rows from ``first`` on as bytes [n_rows, row_bytes]."""
        raw = read_bytes(self.path, self.start + first * self.row_bytes, n_rows * self.row_bytes)
        return raw.reshape(n_rows, self.row_bytes)

    def read_rows(self, rows: npt.NDArray[np.int64]) -> Bytes:
        """The given rows [len(rows), row_bytes], sorted."""
        runs = np.split(rows, np.flatnonzero(np.diff(rows) != 1) + 1)
        return np.concatenate([self.read(int(run[0]), len(run)) for run in runs])


@dataclass(frozen=True)
class StoredModel:
    """A finished file: key-values of the first part, and the matrices of every tensor by its name in a stock file."""

    path: Path
    kvs: Mapping[str, KV]
    tensors: Mapping[str, tuple[Matrix, ...]]

    @property
    def matrices(self) -> tuple[Matrix, ...]:
        return tuple(matrix for matrices in self.tensors.values() for matrix in matrices)

    @property
    def architecture(self) -> str | None:
        kv = self.kvs.get("general.architecture")
        return kv.value if kv is not None and isinstance(kv.value, str) else None

    def number(self, key: str) -> int:
        """The whole number under ``ARCHITECTURE.key``, 0 if there is none."""
        kv = self.kvs.get(f"{self.architecture}.{key}")
        return kv.value if kv is not None and isinstance(kv.value, int) else 0


def stored_model(headers: Sequence[GGUFHeader]) -> StoredModel:
    """The matrices of the file, or files, with these headers. Raises :class:`FormatError` for broken groups."""
    tensors: dict[str, tuple[Matrix, ...]] = {}
    places = {info.name: (header, info) for header in headers for info in header.tensors}
    for name, (header, info) in places.items():
        if not is_part(name):
            tensors[name] = tuple(_matrices(header, info, name))
    for stack in read_groups(*headers):
        experts: dict[int, Matrix] = {}
        for g, group in enumerate(stack.groups):
            header, info = places[group_name(stack.name, g)]
            for row, matrix in enumerate(_matrices(header, info, stack.name)):
                own = group.experts[row]
                experts[own] = _moved(matrix, own, stack.shape[2], (info.name, row))
        tensors[stack.name] = tuple(experts[e] for e in sorted(experts))
    return StoredModel(headers[0].path, headers[0].kvs, tensors)


def _matrices(header: GGUFHeader, info: TensorInfo, name: str) -> list[Matrix]:
    n_in, n_out = info.shape[0], math.prod(info.shape[1:2])
    n_matrices = math.prod(info.shape[2:])
    start, size = header.data_start + info.offset, info.type.nbytes(n_in) * n_out
    return [
        Matrix(name, i, n_in, n_out, n_matrices, info.type, header.path, start + i * size) for i in range(n_matrices)
    ]


def _moved(matrix: Matrix, number: int, n_matrices: int, place: tuple[str, int]) -> Matrix:
    own = matrix
    return Matrix(own.tensor, number, own.n_in, own.n_out, n_matrices, own.type, own.path, own.start, place)
