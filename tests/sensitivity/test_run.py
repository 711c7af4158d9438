"""What the stage computes itself, apart from pricing: norms of every matrix, and which types cannot hold it."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from converters import CONVERTERS
from mopeq_edge.emit import emit
from mopeq_edge.engine.local import LocalEngine
from mopeq_edge.ggml.library import Ggml, load_ggml
from mopeq_edge.ggml.types import BF16
from mopeq_edge.plan.artifact import PER_EXPERT, STOCK
from mopeq_edge.plan.budget import Budget
from mopeq_edge.plan.candidates import FLOORS, parse_types
from mopeq_edge.plan.make import make_plan
from mopeq_edge.plan.options import MapOptions, PlanOptions, parse_bits
from mopeq_edge.progress import SilentProgress
from mopeq_edge.sensitivity import run
from mopeq_edge.sensitivity.measure import sampled_rows
from mopeq_edge.sensitivity.pricing import Statistics
from mopeq_edge.sensitivity.scores import WEIGHT_MSE
from mopeq_edge.source.gguf import GGUFSource
from mopeq_edge.source.huggingface import HuggingFaceSource
from mopeq_edge.source.open import open_source
from mopeq_edge.source.part import parts_of
from mopeq_edge.source.roles import Role

from ..builders import build_olmoe


@pytest.mark.parametrize("rows_at_once", [1, 1000, 2**21])
def test_norms_do_not_depend_on_pieces(
    tiny_source: HuggingFaceSource, monkeypatch: pytest.MonkeyPatch, rows_at_once: int
) -> None:
    monkeypatch.setattr(run, "ROWS_AT_ONCE", rows_at_once)
    down = next(t for t in tiny_source.tensors if t.role is Role.EXPERT)
    query = next(t for t in tiny_source.tensors if t.role is Role.ATTENTION)
    parts = parts_of([down, query], None)
    norms, largest = run._norms(tiny_source, parts, LocalEngine(2, cast(Ggml, None)), SilentProgress())
    for tensor in (down, query):
        whole = [np.abs(tiny_source.read(tensor, m)).max() for m in range(tensor.n_matrices)]
        np.testing.assert_array_equal(largest[tensor.name], whole)
        expected = [np.linalg.norm(tiny_source.read(tensor, m).astype(np.float64)) for m in range(tensor.n_matrices)]
        np.testing.assert_allclose(norms[tensor.name], expected, rtol=1e-13)


@pytest.mark.runtime
@pytest.mark.parametrize("sample_rows", [None, 2])
def test_types_that_cannot_hold_a_weight_are_not_offered(tmp_path: Path, sample_rows: int | None) -> None:
    """One weight of one expert, in a row that no sample has: its stack keeps its type, whatever the planner."""
    directory = build_olmoe(tmp_path / "model", n_layer=1)
    weights = load_file(directory / "model.safetensors")
    assert 31 not in sampled_rows(32, 2, seed=32)
    weights["model.layers.0.mlp.experts.5.up_proj.weight"][31, 3] = -1e30
    save_file(weights, directory / "model.safetensors")
    source, types = open_source(directory, CONVERTERS, pre="gpt-2"), parse_types("MXFP4,Q4_0,Q5_0,Q8_0,F16")
    table = run.measure_sensitivity(
        *(source, types, Statistics(), "none", LocalEngine(1, load_ggml())),
        **{"sample_rows": sample_rows, "made_from": "", "progress": SilentProgress()},
    )
    up = "blk.0.ffn_up_exps.weight"
    assert table.errors[up].types == ("BF16",)
    assert table.errors["blk.0.ffn_gate_exps.weight"].types == ("MXFP4", "Q4_0", "Q5_0", "Q8_0", "BF16")
    out = tmp_path / "out.gguf"
    for layout, asked in ((STOCK, None), (PER_EXPERT, None), (PER_EXPERT, parse_bits("2=Q4_0,3=Q5_0,4=Q8_0"))):
        wanted = None if asked is None else MapOptions(bits=asked)
        options = PlanOptions(WEIGHT_MSE, types, FLOORS, layout, wanted)
        large = make_plan(source, table, source.kvs, Budget(gb=0.002), options)
        plan = make_plan(source, table, source.kvs, Budget(gb=large.smallest_bytes / 1e9), options)
        kinds = plan.type_of()
        assert kinds[up] is BF16
        assert kinds["blk.0.ffn_gate_exps.weight"] is not BF16
        emit(source, kinds, source.kvs, None, load_ggml(), out, threads=1, progress=SilentProgress())
        assert out.stat().st_size == plan.file_bytes
        if layout == STOCK:
            written = GGUFSource(out)
            tensor = next(tensor for tensor in written.tensors if tensor.name == up)
            assert written.read(tensor, 5)[31, 3] == source.read(tensor, 5)[31, 3] < -9e29
