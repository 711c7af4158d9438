"""From a checkpoint to a file by the weights alone, and what a dry run tells before."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from mopeq_edge.cli import cli

from .source.test_described import SMALL

pytestmark = pytest.mark.runtime


def printed(*args: object) -> Any:
    done = CliRunner().invoke(cli, [str(arg) for arg in args], catch_exceptions=False)
    return json.loads(done.stdout)


def test_without_a_calibration(tmp_path: Path) -> None:
    from tools.sparse_checkpoint import write_sparse_checkpoint

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
