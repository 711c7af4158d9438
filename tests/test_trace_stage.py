"""``--trace`` through the stages: measured once, kept with its own hash, priced, and asked for in vain."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from mopeq_edge.calibrate import trace
from mopeq_edge.calibrate.traces import read_traces
from mopeq_edge.cli import cli
from mopeq_edge.errors import CalibrationError
from mopeq_edge.sensitivity.table import read_table

from .builders import build_olmoe

pytestmark = pytest.mark.runtime

CALIBRATION = ("--window", 32, "--chunks", 3, "--pre", "gpt-2")
UP = "blk.1.ffn_up_exps.weight"


def invoke(*args: object) -> Result:
    return CliRunner().invoke(cli, [str(arg) for arg in args])


def printed(*args: object) -> dict[str, Any]:
    done = invoke(*args, "--json")
    assert done.exception is None, done.exception
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = build_olmoe(tmp_path_factory.mktemp("trace") / "model", hidden=256, ff=256, n_expert=4)
    (directory / "calibration.txt").write_text("The quick brown fox jumps over the lazy dog.\n" * 20)
    return directory


def test_from_calibrate_to_a_plan(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work = ("--work-dir", tmp_path / "work")
    options = (*CALIBRATION, *work, "--trace", "--probes", 3, "--trace-chunks", 2)
    said = printed("calibrate", model, *options)
    kept = tmp_path / "work" / "trace.safetensors"
    assert said["files"]["trace.safetensors"] == str(kept)
    assert (said["trace"]["probes"], said["trace"]["tokens"]) == (3, 64)
    traces = read_traces(kept)
    assert said["trace"]["clamped"] == list(traces.clamped)

    def refuse(*args: object, **given: object) -> None:
        raise AssertionError("measured again")

    with monkeypatch.context() as patch:
        patch.setattr(trace, "measure_traces", refuse)
        assert printed("calibrate", model, *options) == said
        # without asking for them they stay, and other probes are another measurement
        assert printed("calibrate", model, *CALIBRATION, *work) == said
        assert str(invoke("calibrate", model, *options, "--seed", 2).exception) == "measured again"

    printed("sensitivity", model, *work, "--types", "Q3_K,Q4_K", "--pre", "gpt-2")
    table = read_table(tmp_path / "work" / "sensitivity-gradient.safetensors")
    damage = table.errors[UP].damage
    np.testing.assert_allclose(damage["trace"], 0.5 * traces.mean_diagonal[UP] * damage["weight-mse"], rtol=1e-12)
    other = table.errors["blk.1.attn_q.weight"].damage
    np.testing.assert_array_equal(other["trace"], other["fisher"])
    plan = ("plan", model, *work, "--types", "Q3_K,Q4_K", "--pre", "gpt-2", "--target-gb", 1)
    made = printed(*plan, "--sensitivity", "trace")
    assert (made["sensitivity"], made["unit"]) == ("trace", "nats per token")


def test_traces_of_another_checkpoint_do_not_count(model: Path, tmp_path: Path) -> None:
    work = ("--work-dir", tmp_path / "work")
    printed("calibrate", model, *CALIBRATION, *work, "--trace", "--probes", 2, "--trace-chunks", 1)
    other = build_olmoe(tmp_path / "other", hidden=256, ff=256, n_expert=4, seed=1)
    assert printed("calibrate", other, *CALIBRATION, *work, "--text", model / "calibration.txt")["trace"] is None


def test_asked_for_without_the_artifact(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work = ("--work-dir", tmp_path / "work")
    printed("calibrate", model, *CALIBRATION, *work)
    printed("sensitivity", model, *work, "--types", "Q4_K", "--pre", "gpt-2")
    needed = "sensitivity 'trace' needs Hessian traces, and none were measured: run calibrate --trace"
    ask = ("--target-gb", 1, "--sensitivity", "trace", *work)
    for args in (
        ("plan", model, *ask, "--pre", "gpt-2"),
        ("convert", model, tmp_path / "out.gguf", *CALIBRATION, *ask),
    ):
        error = invoke(*args).exception
        assert isinstance(error, CalibrationError)
        assert str(error).startswith(needed)
    assert not (tmp_path / "out.gguf").exists()


def test_what_cannot_be_traced(model: Path, bf16_gguf: Path, tmp_path: Path) -> None:
    text = ("--text", model / "calibration.txt", "--trace", "--work-dir", tmp_path / "work")
    for args in ((model, *CALIBRATION, *text, "--no-fisher"), (bf16_gguf, *text)):
        error = invoke("calibrate", *args).exception
        assert isinstance(error, CalibrationError)
        assert "--trace needs --fisher on the text of a Hugging Face directory" in str(error)
