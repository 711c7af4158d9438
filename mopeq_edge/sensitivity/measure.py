"""Quantize every expert to every candidate type, compare with the weights, price the error."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mopeq_edge.ggml.library import Ggml
from mopeq_edge.ggml.types import BY_NAME, GgmlType
from mopeq_edge.imatrix import Imatrix
from mopeq_edge.sensitivity.scores import Doubles, Pricing
from mopeq_edge.source.model import Floats, Source, SourceTensor, read_rows

ROWS_AT_ONCE = 2**21
"""Weights that one piece of work holds as float32, at most (one row at least)."""


MIDDLE_BPW = 3.4375
"""Bits per weight in the middle of what experts get: Q3_K's."""


@dataclass(frozen=True)
class TensorErrors:
    """Damage of one tensor: ``damage[score]`` and ``variance[score]`` [n_types, n_matrices].

    ``types`` names the rows; the last one is the tensor's own type, with no damage. ``variance`` is the
    sampling variance of the damage (0 when all rows were measured). ``norms`` [n_matrices] is |W|_F.
    """

    types: tuple[str, ...]
    damage: Mapping[str, Doubles]
    variance: Mapping[str, Doubles]
    norms: Doubles

    def fitting(self, n_in: int) -> TensorErrors:
        """Those of the types whose blocks fit rows of ``n_in`` numbers."""
        rows = [row for row, name in enumerate(self.types) if BY_NAME[name].fits(n_in)]
        damage, variance = ({s: v[rows] for s, v in found.items()} for found in (self.damage, self.variance))
        return TensorErrors(tuple(self.types[row] for row in rows), damage, variance, self.norms)

    def middle_type(self) -> int | None:
        """The row of the quantized type nearest to :data:`MIDDLE_BPW`; None if there is none."""
        kinds = [BY_NAME[name] for name in self.types[:-1]]
        return min(range(len(kinds)), key=lambda i: (abs(kinds[i].bpw - MIDDLE_BPW), kinds[i].name), default=None)


def sampled_rows(n_out: int, sample: int | None, seed: int) -> npt.NDArray[np.int64]:
    """Row numbers to measure, sorted: all, or ``sample`` drawn without replacement."""
    if sample is None or sample >= n_out:
        return np.arange(n_out)
    return np.sort(np.random.default_rng(seed).choice(n_out, size=sample, replace=False))


def measure_tensor(
    source: Source,
    tensor: SourceTensor,
    types: Sequence[GgmlType],
    pricings: Mapping[str, Sequence[Pricing]],
    imatrix: Imatrix | None,
    ggml: Ggml,
    pool: ThreadPoolExecutor,
    *,
    padded_in: int | None = None,
    sample_rows: int | None = None,
    on_matrix: Callable[[], None] = lambda: None,
) -> TensorErrors:
    """Errors of ``tensor`` for ``types`` (its own type last), by score; ``pricings[score]`` has one a matrix.

    The quantizer weighs with ``imatrix`` as it will when the file is written. A type whose blocks do not fit the rows
    is measured on rows of ``padded_in`` numbers, with zeros behind, as a padded file has them (``source.padded``).
    """
    entry = imatrix.entries.get(tensor.name) if imatrix is not None else None
    weights = entry.mean() if entry is not None else None
    rows = sampled_rows(tensor.n_out, sample_rows, seed=tensor.n_out)
    factor = tensor.n_out / len(rows)
    shape = (len(types), tensor.n_matrices)
    damage = {score: np.zeros(shape) for score in pricings}
    squares = {score: np.zeros(shape) for score in pricings}
    norms = np.zeros(tensor.n_matrices)
    at_once = max(1, ROWS_AT_ONCE // tensor.n_in)
    behind = (0, (padded_in or tensor.n_in) - tensor.n_in)

    def error_of(kind: GgmlType, w: Floats, own: Floats | None) -> Floats:
        if not kind.fits(tensor.n_in):
            w = np.pad(w, ((0, 0), behind))
            own = None if own is None else np.pad(own, behind)
        error = ggml.dequantize(kind, ggml.quantize(kind, w, own), w.shape[1])
        error -= w
        return error[:, : tensor.n_in]

    def one_piece(matrix: int, piece: npt.NDArray[np.int64]) -> tuple[float, dict[str, Doubles], dict[str, Doubles]]:
        w = read_rows(source, tensor, matrix, piece)
        sums = {score: np.zeros(len(types)) for score in pricings}
        sums2 = {score: np.zeros(len(types)) for score in pricings}
        for index, kind in enumerate(types[:-1]):
            error = error_of(kind, w, None if weights is None else weights[matrix])
            error *= error
            for score, by_matrix in pricings.items():
                per_row = by_matrix[matrix].row_damage(error, piece)
                sums[score][index] = per_row.sum()
                sums2[score][index] = (per_row * per_row).sum()
        return float((w.astype(np.float64) ** 2).sum()), sums, sums2

    futures: list[tuple[int, Future[tuple[float, dict[str, Doubles], dict[str, Doubles]]]]] = []
    for matrix in range(tensor.n_matrices):
        for start in range(0, len(rows), at_once):
            futures.append((matrix, pool.submit(one_piece, matrix, rows[start : start + at_once])))
    for position, (matrix, future) in enumerate(futures):
        norm2, sums, sums2 = future.result()
        norms[matrix] += norm2 * factor
        for score in pricings:
            damage[score][:, matrix] += sums[score]
            squares[score][:, matrix] += sums2[score]
        if position + 1 == len(futures) or futures[position + 1][0] != matrix:
            on_matrix()
    variance = {score: _sampling_variance(damage[score], squares[score], len(rows), tensor.n_out) for score in pricings}
    return TensorErrors(
        types=tuple(t.name for t in types),
        damage={score: values * factor for score, values in damage.items()},
        variance=variance,
        norms=np.sqrt(norms),
    )


def _sampling_variance(sums: Doubles, squares: Doubles, n: int, total: int) -> Doubles:
    """Variance of the estimate total/n * sum for n of ``total`` rows drawn without replacement."""
    if n >= total or n < 2:
        return np.zeros_like(sums)
    spread = np.maximum(squares - sums * sums / n, 0.0) / (n - 1)
    return np.asarray(total * total / n * spread * (1 - n / total))


def total_matrices(tensors: Sequence[SourceTensor]) -> int:
    """Units of progress of a measurement."""
    return sum(t.n_matrices for t in tensors)
