"""From a checkpoint to a file by the weights alone, and what a dry run tells before."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from mopeq_edge.cli import cli
from mopeq_edge.sensitivity.table import read_table
from tools.bench.measure import run
from tools.sparse_checkpoint import Size, write_sparse_checkpoint

from .source.test_described import SMALL

pytestmark = pytest.mark.runtime


def printed(*args: object) -> Any:
    done = CliRunner().invoke(cli, [str(arg) for arg in args], catch_exceptions=False)
    return json.loads(done.stdout)


def test_without_a_calibration(tmp_path: Path) -> None:
    model, work, out = tmp_path / "model", tmp_path / "work", tmp_path / "out.gguf"
    write_sparse_checkpoint(model, SMALL)
    given = ("--work-dir", work, "--pre", "deepseek-v3", "--threads", 1, "--json")
    found = printed(
        "sensitivity", model, "--quantize-with", "none", "--sample-rows", 2, "--types", "Q2_K,Q3_K,Q4_K", *given
    )
    assert set(found["relative_sampling_error"]) == {"weight-mse", "mopeq"}
    plan = printed("plan", model, "--target-bpw", 4.2, "--types", "Q2_K,Q3_K,Q4_K", "--layout", "per-expert", *given)
    assert (plan["sensitivity"], plan["quantized_with"]) == ("weight-mse", "none")
    before = sorted(path.name for path in tmp_path.iterdir())
    dry = printed("emit", model, out, "--dry-run", *given)
    assert sorted(path.name for path in tmp_path.iterdir() if not path.name.startswith(".")) == before
    assert dry["file_bytes"] == dry["predicted_file_bytes"] == plan["file_bytes"]
    assert 0 < dry["quantizing_seconds"] < 60
    parts = printed("emit", model, out, "--dry-run", "--split-max-size", "1M", *given)["files"]
    assert len(parts) > 1
    assert all(part["bytes"] <= 10**6 for part in parts)
    assert printed("emit", model, out, *given)["file_bytes"] == out.stat().st_size == dry["file_bytes"]


def test_rows_alone_are_read_and_memory_does_not_grow_with_layers(tmp_path: Path) -> None:
    """25 MB of weights a layer, of which a few rows are read; no file is hashed."""
    peaks = []
    for n_layer in (2, 8):
        size = Size(n_layer, n_expert=16, hidden=512, ff=512, n_head=2, n_vocab=4200, sample_rows=2)
        model, work = tmp_path / f"model-{n_layer}", tmp_path / f"work-{n_layer}"
        write_sparse_checkpoint(model, size)
        given = ("--quantize-with", "none", "--sample-rows", "2", "--rows-only", "--types", "Q4_K", "--threads", "1")
        command = ("sensitivity", str(model), *given, "--work-dir", str(work), "--pre", "deepseek-v3")
        done = run([sys.executable, "-c", "from mopeq_edge.cli import main; main()", *command])
        peaks.append(done.peak_mib)
        table = read_table(work / "sensitivity-none.safetensors")
        assert (table.rows_only, table.sample_rows) == (True, 2)
        assert 0 < table.relative_error("weight-mse") < 1
        assert not (work / "hashes.json").exists()
    assert peaks[1] < peaks[0] + 8
