"""One pass over all weights of a file, a few pieces at a time: scales that are no numbers, rows of zeros at an end.

Read, not mapped: a mapped file that shrinks kills the process, and mapped pages count as its memory.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from mopeq_edge.progress import BYTES, Progress
from mopeq_edge.validate.blocks import BadScales, bad_scales
from mopeq_edge.validate.stored import Bytes, Matrix, StoredModel

PIECE_BYTES = 1 << 22


@dataclass(frozen=True)
class Scanned:
    """What the pass found in one matrix. ``zero_rows``: rows of zero bytes at its end."""

    matrix: Matrix
    bad: BadScales | None
    zero_rows: int


@dataclass(frozen=True)
class _Piece:
    bad: BadScales | None
    zero_rows: int
    n_rows: int


def scan(model: StoredModel, threads: int, progress: Progress) -> tuple[Scanned, ...]:
    """Look at every byte of ``model``. At most two pieces a thread are in memory."""
    matrices = model.matrices
    with (
        ThreadPoolExecutor(threads) as pool,
        progress.step("reading weights", sum(m.nbytes for m in matrices), BYTES) as step,
    ):

        def look(work: Sequence[tuple[Matrix, int, int]]) -> list[_Piece]:
            found = []
            for matrix, first, n_rows in work:
                raw = matrix.read(first, n_rows)
                found.append(_Piece(bad_scales(matrix.type, raw), _zero_tail(raw), n_rows))
                step.advance(raw.nbytes)
            return found

        waiting: deque[Future[list[_Piece]]] = deque()
        pieces: list[_Piece] = []
        for work in _work(matrices):
            waiting.append(pool.submit(look, work))
            if len(waiting) >= 2 * threads:
                pieces += waiting.popleft().result()
        while waiting:
            pieces += waiting.popleft().result()
    return tuple(_joined(matrices, pieces))


def _work(matrices: Sequence[Matrix]) -> Iterator[list[tuple[Matrix, int, int]]]:
    """(matrix, first row, rows) in order, about :data:`PIECE_BYTES` at a time."""
    work: list[tuple[Matrix, int, int]] = []
    size = 0
    for matrix in matrices:
        rows = max(1, PIECE_BYTES // matrix.row_bytes)
        for first in range(0, matrix.n_out, rows):
            n_rows = min(rows, matrix.n_out - first)
            work.append((matrix, first, n_rows))
            size += n_rows * matrix.row_bytes
            if size >= PIECE_BYTES:
                yield work
                work, size = [], 0
    if work:
        yield work


def _zero_tail(raw: Bytes) -> int:
    """Rows of zeros at the end of ``raw`` [n_rows, row_bytes]."""
    if raw[-1].any():
        return 0
    used = np.flatnonzero(raw.any(axis=1))
    return len(raw) if not len(used) else len(raw) - 1 - int(used[-1])


def _joined(matrices: Sequence[Matrix], pieces: Sequence[_Piece]) -> Iterator[Scanned]:
    at = 0
    for matrix in matrices:
        first, zero_rows, n_bad = 0, 0, 0
        bad: BadScales | None = None
        while first < matrix.n_out:
            piece = pieces[at]
            if piece.bad is not None:
                n_bad += piece.bad.n_blocks
                if bad is None:
                    block = first * (matrix.n_in // matrix.type.block_size) + piece.bad.block
                    bad = BadScales(0, block, piece.bad.scale, piece.bad.found)
            zero_rows = zero_rows + piece.n_rows if piece.zero_rows == piece.n_rows else piece.zero_rows
            first += piece.n_rows
            at += 1
        if bad is not None:
            bad = BadScales(n_bad, bad.block, bad.scale, bad.found)
        yield Scanned(matrix, bad, zero_rows)
