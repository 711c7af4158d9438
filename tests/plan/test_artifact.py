"""plan.json from a stranger: one line for each field that is not what it must be, before anything has its size."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from mopeq_edge.errors import FormatError
from mopeq_edge.plan.artifact import MAX_EXPERTS, ids_of, read_plan, write_plan
from tools.fuzz import seeds


def document(tmp_path: Path) -> dict[str, Any]:
    write_plan(seeds.plan(), tmp_path / "good.json")
    found: dict[str, Any] = json.loads((tmp_path / "good.json").read_text())
    return found


def test_the_plan_that_is_changed_below(tmp_path: Path) -> None:
    document(tmp_path)
    assert read_plan(tmp_path / "good.json") == seeds.plan()


def tensor(number: int, **changes: Any) -> Any:
    return lambda plan: plan["tensors"][number].update(changes)


def group(number: int, **changes: Any) -> Any:
    return lambda plan: plan["tensors"][1]["groups"][number].update(changes)


CHANGES: dict[str, tuple[Any, str]] = {
    "size as text": (lambda plan: plan.update(file_bytes="5000"), "file_bytes is '5000'"),
    "size below zero": (lambda plan: plan.update(file_bytes=-1), "file_bytes is -1"),
    "huge size": (lambda plan: plan.update(header_bytes=10**30), "header_bytes is 1000"),
    "true for a number": (lambda plan: plan.update(n_weights=True), "n_weights is True"),
    "no weights": (lambda plan: plan.update(n_weights=0), "n_weights is 0"),
    "damage as text": (lambda plan: plan.update(damage="0"), "damage is '0'"),
    "layout": (lambda plan: plan.update(layout="other"), "layout is 'other'"),
    "layout as a list": (lambda plan: plan.update(layout=[]), r"layout is \[\]"),
    "types": (lambda plan: plan.update(types=["Q9_K"]), r"types is \['Q9_K'\]"),
    "missing": (lambda plan: plan.pop("gap"), "'gap' is missing"),
    "more": (lambda plan: plan.update(colour="blue"), "'colour' is not known"),
    "tensors": (lambda plan: plan.update(tensors={}), r"tensors is \{\}"),
    "tensor as text": (lambda plan: plan.update(tensors=["x"]), "expected an object, found str"),
    "tensor twice": (tensor(0, name="blk.0.ffn_up_exps.weight"), "'blk.0.ffn_up_exps.weight' appears twice"),
    "long name": (tensor(0, name="x" * 64), "name is 'xxx"),
    "name with a line": (tensor(0, name="a\nb"), r"name is 'a\\nb'"),
    "name of digits": (tensor(0, name=f"blk.{'9' * 5000}.x"), "name is 'blk.999"),
    "shape": (tensor(0, shape=[0, 1]), r"shape is \[0, 1\]"),
    "shape below zero": (tensor(0, shape=[-32]), r"shape is \[-32\]"),
    "five axes": (tensor(0, shape=[1] * 5), r"shape is \[1, 1, 1, 1, 1\]"),
    "type": (tensor(0, type="Q9_K"), "type is 'Q9_K'"),
    "type as a list": (tensor(0, type=["Q4_K"]), r"type is \['Q4_K'\]"),
    "part of a block": (tensor(0, shape=[33, 2]), "'output.weight': rows of 33 in Q8_0"),
    "mixed without groups": (tensor(0, type="mixed"), "'output.weight': of type 'mixed' in no groups"),
    "groups of one type": (tensor(1, type="Q8_0"), "of type 'Q8_0' in 2 groups"),
    "groups of a matrix": (tensor(1, shape=[32, 32]), r"a stack of shape \[32, 32\], expected three axes"),
    "a million experts": (tensor(1, shape=[32, 32, 10**6]), f"at most {MAX_EXPERTS} experts"),
    "an expert too many": (group(0, experts="0,2,4"), "experts '0,2,4', expected rising numbers below 4"),
    "far too many": (group(0, experts="0-99999999999"), "experts '0-99999999999', expected rising"),
    "many": (group(0, experts="0-999999999"), "experts '0-999999999', expected rising numbers below 4"),
    "an expert twice": (group(0, experts="0-2"), "its groups hold 5 experts, expected each of 4 once"),
    "an expert in no group": (group(0, experts="0"), "its groups hold 3 experts"),
    "not the shortest form": (group(0, experts="0-0,2"), "expected the shortest form '0,2'"),
    "experts as numbers": (group(0, experts=[0, 2]), r"experts is \[0, 2\]"),
    "type of a group": (group(0, type="mixed"), "type is 'mixed'"),
    "map": (lambda plan: plan["precision_map"].update(experts=[1]), "precision_map has 2 types for 1 numbers"),
    "padding": (lambda plan: plan["expert_padding"].update(width=0), "width is 0"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_refused(tmp_path: Path, name: str) -> None:
    change, message = CHANGES[name]
    plan = document(tmp_path)
    change(plan)
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(plan))
    tracemalloc.start()
    try:
        with pytest.raises(FormatError, match=f"^{path}: not a plan as mopeq-edge writes it .*{message}") as caught:
            read_plan(path)
        assert tracemalloc.get_traced_memory()[1] < 2_000_000
    finally:
        tracemalloc.stop()
    assert "plan again" in str(caught.value)


@pytest.mark.parametrize("text", ["NaN", "1e999", "[" * 10_000, '{"format": 1, "format": 1}', "\x00"])
def test_no_json(tmp_path: Path, text: str) -> None:
    path = tmp_path / "plan.json"
    path.write_text(text)
    with pytest.raises(FormatError, match=f"^{path}: cannot be read as JSON"):
        read_plan(path)


def test_ids() -> None:
    assert ids_of("0-3,7", 8) == (0, 1, 2, 3, 7)
    for runs in ("", "x", "1,0", "0,0", "3-2", "0-", "-1", "0,1", "00", "٣", "0-8", "8", "0-1-2"):
        with pytest.raises(ValueError, match="experts"):
            ids_of(runs, 8)
