"""All stages on the bundled model: the budget to the byte, the same bytes again, and nothing computed twice."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from gguf import GGUFReader

from mopeq_edge import convert as convert_module
from mopeq_edge import pipeline, pipeline_calibrate
from mopeq_edge.artifacts import file_digest
from mopeq_edge.cli import cli
from mopeq_edge.errors import PlanError
from mopeq_edge.plan.artifact import id_runs
from mopeq_edge.runtime.locate import tool
from mopeq_edge.runtime.tools import run_tool

from .builders import build_olmoe

pytestmark = pytest.mark.runtime

BUDGET = 8_500_000
MEASURED = ("imatrix.gguf", "gradient.gguf", "routing.safetensors", "sensitivity-gradient.safetensors", "source.gguf")


@dataclass(frozen=True)
class Run:
    """The first conversion: its output, its work directory, what it printed and what it left there."""

    model: Path
    out: Path
    work: Path
    result: dict[str, Any]
    planned: dict[str, Any]
    validation: dict[str, Any]

    def convert(self, out: Path, gb: str) -> Result:
        """The same with another budget."""
        return invoke("convert", self.model, out, "--target-gb", gb, *self.options())

    def plan(self, gb: str, *args: object) -> Result:
        options = ("--work-dir", self.work, "--types", "k", "--json")
        return invoke("plan", self.model, "--target-gb", gb, *options, *args)

    def options(self) -> tuple[object, ...]:
        return ("--work-dir", self.work, "--types", "k", "--chunks", 12, "--threads", 2, "--no-report", "--json")


def invoke(*args: object) -> Result:
    return CliRunner().invoke(cli, [str(arg) for arg in args])


def printed(done: Result) -> dict[str, Any]:
    assert done.exception is None, done.exception
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.fixture(scope="module", autouse=True)
def few_chunks() -> Iterator[None]:
    """Two windows are enough to see that a file was measured."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(convert_module, "HELD_OUT_CHUNKS", 2)
        yield


