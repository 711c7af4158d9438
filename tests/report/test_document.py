"""The numbers of a report against those that its artifacts were made with, and what belongs to another file."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from mopeq_edge.cli import cli
from mopeq_edge.errors import ExtraMissingError, FormatError, MopeqError, OutputError
from mopeq_edge.ggml.types import BY_NAME
from mopeq_edge.gguf_file import read_header
from mopeq_edge.plan.artifact import ids_of, write_plan
from mopeq_edge.report.page import page_data, script_json
from mopeq_edge.report.presets import dry_run_types
from mopeq_edge.sensitivity.table import write_table
from mopeq_edge.study.rows import RowFile

from ..commands import run_json
from ..study.test_rows import ROW
from .models import EVALUATION, UNREACHED, Made, make, write_validation


@pytest.fixture
def made(tmp_path: Path) -> Made:
    return make(tmp_path)


def run(*args: object) -> Result:
    return CliRunner().invoke(cli, ["report", *map(str, args)])


def numbers(*args: object) -> dict[str, Any]:
    return run_json("report", *args, "--json")


def test_overview_and_sizes(made: Made) -> None:
    found = numbers(made.file, "--points", 0)
    got = found["overview"]
    assert got["file_bytes"] == made.file.stat().st_size == sum(row["nbytes"] for row in found["sizes"])
    assert got["budget_bytes"] - got["file_bytes"] == 1000
    assert got["predicted_damage"] == made.plan.damage
    assert {key: got["measured"][key] for key in EVALUATION} == EVALUATION
    assert "0.61 times the predicted damage" in got["forecast"]
    # by hand from the header
    header = read_header(made.file)
    experts = [t for t in header.tensors if "_exps." in t.name and not t.name.endswith(".map")]
    sizes = {row["kind"]: row for row in found["sizes"]}
    assert sizes["routed experts"]["nbytes"] == sum(t.nbytes for t in experts)
    assert sizes["routed experts"]["n_weights"] == 4 * 3 * 16 * 256 * 256
    assert sizes["embedding"]["nbytes"] == 64 * BY_NAME["Q6_K"].nbytes(256)
    assert sizes["header"]["nbytes"] == header.data_start
    assert sizes["attention"]["n_tensors"] == 16


def test_every_expert(made: Made) -> None:
    found = numbers(made.file, "--points", 0)["experts"]
    assert (found["layers"], found["n_expert"], found["projections"]) == ([0, 1, 2, 3], 16, ["gate", "up", "down"])
    planned = {tensor.name: tensor for tensor in made.plan.tensors}
    for stack in found["stacks"]:
        name = f"blk.{stack['layer']}.ffn_{stack['projection']}_exps.weight"
        errors = made.table.errors[name]
        for group in planned[name].groups:
            for expert in ids_of(group.experts):
                assert stack["types"][expert] == group.type
                damage = errors.damage["fisher"][errors.types.index(group.type), expert]
                assert stack["damage"][expert] == pytest.approx(damage, rel=1e-3)
        # the type nearest to 3.44 bits
        assert stack["reference_type"] == "Q3_K"
        middle = errors.damage["fisher"][errors.types.index("Q3_K")]
        assert stack["sensitivity"] == pytest.approx(middle, rel=1e-3)
    assert sum(found["matrices_by_type"].values()) == 4 * 3 * 16
    assert found["tokens"] == {str(n): made.routing.counts[n].tolist() for n in range(4)}


def test_coverage_names_what_was_never_routed_to(made: Made) -> None:
    found = numbers(made.file, "--points", 0)["coverage"]
    assert found["unrouted"] == 1
    assert [layer["unrouted"] for layer in found["layers"]] == [[UNREACHED], [], [], []]
    counts = made.routing.counts[2]
    layer = found["layers"][2]
    assert (layer["least"], layer["median"], layer["most"]) == (counts.min(), np.median(counts), counts.max())


def test_routers_are_read_from_validate(made: Made) -> None:
    found = numbers(made.file, "--points", 0, "--validation", made.checks)["routers"]
    assert [(row["same"], row["ties"], row["wrong"]) for row in found] == [
        (64, 0, 0),
        (63, 1, 0),
        (62, 2, 0),
        (64, 0, 0),
    ]
    without = numbers(made.file, "--points", 0)["routers"]
    assert without["command"].startswith("mopeq-edge validate model.gguf --json")


def test_replans_lie_on_a_falling_curve(made: Made) -> None:
    found = numbers(made.file, "--points", 3)["curve"]
    assert found["score"] == "fisher"
    for layout in ("stock", "per-expert"):
        own = [point for point in found["points"] if point["layout"] == layout]
        sizes, damages = [p["file_bytes"] for p in own], [p["damage"] for p in own]
        assert sizes == sorted(sizes)
        assert damages == sorted(damages, reverse=True)
        assert len(own) == 3


def test_a_replan_with_the_plan_s_own_rules_is_recognised(made: Made) -> None:
    from mopeq_edge.plan.budget import Budget
    from mopeq_edge.plan.candidates import FLOORS
    from mopeq_edge.plan.make import make_plan
    from mopeq_edge.plan.options import PlanOptions
    from mopeq_edge.progress import SilentProgress
    from mopeq_edge.report.replan import planned_source, replan

    header = read_header(made.file)
    source = planned_source(made.plan, made.table, header)
    types = tuple(BY_NAME[name] for name in made.plan.types)
    options = PlanOptions("fisher", types, FLOORS, "per-expert")
    plan = make_plan(source, made.table, source.kvs, Budget(nbytes=made.plan.budget_bytes), options)
    assert replan(plan, made.table, header, 2, SilentProgress()).same_rules
    worse = replace(plan, damage=plan.damage / 2)
    assert not replan(worse, made.table, header, 2, SilentProgress()).same_rules


def test_memory_rises_with_the_context(made: Made) -> None:
    found = numbers(made.file, "--points", 0)["memory"]
    rows = [row for row in found["rows"] if (row["cache_type"], row["cpu"]) == ("F16", "x86 with AVX2")]
    assert [row["n_ctx"] for row in rows] == [2048, 4096]
    # by hand: K and V of 4 layers, 256 numbers of 2 bytes a token
    assert [row["cache"] for row in rows] == [2 * 4 * 256 * 2 * 2048, 2 * 4 * 256 * 2 * 4096]
    assert rows[1]["needed"] - rows[0]["needed"] >= rows[0]["cache"]
    assert found["command"].startswith("llama-server -m model.gguf --ctx-size 2048")


def test_a_work_directory_finds_its_file_and_a_plan_does_alone(made: Made) -> None:
    assert numbers(made.work, "--points", 0) == numbers(made.file, "--points", 0)
    made.file.unlink()
    found = numbers(made.work, "--points", 0)
    assert found["overview"]["file_bytes"] == sum(row["nbytes"] for row in found["sizes"]) == made.plan.file_bytes
    assert found["experts"]["stacks"][0]["damage"] is not None
    assert found["memory"]["command"] == "mopeq-edge emit MODEL OUT"


def test_a_file_alone_shows_what_it_says_itself(made: Made, tmp_path: Path) -> None:
    alone = tmp_path / "elsewhere" / "model.gguf"
    alone.parent.mkdir()
    made.file.rename(alone)
    found = numbers(alone)
    assert found["overview"]["budget_bytes"] is None
    assert found["overview"]["measured"] is None
    assert {"missing", "command"} == found["curve"].keys() == found["coverage"].keys() == found["presets"].keys()
    assert found["experts"]["stacks"][0]["damage"] is None
    assert sum(found["experts"]["matrices_by_type"].values()) == 4 * 3 * 16
    assert run(alone).exit_code == 0
    page = (alone.parent / "model.report.html").read_text()
    assert "Not measured" in page
    # what is shown to others names no place on this machine
    assert str(tmp_path) not in page


def test_measurements_of_another_run_are_left_out(made: Made) -> None:
    write_validation(made.work, made.plan, made.file, plan_sha256="0" * 64)
    assert numbers(made.file, "--points", 0)["overview"]["measured"] is None
    name = "blk.1.ffn_up_exps.weight"
    errors = made.table.errors[name]
    other = replace(errors, damage={"fisher": errors.damage["fisher"] * 1.01})
    path = made.work / "sensitivity-activation.safetensors"
    write_table(replace(made.table, errors={**made.table.errors, name: other}), path)
    found = numbers(made.file)
    assert found["experts"]["score"] is None
    assert name in found["curve"]["missing"]
    write_plan(replace(made.plan, made_from="other"), made.work / "plan.json")
    assert numbers(made.file)["overview"]["planner"] == ""


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("[]", "expected what mopeq-edge validate"),
        ("{", "cannot be read as JSON"),
        ('{"checks": [], "file_bytes": 1}', "is of a file of 1 bytes"),
        ('{"checks": [], "file_bytes": SIZE}', "has no 'routing'"),
        ('{"checks": [], "file_bytes": SIZE, "routing": [{"layer": 0}]}', "not as validate"),
        (
            '{"checks": [], "file_bytes": SIZE, "routing": '
            '[{"layer": 0, "tokens": 9, "same": 1, "ties": 0, "wrong": 0, "noise": 0}]}',
            "does not add up",
        ),
    ],
)
def test_results_of_something_else_are_refused(made: Made, body: str, said: str) -> None:
    made.checks.write_text(body.replace("SIZE", str(made.plan.file_bytes)))
    done = run(made.file, "--validation", made.checks, "--points", 0)
    assert isinstance(done.exception, FormatError)
    assert said in str(done.exception)
    assert not made.file.with_name("model.report.html").exists()


def test_bad_artifacts_are_one_line(made: Made, tmp_path: Path) -> None:
    write_validation(made.work, made.plan, made.file, evaluation={**EVALUATION, "kld_max_nats": "low"})
    done = run(made.file, "--points", 0)
    assert isinstance(done.exception, FormatError)
    assert "kld_max_nats" in str(done.exception)
    write_validation(made.work, made.plan, made.file, forecast={"ratio": "<b>"})
    assert isinstance(run(made.file, "--points", 0).exception, FormatError)
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "expected a work directory with a plan.json" in str(run(empty).exception)
    assert isinstance(run(tmp_path / "none.gguf").exception, MopeqError)
    # an output of a validation does not lead out of the directory
    write_validation(made.work, made.plan, made.file, output="../model.gguf")
    assert numbers(made.work, "--points", 0)["memory"].keys() == {"missing", "command"}


def test_output_is_not_replaced_unasked_and_is_the_same_each_time(made: Made) -> None:
    page = made.file.with_name("model.report.html")
    assert run(made.file, "--points", 2).exit_code == 0
    first = page.read_bytes()
    assert isinstance(run(made.file, "--points", 2).exception, OutputError)
    assert run(made.file, "--points", 2, "--force").exit_code == 0
    assert page.read_bytes() == first
    assert isinstance(run(made.file, "-o", made.file, "--force").exception, OutputError)


def test_without_the_library(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jinja2", None)
    done = run(made.file)
    assert isinstance(done.exception, ExtraMissingError)
    assert "jinja2, which is not installed" in str(done.exception)
    # numbers need none
    assert numbers(made.file, "--points", 0)["name"] == "model.gguf"


def test_types_of_a_dry_run() -> None:
    said = """main: quantizing
