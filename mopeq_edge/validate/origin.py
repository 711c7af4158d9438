"""What weights that are not the source's in their place are instead: which other matrix, or order of rows, they fit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from mopeq_edge.source.model import Source, SourceTensor, read_rows
from mopeq_edge.validate.weights import Compared, Floats, Rows, errors, stored_rows

MOST_ROWS = 1024
"""Of a matrix whose order of rows is looked for."""

_PAIRS = (("ffn_gate_", "ffn_up_"), ("attn_k", "attn_v"), ("attn_k", "attn_q"), ("attn_norm", "ffn_norm"))
"""What may have been exchanged within a block; the first that is found in a name is replaced."""


@dataclass(frozen=True)
class Origin:
    """``tensor`` and ``matrix`` of the source that the weights fit; ``how`` says what was done to them on the way."""

    tensor: str
    matrix: int
    how: str = ""


def find_origin(compared: Compared, source: Source) -> Origin | None:
    """The source's matrix that fits ``compared``, which does not fit its own; None if no likely one does.

    Tried are the other matrices of the same tensor, their halves exchanged (gate and up in one), tensors that are
    easily exchanged, the same tensor of other blocks, and the rows in another order.
    """
    ours = stored_rows(compared.matrix, compared.rows)
    for tensor, matrix, rows, how in _candidates(compared, source):
        theirs = read_rows_in_order(source, tensor, matrix, rows)
        error, worst, _ = errors(ours, theirs.reshape(ours.shape), compared.bound)
        if error <= max(compared.bound.matrix, 1e-6) and worst <= max(compared.bound.row, 1e-6):
            return Origin(tensor.name, matrix, how)
    return _other_order(compared, source)


def read_rows_in_order(source: Source, tensor: SourceTensor, matrix: int, rows: Rows) -> Floats:
    """Rows in any order."""
    order = np.argsort(rows)
    found = np.empty((len(rows), tensor.n_in), dtype=np.float32)
    found[order] = read_rows(source, tensor, matrix, rows[order])
    return found


def _candidates(compared: Compared, source: Source) -> Iterator[tuple[SourceTensor, int, Rows, str]]:
    own, number, rows = compared.source, compared.matrix.number, compared.rows
    tensors = {t.name: t for t in source.tensors}
    for other in range(own.n_matrices):
        if other != number:
            yield own, other, rows, ""
    if own.projection == "gate_up":
        yield own, number, (rows + own.n_out // 2) % own.n_out, "gate and up exchanged"
    for first, second in _PAIRS:
        for a, b in ((first, second), (second, first)):
            twin = tensors.get(own.name.replace(a, b)) if a in own.name else None
            if twin is not None and twin.shape == own.shape:
                yield twin, number, rows, ""
                yield from ((twin, other, rows, "") for other in range(own.n_matrices) if other != number)
    own_name = own.name.split(".", 2)[-1]
    for tensor in source.tensors:
        elsewhere = tensor.layer not in (None, own.layer) and tensor.shape == own.shape
        if elsewhere and tensor.name.split(".", 2)[-1] == own_name:
            yield tensor, number, rows, ""


def _other_order(compared: Compared, source: Source) -> Origin | None:
    """The rows of the source's own matrix in another order, if that is it."""
    matrix, tensor = compared.matrix, compared.source
    if not 1 < matrix.n_out <= MOST_ROWS or len(compared.rows) < matrix.n_out:
        return None
    ours = stored_rows(matrix, compared.rows)
    theirs = source.read(tensor, matrix.number).reshape(ours.shape)
    likeness = _unit(ours) @ _unit(theirs).T
    order = likeness.argmax(axis=1)
    error, worst, _ = errors(ours, theirs[order], compared.bound)
    if error > max(compared.bound.matrix, 1e-6) or worst > max(compared.bound.row, 1e-6):
        return None
    moved = np.flatnonzero(order != np.arange(len(order)))
    if not len(moved):
        return None
    shown = [f"row {i} holds the source's row {order[i]}" for i in moved[:4].tolist()]
    more = f" and {len(moved) - 4} rows more" if len(moved) > 4 else ""
    return Origin(tensor.name, matrix.number, f"rows in another order: {', '.join(shown)}{more}")


def _unit(values: Floats) -> Floats:
    length = np.sqrt(np.square(values).sum(axis=1, keepdims=True))
    return np.asarray(values / np.maximum(length, np.float32(1e-30)), dtype=np.float32)
