"""The routing artifact: what goes in comes out, the same bytes every time; what an imatrix tells of routing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mopeq_edge.calibrate.statistics import Routing, read_routing, routing_from_imatrix, write_routing
from mopeq_edge.errors import FormatError
from mopeq_edge.imatrix import Entry, Imatrix
from mopeq_edge.source.huggingface import HuggingFaceSource


def make() -> Routing:
    counts = {10: np.array([3.0, 0.0, 5.0]), 2: np.array([0.0, 1.0, 7.0])}
    return Routing(8, counts, {2: np.array([0.0, 0.25, 3.5])}, np.array([1.0, 7.0]))


def test_what_goes_in_comes_out(tmp_path: Path) -> None:
    routing = make()
    for name in ("a", "b"):
        write_routing(routing, tmp_path / name, "ab" * 32)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    back = read_routing(tmp_path / "a")
    assert back.n_tokens == 8
    assert back.token_counts.tolist() == [1, 7]
    assert {layer: c.tolist() for layer, c in back.counts.items()} == {2: [0, 1, 7], 10: [3, 0, 5]}
    assert {layer: g.tolist() for layer, g in back.gate_weights.items()} == {2: [0, 0.25, 3.5]}
    assert back.unrouted() == routing.unrouted() == [(2, 0), (10, 1)]


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a"
    with pytest.raises(FormatError, match=r"cannot be read as routing .* calibrate again"):
        read_routing(path)
    path.write_bytes(b"no such format")
    with pytest.raises(FormatError, match=r"cannot be read as routing .* calibrate again"):
        read_routing(path)


def test_counts_of_an_imatrix_without_the_prior(tiny_source: HuggingFaceSource) -> None:
    names = [f"blk.{layer}.ffn_down_exps.weight" for layer in (0, 1)]
    entry = Entry(np.ones((3, 2), dtype=np.float32), np.array([4, 1, 7], dtype=np.float32))
    attention = {"blk.0.attn_q.weight": Entry(np.ones((1, 2), dtype=np.float32), np.array([6], dtype=np.float32))}
    unrouted = (f"{names[1]}[1]",)
    imatrix = Imatrix({names[0]: entry, names[1]: entry, **attention}, ("x",), 2, 3, unrouted=unrouted)
    found = routing_from_imatrix(imatrix, tiny_source)
    assert {layer: c.tolist() for layer, c in found.counts.items()} == {0: [4, 1, 7], 1: [4, 0, 7]}
    assert (found.n_tokens, found.gate_weights, found.unrouted()) == (6, {}, [(1, 1)])
    # nobody knows which tokens there were
    assert found.token_counts.tolist() == [0] * 4096
    assert routing_from_imatrix(imatrix, tiny_source, np.ones(3)).token_counts.tolist() == [1, 1, 1]
