"""Reports: written, read, refused, compared; and the command that compares them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from mopeq_edge.cli import cli
from mopeq_edge.device_report.compare import compare
from mopeq_edge.device_report.document import Report, TestResult, is_report, read_report, write_report
from mopeq_edge.errors import FormatError

SPEED = "test_speed.py::test_speed"
GREEDY = "test_generation.py::test_greedy_text_is_the_same_twice[7]"
CHAT = "test_server.py::test_it_chats"


def make(**changes: Any) -> Report:
    values: dict[str, Any] = {
        "mopeq_edge_version": "0.1.0",
        "device": {"board": "Orin", "gpus": [{"name": "Orin", "driver_version": None}], "power_mode": "15W (0)"},
        "llama_cpp": {"version": "0.5.0", "devices": []},
        "model": {"name": "out.gguf", "header_sha256": "aa", "file_bytes": 10},
        "options": {"threads_count": 6},
        "tests": (
            TestResult(SPEED, "passed", 1.0, None, {"generated_tokens_per_second": 20.0, "peak_bytes": None}),
            TestResult(GREEDY, "passed", 0.5, None, {"kld_mean_nats": 0.0}, {"greedy_text": "a b c", "remark": "x"}),
            TestResult(CHAT, "skipped", 0.0, "the file has no chat template"),
        ),
    }
    return Report(**{**values, **changes})


OTHER = make(
    device={"board": "laptop", "gpus": [], "power_mode": None},
    tests=(
        TestResult(SPEED, "passed", 1.0, None, {"generated_tokens_per_second": 50.0, "peak_bytes": 3.0}),
        TestResult(GREEDY, "failed", 0.5, "AssertionError", {"kld_mean_nats": 0.5}, {"greedy_text": "a b d"}),
    ),
)


def test_written_and_read_again(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_report(path, make())
    assert read_report(path) == make()
    assert json.loads(path.read_text())["outcome"] == {"passed_count": 2, "failed_count": 0, "skipped_count": 1}
    assert is_report(path)


def test_numbers_that_json_has_no_word_for(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    figures = {"a_nats": math.nan, "b_nats": math.inf, "c_nats": 1.5}
    write_report(path, make(tests=(TestResult("t", "failed", 0.0, "bad \ud800 text", figures),)))
    assert read_report(path).tests[0].figures == {"a_nats": None, "b_nats": None, "c_nats": 1.5}


def broken(**changes: Any) -> str:
    return json.dumps({**make().as_dict(), **changes})


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "found no JSON"),
        ("[" * 100_000, "found no JSON"),
        ("[]", "found other JSON"),
        ('{"kind": "imatrix"}', "found other JSON"),
        (broken(format=2), "is a report of format 2, expected 1"),
        (broken(format=None), "is a report of format None"),
        (broken(device=None), "a damaged report"),
        (broken(tests=[{}]), "a damaged report"),
        (broken(tests=[{**make().as_dict()["tests"][0], "outcome": "maybe"}]), "outcome 'maybe'"),
        (broken(tests=[{**make().as_dict()["tests"][0], "figures": {"a": "b"}}]), "a damaged report"),
    ],
)
def test_what_is_no_report(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(FormatError) as caught:
        read_report(path)
    assert said in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_two_side_by_side() -> None:
    found = compare(make(), OTHER)
    assert found.same_file
    values = {f"{v.section}.{v.name}": (v.first, v.second) for v in found.values if v.differs}
    assert values == {
        "device.board": ("Orin", "laptop"),
        "device.gpus.0.name": ("Orin", None),
        "device.power_mode": ("15W (0)", None),
    }
    assert [(o.name, o.first, o.second, o.contradicts) for o in found.outcomes] == [
        (GREEDY, "passed", "failed", True),
        (CHAT, "skipped", "not run", False),
    ]
    assert {f.name: (f.first, f.second, f.ratio) for f in found.figures} == {
        "generated_tokens_per_second": (20.0, 50.0, 2.5),
        "peak_bytes": (None, 3.0, None),
        "kld_mean_nats": (0.0, 0.5, None),
    }
    assert [(t.name, t.first, t.second, t.same_words) for t in found.texts] == [("greedy_text", "a b c", "a b d", 2)]


def test_the_same_twice() -> None:
    found = compare(make(), make())
    assert (found.outcomes, found.texts) == ((), ())
    assert not any(value.differs for value in found.values)
    assert not compare(make(), make(model={"name": "out.gguf", "header_sha256": "bb", "file_bytes": 10})).same_file


def run(*args: object) -> tuple[int, str]:
    done = CliRunner().invoke(cli, ["validate", *map(str, args)])
    return done.exit_code, done.stdout if done.exception is None or done.exit_code == 1 else str(done.exception)


def test_the_command(tmp_path: Path) -> None:
    a, b = tmp_path / "a.json", tmp_path / "b.json"
    write_report(a, make())
    write_report(b, OTHER)
    status, said = run("--compare", a, b)
    assert status == 1
    assert f"1 passed in one and failed in the other: {GREEDY}" in said
    assert "2.5" in said
    assert "a b d" in said
    status, said = run("--compare", a, a)
    assert status == 0
    assert "No test passed in one and failed in the other." in said
    status, said = run("--compare", a, b, "--json")
    assert status == 1
    assert [one["contradicts"] for one in json.loads(said)["outcomes"]] == [True, False]


def test_the_command_s_errors(tmp_path: Path) -> None:
    a, b = tmp_path / "a.json", tmp_path / "b.json"
    write_report(a, make())
    b.write_text("{}")
    for args, said in (
        (("--compare", a, b), "found other JSON"),
        (("--compare", a, tmp_path / "none.json"), "cannot be read"),
        (("--compare", a, a, "out.gguf"), "takes two reports and nothing else"),
    ):
        done = CliRunner().invoke(cli, ["validate", *map(str, args)])
        assert done.exit_code == 1
        assert isinstance(done.exception, Exception)
        assert said in str(done.exception)
    assert CliRunner().invoke(cli, ["validate"]).exit_code == 2
    assert CliRunner().invoke(cli, ["validate", "--compare", str(a)]).exit_code == 2
