"""Parts of tensors: every matrix once, largest part first, and read as the whole."""

from __future__ import annotations

import numpy as np
import pytest

from mopeq_edge.ggml.types import BF16
from mopeq_edge.imatrix import Entry, Imatrix
from mopeq_edge.source.huggingface import HuggingFaceSource
from mopeq_edge.source.model import SourceTensor
from mopeq_edge.source.part import Part, PartSource, joined_in_order, parts_of
from mopeq_edge.source.roles import Role

STACK = SourceTensor("blk.0.ffn_up_exps.weight", (10, 4, 5), BF16)
MATRIX = SourceTensor("output.weight", (10, 9), BF16)


def test_parts_by_hand() -> None:
    parts = parts_of([STACK, MATRIX], 85)
    assert [(p.whole.name, p.first, p.stop) for p in parts] == [
        *((MATRIX.name, 0, 1), (STACK.name, 0, 2), (STACK.name, 2, 4), (STACK.name, 4, 5)),
    ]
    assert joined_in_order(parts) == {MATRIX.name: [0], STACK.name: [1, 2, 3]}
    assert [part.tensor.shape for part in parts] == [(10, 9), (10, 4, 2), (10, 4, 2), (10, 4, 1)]
    # one matrix at least
    assert [(p.first, p.stop) for p in parts_of([STACK], 3)] == [(n, n + 1) for n in range(5)]
    assert parts_of([STACK, MATRIX], None) == [Part(STACK, 0, 5), Part(MATRIX, 0, 1)]


def test_a_part_reads_its_matrices(tiny_source: HuggingFaceSource) -> None:
    stack = next(t for t in tiny_source.tensors if t.role is Role.EXPERT)
    part = Part(stack, 5, 9)
    seen = PartSource(tiny_source, part)
    assert part.tensor.n_matrices == 4
    for matrix in range(4):
        expected = tiny_source.read(stack, 5 + matrix, slice(3, 7))
        np.testing.assert_array_equal(seen.read(part.tensor, matrix, slice(3, 7)), expected)
        stored = tiny_source.read_stored(stack, 5 + matrix)
        np.testing.assert_array_equal(seen.read_stored(part.tensor, matrix), stored)
    for matrix in (-1, 4):
        with pytest.raises(IndexError):
            seen.read(part.tensor, matrix)


def test_a_part_has_its_own_statistics_alone() -> None:
    sums = np.arange(50, dtype=np.float32).reshape(5, 10)
    counts = np.arange(1, 6, dtype=np.float32)
    entries = {STACK.name: Entry(sums, counts), MATRIX.name: Entry(sums[:1], counts[:1])}
    found = Part(STACK, 1, 3).imatrix(Imatrix(entries, ("t",), 1, 1))
    assert found is not None
    assert list(found.entries) == [STACK.name]
    np.testing.assert_array_equal(found.entries[STACK.name].mean(), entries[STACK.name].mean()[1:3])
    assert Part(STACK, 1, 3).imatrix(None) is None
