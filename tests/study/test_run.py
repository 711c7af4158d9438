"""A study that is stopped goes on where it was: nothing is lost, nothing is run twice."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mopeq_edge.expert_groups.read import read_groups
from mopeq_edge.gguf_file import read_header
from mopeq_edge.progress import SilentProgress
from mopeq_edge.study import run
from mopeq_edge.study.cases import Case
from mopeq_edge.study.rows import Row, RowFile

from ..builders import build_olmoe
from .test_rows import ROW

PROGRAM = [sys.executable, "-c", "from mopeq_edge.cli import main; main()"]
N_EXPERT = 4


@dataclass
class Counted:
    """Stands for a setup; ``measured`` are the cases that were run."""

    made_from: str = "a"
    stop_at: str = ""
    measured: list[str] = field(default_factory=list)

    @property
    def context(self) -> Any:
        return self

    progress = SilentProgress()

    def measure(self, setup: Any, case: Case, made_from: str, keep: bool) -> Row:
        if case.name == self.stop_at:
            raise KeyboardInterrupt
        self.measured.append(case.name)
        return replace(ROW, case=case.name, made_from=made_from, seconds=float(len(self.measured)))


def case(name: str) -> Case:
    return Case(name, "control", "llama-quantize", "", "stock", 100, preset=name)


def test_what_is_finished_is_not_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cases, path, setup = [case(name) for name in "abcd"], tmp_path / "study.csv", Counted(stop_at="c")
    monkeypatch.setattr(run, "_run", setup.measure)
    with pytest.raises(KeyboardInterrupt):
        run.run_cases(setup, cases, RowFile(path))  # type: ignore[arg-type]
    first = path.read_text()
    setup.stop_at = ""
    rows = run.run_cases(setup, cases, RowFile(path))  # type: ignore[arg-type]
    assert setup.measured == list("abcd")
    assert [row.case for row in rows] == list("abcd")
    assert path.read_text().startswith(first)
    # another text, model or number of windows: all again, and the rows are replaced
    setup.made_from = "b"
    run.run_cases(setup, cases[:2], RowFile(path))  # type: ignore[arg-type]
    assert setup.measured == list("abcdab")
    assert len(path.read_text().splitlines()) == 5


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One layer of four experts that take K-types, with texts beside it."""
    sizes = {"hidden": 256, "ff": 256, "n_layer": 1, "n_expert": N_EXPERT}
    directory = build_olmoe(tmp_path_factory.mktemp("study") / "model", **sizes)
    for name in ("calibration.txt", "evaluation.txt"):
        (directory / name).write_text(f"The quick brown fox of {name} jumps over the lazy dog.\n" * 60)
    return directory


def arguments(model: Path, work: Path, *more: str) -> list[str]:
    few = ["--window", "64", "--chunks", "4", "--types", "k", "--eval-ctx", "32", "--windows", "4", "--threads", "1"]
    return [*PROGRAM, "study", str(model), "--work-dir", str(work), "--pre", "gpt-2", *few, *more]


def rows(work: Path) -> dict[str, dict[str, str]]:
    path = work / "study.csv"
    return {row["case"]: row for row in csv.DictReader(path.open())} if path.exists() else {}


@pytest.mark.runtime
def test_a_killed_study_goes_on(model: Path, tmp_path: Path) -> None:
    grid = ["--budgets", "0.0025,0.0028", "--sensitivities", "fisher,weight-mse", "--seeds", "2", "--json"]
    command = arguments(model, tmp_path, *grid)
    running = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    until = time.monotonic() + 240
    while len(rows(tmp_path)) < 3 and running.poll() is None and time.monotonic() < until:
        time.sleep(0.02)
    assert running.poll() is None, running.communicate()[1]
    os.kill(running.pid, signal.SIGKILL)
    running.wait()
    before = rows(tmp_path)
    assert len(before) >= 3
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    after = rows(tmp_path)
    assert len(after) > len(before)
    # with its seconds: it was not measured again
    assert {name: after[name] for name in before} == before
    assert json.loads(done.stdout)
    assert not (tmp_path / "study").exists()
    for name, row in after.items():
        windows = [float(cell) for cell in row["kld_by_window"].split()]
        assert np.mean(windows) == pytest.approx(float(row["kld_mean"]), rel=1e-4), name
        assert int(row["file_bytes"]) <= int(row["budget_bytes"]), name
    for budget in ("2500000", "2800000"):
        for layout in ("stock", "per-expert"):
            sizes = {
                after[f"{budget}-{layout}-{label}"]["file_bytes"]
                for label in ("knapsack-fisher", "random-1", "random-2", "inverse")
            }
            assert len(sizes) == 1


@pytest.mark.runtime
@pytest.mark.parametrize("unit", ["expert", "projection"])
def test_ground_truth_quantizes_one_unit_at_a_time(model: Path, tmp_path: Path, unit: str) -> None:
    command = arguments(model, tmp_path, "--ground-truth", unit, "--type", "Q2_K", "--keep", "--json")
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    experts = {name: set[int]() for name in ("gate", "up", "down")}
    files = sorted((tmp_path / "study").iterdir())
    assert len(files) == (N_EXPERT if unit == "expert" else 3)
    for path in files:
        header = read_header(path)
        changed = [t for t in header.tensors if t.type.name == "Q2_K"]
        stacks = {stack.name: stack for stack in read_groups(header)}
        if unit == "projection":
            assert [t.name for t in changed] == [f"blk.0.ffn_{path.stem.split('-')[-1]}_exps.weight"]
            continue
        expert = int(path.stem.split("-")[-1])
        assert len(changed) == 3
        for projection, seen in experts.items():
            small = stacks[f"blk.0.ffn_{projection}_exps.weight"].groups[0]
            assert (small.type.name, small.experts) == ("Q2_K", (expert,))
            seen.add(expert)
    if unit == "expert":
        assert all(seen == set(range(N_EXPERT)) for seen in experts.values())
    found = {(one["score"], one["scope"]): one["n"] for one in json.loads(done.stdout)}
    assert found["fisher", "all"] == len(files)
    assert (("mopeq alone", "layer 0") in found) == (unit == "expert")
    measured = list(csv.DictReader((tmp_path / "ground-truth.csv").open()))
    assert all(float(row["kld_mean"]) > 0 for row in measured)
    # what the table predicts for the tensors that the file has
    assert all(float(row["predicted_own"]) > 0 for row in measured)
