"""A file's weights against the source's: sampled rows of every matrix, the first and the last always among them."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import gguf
import gguf.quants
import numpy as np
import numpy.typing as npt

from mopeq_edge.errors import RuntimeMissingError
from mopeq_edge.ggml.library import load_ggml
from mopeq_edge.ggml.types import GgmlType
from mopeq_edge.progress import Progress
from mopeq_edge.source.model import Source, SourceTensor, read_rows
from mopeq_edge.validate.bounds import Bound, bound_of
from mopeq_edge.validate.stored import Bytes, Matrix, StoredModel

Floats = npt.NDArray[np.float32]
Rows = npt.NDArray[np.int64]

_SMALLEST_PART = 0.05
"""Of a matrix's RMS: what a row is taken to have at least, so that rows of almost nothing may be lost."""

_WHOLE = 1 << 17
"""Weights up to which all of a matrix that is no expert is read: routers are, so that any row out of place is seen."""


@dataclass(frozen=True)
class Compared:
    """One matrix against the source's. Errors are relative to the RMS of the source's rows, of all and of the worst."""

    matrix: Matrix
    source: SourceTensor
    rows: Rows
    error: float
    worst: float
    worst_row: int
    bound: Bound

    @property
    def passed(self) -> bool:
        return self.error <= self.bound.matrix and self.worst <= self.bound.row


class CannotDequantizeError(Exception):
    """Neither gguf nor an installed libggml knows the type."""


def dequantize(kind: GgmlType, raw: Bytes, n_in: int) -> Floats:
    """Rows [n_rows, row bytes] as float32 [n_rows, n_in]: by the gguf package, or libggml for a type it lacks.

    Raises :class:`CannotDequantizeError` for a type that neither knows.
    """
    try:
        found: Floats = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType(kind.id))
        return found.reshape(len(raw), n_in)
    except (NotImplementedError, ValueError):
        pass
    try:
        return load_ggml().dequantize(kind, raw, n_in)
    except RuntimeMissingError as error:
        raise CannotDequantizeError(str(error)) from None


def sample_rows(matrix: Matrix, at_most: int) -> Rows:
    """Rows to look at, rising: all of a small matrix, else the first, the last, and others at random (always the same).

    A row is whole, so that its first and last blocks are seen.
    """
    n = matrix.n_out
    if n <= at_most or (not matrix.is_expert and n * matrix.n_in <= _WHOLE):
        return np.arange(n)
    inner = 1 + np.random.default_rng(0).choice(n - 2, at_most - 2, replace=False)
    return np.sort(np.concatenate([[0], inner, [n - 1]]))


def compare_weights(
    model: StoredModel, source: Source, at_most: int, threads: int, progress: Progress
) -> tuple[Compared, ...]:
    """Every matrix of ``model`` whose tensor the ``source`` has in the same shape and whose type has a bound.

    ``at_most``: rows of one matrix. Raises :class:`CannotDequantizeError` for a type that nothing here reads.
    """
    tensors = {tensor.name: tensor for tensor in source.tensors}
    work = list(_work(model, tensors))
    with ThreadPoolExecutor(threads) as pool, progress.step("against the source", len(work), "matrices") as step:

        def one(task: tuple[Matrix, SourceTensor, Bound]) -> Compared:
            matrix, tensor, bound = task
            rows = sample_rows(matrix, at_most)
            ours = stored_rows(matrix, rows)
            theirs = read_rows(source, tensor, matrix.number, rows).reshape(ours.shape)
            step.advance()
            return Compared(matrix, tensor, rows, *errors(ours, theirs, bound), bound)

        return tuple(pool.map(one, work))


def _work(model: StoredModel, tensors: dict[str, SourceTensor]) -> Iterator[tuple[Matrix, SourceTensor, Bound]]:
    for matrix in model.matrices:
        tensor = tensors.get(matrix.tensor)
        if tensor is None or shape_of(matrix) != (tensor.n_in, tensor.n_out, tensor.n_matrices):
            continue
        bound = bound_of(matrix.type, tensor.type)
        if bound is not None:
            yield matrix, tensor, bound


def shape_of(matrix: Matrix) -> tuple[int, int, int]:
    return matrix.n_in, matrix.n_out, matrix.n_matrices


def stored_rows(matrix: Matrix, rows: Rows) -> Floats:
    """Rows of ``matrix`` in float32 [len(rows), n_in]."""
    return dequantize(matrix.type, matrix.read_rows(rows), matrix.n_in)


def errors(ours: Floats, theirs: Floats, bound: Bound) -> tuple[float, float, int]:
    """Relative RMS error of all rows, that of the worst row, and which row of the arrays it is."""
    with np.errstate(over="ignore", invalid="ignore"):
        wrong = np.sqrt(np.square(ours.astype(np.float64) - theirs).mean(axis=1))
        size = np.sqrt(np.square(theirs.astype(np.float64)).mean(axis=1))
    wrong = np.nan_to_num(np.where(wrong <= bound.least, 0, wrong), nan=np.inf)
    whole = float(np.sqrt(np.square(size).mean()))
    each = _ratio(wrong, np.maximum(size, _SMALLEST_PART * whole))
    worst = int(each.argmax())
    return float(_ratio(np.sqrt(np.square(wrong).mean(keepdims=True)), np.array([whole]))[0]), float(each[worst]), worst


def _ratio(wrong: npt.NDArray[np.float64], size: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """0 where nothing is wrong, even of nothing."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(np.where(wrong == 0, 0.0, wrong / size))