@pytest.fixture(scope="module")
def first(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("convert")
    run = Run(tiny_model, folder / "out.gguf", folder / "work", {}, {}, {})
    result = printed(run.convert(run.out, "0.0085"))
    plan, validation = (json.loads((run.work / name).read_text()) for name in ("plan.json", "validation.json"))
    return replace(run, result=result, planned=plan, validation=validation)


def test_the_file_is_as_large_as_predicted_and_within_the_budget(first: Run) -> None:
    plan = first.planned
    size = first.out.stat().st_size
    assert size == first.result["file_bytes"] == first.result["predicted_file_bytes"] == plan["file_bytes"]
    # no tensor could have got a next larger type: steps are at most a stack, 16 x 256 blocks of some 60 bytes
    assert BUDGET - 150_000 < size <= BUDGET == first.result["budget_bytes"] == plan["budget_bytes"]
    assert first.result["optimality_gap"] < 0.01
    assert sorted(path.name for path in first.out.parent.iterdir()) == ["out.gguf", "work"]


def test_the_file_is_what_the_plan_says(first: Run) -> None:
    plan = first.planned
    reader = GGUFReader(first.out)
    found = {t.name: (t.tensor_type.name, [int(n) for n in t.shape], int(t.n_bytes)) for t in reader.tensors}
    # nbytes of the plan counts the padding; here every tensor is a multiple of 32 bytes
    assert found == {t["name"]: (t["type"], t["shape"], t["nbytes"]) for t in plan["tensors"]}
    assert len({kind for kind, _, _ in found.values()}) > 3
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["mopeq.plan.sha256"] == first.result["plan_sha256"]
    assert fields["quantize.imatrix.dataset"] == "calibration.txt"
    assert fields["quantize.imatrix.chunks_count"] == 12


def test_llama_quantize_writes_the_same_tensors(first: Run, tmp_path: Path) -> None:
    types, other = tmp_path / "types.txt", tmp_path / "other.gguf"
    printed(first.plan("0.0085", "--tensor-type-file", types))
    imatrix = (
        first.work / {"gradient": "gradient.gguf", "activation": "imatrix.gguf"}[first.result["imatrix"]["chosen"]]
    )
    run_tool(
        "llama-quantize",
        ["--imatrix", imatrix, "--tensor-type-file", types, first.work / "source.gguf", other, "Q4_K_M", "2"],
    )
    ours, theirs = ({t.name: t for t in GGUFReader(path).tensors} for path in (first.out, other))
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.tensor_type == theirs[name].tensor_type, name
        np.testing.assert_array_equal(tensor.data, theirs[name].data, err_msg=name)


def test_it_generates_in_llama_cpp(first: Run) -> None:
    options = ["-n", "12", "--temp", "0", "-no-cnv", "--no-warmup", "-t", "2", "--no-display-prompt"]
    # llama.cpp may end before its logging thread has printed everything: then there is nothing to judge
    for _ in range(6):
        done = subprocess.run(
            [tool("llama-completion"), "-m", first.out, "-p", "Once upon a time", *options],
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        if done.stdout.strip():
            break
    # a trained model says words, noise would be odd pieces and bytes
    words = done.stdout.replace("[end of text]", "").split()
    assert len(words) >= 4, done.stdout
    assert sum(word.strip(".,;:!?\"'-").isalpha() for word in words) >= len(words) / 2, done.stdout


def test_the_validation_says_what_evaluate_measures(first: Run) -> None:
    validation = dict(first.validation)
    assert (validation.pop("format"), validation.pop("version")) == ("mopeq-edge validation", 1)
    assert validation == first.result
    kld = first.result["imatrix"]["kld"]
    assert set(kld) == {"activation", "gradient"}
    assert kld[first.result["imatrix"]["chosen"]] == min(kld.values())
    evaluation = first.result["evaluation"]
    # the finished file is the better one of the two trials
    assert evaluation["kld_mean_nats"] == pytest.approx(min(kld.values()), rel=1e-6)
    text = ("--text", first.work / "held-out.txt", "--chunks", 2)
    again = printed(
        invoke(
            "evaluate", first.out, "--against", first.work / "source.gguf", *text, "--work-dir", first.work, "--json"
        )
    )
    assert again["kld_mean_nats"] == pytest.approx(evaluation["kld_mean_nats"], rel=1e-6)
    assert 0 < again["kld_mean_nats"] < 0.05
    assert again["positions_count"] == evaluation["positions_count"] == 2 * 255


def test_the_held_out_text_is_not_calibrated_on(first: Run, calibration_text: str) -> None:
    tail = (first.work / "held-out.txt").read_text(encoding="utf-8")
    assert calibration_text.removesuffix("\n").endswith(tail)
    assert 0.08 < len(tail) / len(calibration_text) < 0.12


def test_another_budget_computes_nothing_again(first: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **options: object) -> None:
        raise AssertionError("computed again")

    monkeypatch.setattr(pipeline_calibrate, "_calibrate", refuse)
    monkeypatch.setattr(pipeline, "measure_sensitivity", refuse)
    before = [(first.work / name).stat().st_mtime_ns for name in MEASURED]
    stages = json.loads((first.work / "stages.json").read_text())
    second = printed(first.convert(tmp_path / "second.gguf", "0.0075"))
    assert [(first.work / name).stat().st_mtime_ns for name in MEASURED] == before
    assert json.loads((first.work / "stages.json").read_text()) == stages
    assert 7_350_000 < second["file_bytes"] == (tmp_path / "second.gguf").stat().st_size <= 7_500_000
    assert second["predicted_damage"] > first.result["predicted_damage"]
    assert second["evaluation"]["kld_mean_nats"] > first.result["evaluation"]["kld_mean_nats"]
    assert second["imatrix"] == first.result["imatrix"]


def test_the_exact_minimum_works_and_one_byte_less_does_not(first: Run, tmp_path: Path) -> None:
    smallest = printed(invoke("inspect", first.model, "--types", "k", "--json"))["smallest_bytes"]
    out = tmp_path / "smallest.gguf"
    refused = first.convert(out, f"{(smallest - 1) / 1e9:.9f}")
    assert isinstance(refused.exception, PlanError)
    assert f"({smallest - 1} bytes): the smallest file these types and floors allow has {smallest} " in str(
        refused.exception
    )
    assert not out.exists()
    refused = first.plan(f"{(smallest - 1) / 1e9:.9f}")
    assert isinstance(refused.exception, PlanError)
    assert f"has {smallest} bytes" in str(refused.exception)
    done = printed(first.convert(out, f"{smallest / 1e9:.9f}"))
    assert done["file_bytes"] == out.stat().st_size == smallest


def test_a_larger_budget_never_hurts_more(first: Run, tmp_path: Path) -> None:
    plan = tmp_path / "plan.json"
    sizes, damages = [], []
    for megabytes in (6.3, 6.4, 7, 8, 8.5, 9, 11, 14, 20, 31, 40):
        found = printed(first.plan(f"{megabytes / 1e3}", "-o", plan))
        assert found["file_bytes"] <= found["budget_bytes"] == round(megabytes * 1e6)
        assert found["damage"] == pytest.approx(sum(t["damage"] for t in found["tensors"]), rel=1e-9)
        sizes.append(found["file_bytes"])
        damages.append(found["damage"])
    assert damages == sorted(damages, reverse=True)
    assert damages[0] > 2 * damages[3]
    # at last everything keeps its type and nothing is lost
    assert (damages[-1], sizes[-1]) == (0, found["largest_bytes"])


def test_emit_of_the_plan_is_the_same_file(first: Run, tmp_path: Path) -> None:
    out, chosen = tmp_path / "emitted.gguf", first.result["imatrix"]["chosen"]
    planned = printed(first.plan("0.0085"))
    assert planned["file_bytes"] == first.result["file_bytes"]
    done = printed(
        invoke("emit", first.model, out, "--work-dir", first.work, "--quantize-with", chosen, "--threads", 1, "--json")
    )
    assert done["file_bytes"] == done["predicted_file_bytes"] == first.result["file_bytes"]
    assert file_digest(out) == file_digest(first.out)
    other = {"gradient": "activation", "activation": "gradient"}[chosen]
    printed(invoke("emit", first.model, out, "--work-dir", first.work, "--quantize-with", other, "--force", "--json"))
    assert out.stat().st_size == first.out.stat().st_size
    assert file_digest(out) != file_digest(first.out)


def test_the_per_expert_layout(first: Run, tmp_path: Path) -> None:
    """As large as predicted, within the budget, with the bits of the stock layout, and what convert said of it."""
    said = first.result["forecast"]
    planned = printed(first.plan("0.0085", "--layout", "per-expert"))
    assert (said["damage"], said["file_bytes"]) == (planned["damage"], planned["file_bytes"])
    assert said["ratio"] == planned["damage"] / first.result["predicted_damage"] < 0.8
    assert (said["layout"], planned["forecast"]["layout"]) == ("per-expert", "stock")
    assert planned["forecast"]["ratio"] == said["ratio"]
    out = tmp_path / "out.gguf"
    done = printed(invoke("emit", first.model, out, "--work-dir", first.work, "--json"))
    assert out.stat().st_size == done["file_bytes"] == planned["file_bytes"] <= BUDGET
    stacks = printed(invoke("validate", out, "--json"))["stacks"]
    assert stacks
    for tensor in planned["tensors"]:
        found = stacks.get(tensor["name"], {"groups": []})["groups"]
        assert [g["type"] for g in tensor["groups"]] == [g["type"] for g in found]
        assert [g["experts"] for g in tensor["groups"]] == [id_runs(g["experts"]) for g in found]
    # the same plan with one type for all experts of a stack, a type at a time, has the same bits
    name = next(iter(stacks))
    tensors = {t.name: t for t in GGUFReader(out).tensors}
    plan = json.loads((first.work / "plan.json").read_text())
    for g, group in enumerate(stacks[name]["groups"]):
        whole = [
            {**t, "type": group["type"] if t["name"] == name else "BF16" if t["groups"] else t["type"], "groups": []}
            for t in plan["tensors"]
        ]
        (tmp_path / "plan.json").write_text(json.dumps({**plan, "tensors": whole}))
        arguments = ("--plan", tmp_path / "plan.json", "--work-dir", first.work, "--force")
        assert invoke("emit", first.model, tmp_path / "whole.gguf", *arguments).exception is None
        (stock,) = (t for t in GGUFReader(tmp_path / "whole.gguf").tensors if t.name == name)
        own = tensors[f"{name.removesuffix('.weight')}.{g}.weight"]
        np.testing.assert_array_equal(own.data, stock.data[group["experts"]])
    refused = first.plan("0.0085", "--layout", "per-expert", "--tensor-type-file", tmp_path / "types.txt")
    assert isinstance(refused.exception, PlanError)
    assert "llama-quantize writes the stock layout only" in str(refused.exception)


def test_a_plan_of_another_model_is_refused(first: Run, tmp_path: Path) -> None:
    model = build_olmoe(tmp_path / "model")
    plan = ("--plan", first.work / "plan.json", "--work-dir", tmp_path / "work")
    done = invoke("emit", model, tmp_path / "out.gguf", *plan)
    assert isinstance(done.exception, PlanError)
    assert "the plan was made for another model" in str(done.exception)
    assert not (tmp_path / "out.gguf").exists()


def test_threads_and_a_fresh_work_directory_change_no_byte(tmp_path: Path) -> None:
    """All artifacts are compared; the second model has another path, so no path may be in them."""
    model = build_olmoe(tmp_path / "model", hidden=256, ff=256, n_layer=1, n_expert=4)
    text = "The quick brown fox jumps over the lazy dog, and {} others look on.\n"
    (model / "calibration.txt").write_text("".join(text.format(n) for n in range(400)))
    digests = []
    for threads in (1, 2):
        place = tmp_path / f"{threads}" / "model"
        shutil.copytree(model, place)
        out, work = place.parent / "out.gguf", place.parent / "work"
        types = ("--types", "IQ2_XXS,Q2_K,IQ3_S,Q4_K,Q6_K", "--sample-rows", 40)
        options = (
            "--target-bpw",
            5.5,
            "--window",
            64,
            "--chunks",
            7,
            "--threads",
            threads,
            "--work-dir",
            work,
            "--no-report",
            "--json",
        )
        found = printed(invoke("convert", place, out, *options, *types))
        assert found["file_bytes"] == out.stat().st_size <= found["budget_bytes"]
        names = [*MEASURED, "plan.json", "imatrix-choice.json", "validation.json", "stages.json", "held-out.txt"]
        digests.append({path.name: file_digest(path) for path in [out, *(work / name for name in names)]})
    assert digests[0] == digests[1]


def test_what_runs_on_the_device_does_not_load_torch() -> None:
    code = """
import importlib, pkgutil, sys
import runtime_tests
names = ["mopeq_edge.cli.evaluate", "mopeq_edge.evaluate.run", "mopeq_edge.binding", "mopeq_edge.cli.runtime"]
names += ["mopeq_edge.cli.run", "mopeq_edge.runtime.choose", "mopeq_edge.llama_cpp.tree", "mopeq_edge.runtime.install"]
names += [m.name for m in pkgutil.walk_packages(runtime_tests.__path__, "runtime_tests.") if "__main__" not in m.name]
for name in names:
    importlib.import_module(name)
print(len(names), [name for name in ("torch", "transformers") if name in sys.modules])
"""
    root = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root)
    assert done.returncode == 0, done.stderr
    count, loaded = done.stdout.split(maxsplit=1)
    assert int(count) >= 9
    assert loaded.strip() == "[]"