[   1/   3] blk.0.ffn_down_exps.weight - [  256,   256,    16,     1], type =   bf16, size =     2.00 MiB ->     0.43 MiB (q3_K)
[   2/   3] output_norm.weight                   - [  256,     1,     1,     1], type =    f32, size =    0.001 MiB
[   3/   3] token_embd.weight                    - [  256,  4352,     1,     1], type =   bf16, size =     2.12 MiB ->     0.87 MiB (q6_K)
"""  # noqa: E501
    assert {n: k.name for n, k in dry_run_types(said).items()} == {
        "blk.0.ffn_down_exps.weight": "Q3_K",
        "token_embd.weight": "Q6_K",
    }
    for wrong in ("", "[ 1/ 1] a.weight - [1], type = f32, size = 1 MiB -> 1 MiB (q99)"):
        with pytest.raises(FormatError, match="--dry-run"):
            dry_run_types(wrong)


class _Elements(HTMLParser):
    """Names of all elements, and those of attributes that run something."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names += [tag, *(name for name, _ in attrs if name.startswith("on"))]


def test_texts_of_artifacts_are_text(made: Made) -> None:
    """Also in charts, where another library writes them."""
    hostile = '</text><script>alert(1)</script>"><img src=x onerror=alert(1)>'
    made.file.unlink()
    write_plan(replace(made.plan, unit=hostile, planner=hostile, made_from=hostile), made.work / "plan.json")
    done = run(made.work, "-o", made.file.with_name("r.html"), "--points", 0)
    assert done.exit_code == 0, done.exception
    page = made.file.with_name("r.html").read_text(encoding="utf-8")
    found = _Elements()
    found.feed(page)
    # the numbers and our own
    assert found.names.count("script") == 2
    assert not {"img", "onerror"} & set(found.names)
    assert page.count("alert(1)") >= 4
    plain = hostile.replace("</text>", "")
    assert plain not in page


def test_what_study_measured(made: Made) -> None:
    RowFile(made.work / "study.csv").put(replace(ROW, case="7000000-preset-Q2_K", planner="llama-quantize"))
    (found,) = numbers(made.file, "--points", 0)["studied"]
    assert (found["name"], found["kld_mean"], found["file_bytes"]) == (
        "llama-quantize Q2_K",
        ROW.kld_mean,
        ROW.file_bytes,
    )


def test_json_cannot_end_its_element() -> None:
    text = script_json({"</script><script>": "<!-- & \u2028"})
    assert not set("<>&\u2028") & set(text)
    assert json.loads(text) == {"</script><script>": "<!-- & \u2028"}


def test_data_of_the_page_says_the_same(made: Made) -> None:
    from mopeq_edge.report.artifacts import read_artifacts
    from mopeq_edge.report.experts import expert_map

    experts = expert_map(read_artifacts(made.file))
    data = page_data(experts)
    for stack in experts.stacks:
        own, row = data["projections"][stack.projection], data["layers"].index(stack.layer)
        names = [data["types"][data["codes"].index(code)]["name"] for code in own["types"][row]]
        assert tuple(names) == stack.types
        assert own["damage"][row] == pytest.approx(stack.damage, rel=1e-3)
