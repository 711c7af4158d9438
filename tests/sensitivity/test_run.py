"""What the stage computes itself, apart from pricing: norms of every matrix, read in pieces."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from mopeq_edge.progress import SilentProgress
from mopeq_edge.sensitivity import run
from mopeq_edge.source.huggingface import HuggingFaceSource
from mopeq_edge.source.roles import Role


@pytest.mark.parametrize("rows_at_once", [1, 1000, 2**21])
def test_norms_do_not_depend_on_pieces(
    tiny_source: HuggingFaceSource, monkeypatch: pytest.MonkeyPatch, rows_at_once: int
) -> None:
    monkeypatch.setattr(run, "ROWS_AT_ONCE", rows_at_once)
    down = next(t for t in tiny_source.tensors if t.role is Role.EXPERT)
    query = next(t for t in tiny_source.tensors if t.role is Role.ATTENTION)
    with ThreadPoolExecutor(2) as pool:
        norms = run._norms(tiny_source, [down, query], pool, SilentProgress())
    for tensor in (down, query):
        expected = [np.linalg.norm(tiny_source.read(tensor, m).astype(np.float64)) for m in range(tensor.n_matrices)]
        np.testing.assert_allclose(norms[tensor.name], expected, rtol=1e-13)
