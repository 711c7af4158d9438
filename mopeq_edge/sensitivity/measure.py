"""Quantize every expert to every candidate type, compare with the weights, price the error.

A matrix is read once, in pieces: for its norm, its largest weight, and what scores make of its weights. The rows to
measure are kept of it, and quantized at the end. Where only the rows to measure are read, the norm is an estimate too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from mopeq_edge.ggml.library import Ggml
from mopeq_edge.ggml.types import BY_NAME, GgmlType
from mopeq_edge.imatrix import Imatrix
from mopeq_edge.sensitivity.sample import (
    Rows,
    SampleRows,
    dominated,
    drawn_rows,
    estimate,
    rows_needed,
    rows_to_measure,
    with_pooled,
)
from mopeq_edge.sensitivity.scores import Doubles, Pricing
from mopeq_edge.source.model import Floats, Source, SourceTensor, magnitude, read_rows

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


@dataclass(frozen=True)
class _Piece:
    """What one piece of work found: sums over rows, and ``damage`` and ``variance`` [n_weighings, n_types]."""

    square: float
    largest: float
    damage: Doubles
    variance: Doubles


class Weighings:
    """The different ways in which scores weigh squared errors: many scores differ in a factor alone."""

    def __init__(self, pricings: Mapping[str, Sequence[Pricing]]) -> None:
        places: dict[tuple[tuple[int, ...], ...], int] = {}
        self.of: dict[str, int] = {}
        """Which one a score has."""
        self.each: list[list[Pricing]] = []
        """Of every matrix, with the factor 1 (but where there are two terms, whose factors belong to them)."""
        for score, by_matrix in pricings.items():
            key = tuple((id(p.columns), id(p.rows), id(p) if p.also is not None else 0) for p in by_matrix)
            if key not in places:
                places[key] = len(places)
                self.each.append([p if p.also is not None else replace(p, factor=1.0) for p in by_matrix])
            self.of[score] = places[key]


@dataclass(frozen=True)
class Measured:
    """Errors of one tensor before prices: ``damage`` and ``variance`` [n_weighings, n_types, n_matrices].

    ``largest`` [n_matrices] is the largest magnitude of a weight.
    """

    types: tuple[str, ...]
    damage: Doubles
    variance: Doubles
    norms: Doubles
    largest: Doubles
    weighing_of: Mapping[str, int]

    @classmethod
    def joined(cls, parts: Sequence[Measured]) -> Measured:
        """Of a tensor from those of its parts, in order."""
        damage, variance = (
            np.concatenate([getattr(part, name) for part in parts], axis=2) for name in ("damage", "variance")
        )
        norms, largest = (np.concatenate([getattr(part, name) for part in parts]) for name in ("norms", "largest"))
        first = parts[0]
        return cls(first.types, damage, with_pooled(damage, variance), norms, largest, first.weighing_of)

    def priced(self, pricings: Mapping[str, Sequence[Pricing]]) -> TensorErrors:
        """By every score of ``pricings``, whose weighings are the same; without types that do not hold a weight."""
        largest = float(self.largest.max())
        rows = [i for i, name in enumerate(self.types) if i + 1 == len(self.types) or BY_NAME[name].holds(largest)]
        damage, variance = {}, {}
        for score, by_matrix in pricings.items():
            factors = np.array([1.0 if p.also is not None else p.factor for p in by_matrix])
            damage[score] = self.damage[self.weighing_of[score]][rows] * factors
            variance[score] = self.variance[self.weighing_of[score]][rows] * factors**2
        return TensorErrors(tuple(self.types[i] for i in rows), damage, variance, self.norms)


class Measuring:
    """A tensor whose matrices are being measured in the threads of a pool; the numbers do not depend on how many."""

    def __init__(
        self,
        source: Source,
        tensor: SourceTensor,
        types: Sequence[GgmlType],
        pricings: Mapping[str, Sequence[Pricing]],
        imatrix: Imatrix | None,
        ggml: Ggml,
        pool: ThreadPoolExecutor,
        *,
        padded_in: int | None = None,
        rows: Rows,
        first: int = 0,
    ) -> None:
        """Begin. ``types``: the tensor's own is the last. ``pricings[score]`` has one a matrix.

        The quantizer weighs with ``imatrix`` as it will when the file is written. A type whose blocks do not fit the
        rows is measured on rows of ``padded_in`` numbers, with zeros behind, as a padded file has them
        (``source.padded``). ``rows`` are measured of each matrix; the first matrix has the number ``first``, where the
        tensor is a part of another.
        """
        self._source, self._tensor, self._types, self._ggml = source, tensor, tuple(types), ggml
        self._weighings = Weighings(pricings)
        entry = imatrix.entries.get(tensor.name) if imatrix is not None else None
        self._weights = entry.mean() if entry is not None else None
        self._behind = (0, (padded_in or tensor.n_in) - tensor.n_in)
        self._rows, self._first = rows, first
        # a matrix alone is measured by the thread that asks, with a thread for each type
        self._alone = pool if tensor.n_matrices == 1 else None
        self._at_once = max(1, ROWS_AT_ONCE // tensor.n_in)
        self._futures: list[list[Future[_Piece]]] = []
        every = range(tensor.n_out)
        for matrix in range(tensor.n_matrices):
            if self._rows.first >= tensor.n_out:
                parts = [pool.submit(self._whole, matrix, piece) for piece in self._pieces(every)]
            elif self._alone is None:
                parts = [pool.submit(self._sampled, matrix)]
            else:
                parts = []
            self._futures.append(parts)

    def result(self, on_matrix: Callable[[], None] = lambda: None) -> Measured:
        """Wait for all matrices, and call ``on_matrix`` after each."""
        shape = (len(self._weighings.each), len(self._types), self._tensor.n_matrices)
        damage, variance = np.zeros(shape), np.zeros(shape)
        norms, largest = np.zeros(shape[2]), np.zeros(shape[2])
        for matrix, parts in enumerate(self._futures):
            for piece in [future.result() for future in parts] or [self._sampled(matrix)]:
                norms[matrix] += piece.square
                largest[matrix] = max(largest[matrix], piece.largest)
                damage[..., matrix] += piece.damage
                variance[..., matrix] += piece.variance
            on_matrix()
        names = tuple(kind.name for kind in self._types)
        return Measured(names, damage, variance, np.sqrt(norms), largest, self._weighings.of)

    def _pieces(self, rows: range) -> Iterator[slice]:
        return (slice(start, min(start + self._at_once, len(rows))) for start in rows[:: self._at_once])

    def _whole(self, matrix: int, rows: slice) -> _Piece:
        """All rows of one piece of a matrix."""
        w = self._source.read(self._tensor, matrix, rows)
        largest, numbers = magnitude(w), np.arange(rows.start, rows.stop)
        damage = np.zeros((len(self._weighings.each), len(self._types)))
        for index, kind in self._lossy(largest):
            for which, d in enumerate(self._damage(kind, w, matrix, numbers)):
                damage[which, index] = d.sum()
        return _Piece(_square(w), largest, damage, np.zeros_like(damage))

    def _sampled(self, matrix: int) -> _Piece:
        """A matrix by some of its rows."""
        tensor, wanted = self._tensor, self._rows
        drawn = drawn_rows(tensor.n_out, wanted.most, seed=tensor.n_out + self._first + matrix)
        if wanted.only:
            return self._from_rows_alone(matrix, drawn)
        sample = np.empty((len(drawn), tensor.n_in), dtype=np.float32)
        weighed = [np.empty(tensor.n_out) for _ in self._weighings.each]
        square = largest = 0.0
        for piece in self._pieces(range(tensor.n_out)):
            w = self._source.read(tensor, matrix, piece)
            largest = max(largest, magnitude(w))
            here = np.flatnonzero((drawn >= piece.start) & (drawn < piece.stop))
            sample[here] = w[drawn[here] - piece.start]
            square += _square(w)
            with np.errstate(over="ignore"):
                np.multiply(w, w, out=w)
            for which, x in enumerate(weighed):
                numbers = np.arange(piece.start, piece.stop)
                x[piece] = self._weighings.each[which][matrix].row_weights(w, numbers)
        totals = [float(x.sum()) for x in weighed]
        damage, variance = self._estimated(matrix, sample, drawn, [x[drawn] for x in weighed], totals, largest)
        return _Piece(square, largest, damage, variance)

    def _from_rows_alone(self, matrix: int, drawn: npt.NDArray[np.int64]) -> _Piece:
        """A matrix of which nothing but the rows ``drawn`` is read; its norm is told by theirs."""
        order = np.argsort(drawn)
        sample = np.empty((len(drawn), self._tensor.n_in), dtype=np.float32)
        sample[order] = read_rows(self._source, self._tensor, matrix, drawn[order])
        largest = magnitude(sample)
        known, total = [np.ones(len(drawn))] * len(self._weighings.each), [np.inf] * len(self._weighings.each)
        damage, variance = self._estimated(matrix, sample, drawn, known, total, largest)
        return _Piece(_square(sample) * self._tensor.n_out / len(drawn), largest, damage, variance)

    def _estimated(
        self,
        matrix: int,
        sample: Floats,
        drawn: npt.NDArray[np.int64],
        weighed: Sequence[Doubles],
        totals: Sequence[float],
        largest: float,
    ) -> tuple[Doubles, Doubles]:
        """(damage, variance) [n_weighings, n_types] from the first rows, and from more where they say too little.

        ``weighed`` is what each weighing makes of the weights in the rows ``drawn``, ``totals`` of those in all rows.
        """
        wanted = self._rows
        shape = (len(weighed), len(self._types))
        damage, variance = np.zeros(shape), np.zeros(shape)
        lossy = self._lossy(largest)
        by_type: dict[int, list[Doubles]] = {}

        def extend(index: int, kind: GgmlType, start: int, stop: int) -> None:
            more = self._damage(kind, sample[start:stop], matrix, drawn[start:stop])
            before = by_type.get(index)
            by_type[index] = more if before is None else [np.append(a, b) for a, b in zip(before, more, strict=True)]
            for which, (d, x, total) in enumerate(zip(by_type[index], weighed, totals, strict=True)):
                found = estimate(d, x[: len(d)], total, self._tensor.n_out)
                damage[which, index], variance[which, index] = found

        def extend_all(jobs: list[tuple[int, GgmlType, int, int]]) -> None:
            if self._alone is None:
                for job in jobs:
                    extend(*job)
            else:
                for future in [self._alone.submit(extend, *job) for job in jobs]:
                    future.result()

        extend_all([(index, kind, 0, wanted.first) for index, kind in lossy])
        if wanted.most > wanted.first:
            bits = np.array([kind.bpw for kind in self._types])
            needed = np.max([rows_needed(*two, wanted.first, wanted) for two in zip(damage, variance, strict=True)], 0)
            lost = np.all([dominated(bits, *two) for two in zip(damage, variance, strict=True)], axis=0)
            further = [(i, kind) for i, kind in lossy if needed[i] > wanted.first and not lost[i]]
            extend_all([(i, kind, wanted.first, int(needed[i])) for i, kind in further])
        return damage, variance

    def _lossy(self, largest: float) -> list[tuple[int, GgmlType]]:
        """The types that lose something, and hold the largest weight that was seen: no other will be offered."""
        return [(i, kind) for i, kind in enumerate(self._types[:-1]) if kind.holds(largest)]

    def _damage(self, kind: GgmlType, w: Floats, matrix: int, rows: npt.NDArray[np.int64]) -> list[Doubles]:
        """By every weighing, the damage [n_rows] of ``w`` [n_rows, n_in], which are the matrix's ``rows``."""
        own = None if self._weights is None else self._weights[matrix]
        n_in = w.shape[1]
        if not kind.fits(n_in):
            w = np.pad(w, ((0, 0), self._behind))
            own = None if own is None else np.pad(own, self._behind)
        error = self._ggml.dequantize(kind, self._ggml.quantize(kind, w, own), w.shape[1])
        error -= w
        error *= error
        return [by_matrix[matrix].row_damage(error[:, :n_in], rows) for by_matrix in self._weighings.each]


def _square(w: Floats) -> float:
    """|w|_F^2, in double precision without a copy in it."""
    return float(np.einsum("ij,ij->", w, w, dtype=np.float64, casting="safe"))


def measure_tensor(
    source: Source,
    tensor: SourceTensor,
    types: Sequence[GgmlType],
    pricings: Mapping[str, Sequence[Pricing]],
    imatrix: Imatrix | None,
    ggml: Ggml,
    pool: ThreadPoolExecutor,
    *,
    sample_rows: SampleRows = None,
    rows_only: bool = False,
) -> TensorErrors:
    """Errors of ``tensor`` for ``types`` by score; see :class:`Measuring`."""
    rows = rows_to_measure(tensor, sample_rows, only=rows_only)
    started = Measuring(source, tensor, types, pricings, imatrix, ggml, pool, rows=rows)
    return Measured.joined([started.result()]).priced(pricings)


def total_matrices(tensors: Sequence[SourceTensor]) -> int:
    """Units of progress of a measurement."""
    return sum(t.n_matrices for t in tensors)
