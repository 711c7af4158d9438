"""The data of the picture by hand, from plans and from files of both layouts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mopeq_edge.errors import FormatError, MopeqError
from mopeq_edge.ggml.types import BY_NAME
from mopeq_edge.gguf_layout import layout, string
from mopeq_edge.pictures.type_map import read_type_map
from mopeq_edge.plan.artifact import PER_EXPERT, write_plan
from mopeq_edge.plan.budget import Budget
from mopeq_edge.plan.candidates import DEFAULT_TYPES, FLOORS
from mopeq_edge.plan.make import make_plan
from mopeq_edge.plan.options import PER_LAYER, MapOptions, PlanOptions

from ..plan.synthetic import MemorySource, table
from .maps import DIGITS, type_map, types, write

BPW = {"2": 2.625, "3": 3.4375, "4": 4.5}


def bits(digits: str) -> list[float]:
    return [BPW[digit] for digit in digits]


def test_a_file_in_groups(tmp_path: Path) -> None:
    path = write(tmp_path / "x.gguf")
    found = read_type_map(path)
    assert (found.name, found.layout, found.made_by) == ("x.gguf", "per-expert", "olmoe")
    assert found.file_bytes == path.stat().st_size
    assert found.types == types()
    assert (found.projections, found.layers, found.n_expert) == (("gate", "up", "down"), (0, 2), 4)
    for projection in found.projections:
        expected = [bits(DIGITS[layer, projection]) for layer in (0, 2)]
        np.testing.assert_array_equal(found.bits(projection), expected)
    assert found.counts() == {2.625: {"Q2_K": 8}, 3.4375: {"Q3_K": 7}, 4.5: {"Q4_K": 9}}


def test_a_stock_file_has_uniform_rows(tmp_path: Path) -> None:
    digits = {(0, "gate_up"): "22222", (0, "down"): "33333", (1, "gate_up"): "44444"}
    found = read_type_map(write(tmp_path / "x.gguf", digits))
    assert (found.layout, found.projections) == ("stock", ("down", "gate_up"))
    np.testing.assert_array_equal(found.bits("gate_up"), [[2.625] * 5, [4.5] * 5])
    # layer 1 has no such stack
    np.testing.assert_array_equal(found.bits("down"), [[3.4375] * 5, [np.nan] * 5])


def test_types_of_as_many_bits_are_told_apart() -> None:
    both = dict(zip(types(), [(BY_NAME["Q3_K"], BY_NAME["IQ3_S"]), (BY_NAME["Q3_K"],)], strict=False))
    assert replace(type_map(), types=both).counts() == {3.4375: {"IQ3_S": 1, "Q3_K": 2}}


def test_a_plan(tmp_path: Path) -> None:
    source = MemorySource()
    kinds = tuple(BY_NAME[name] for name in DEFAULT_TYPES)
    made = table(source, kinds, ("fisher", "mopeq"))
    made = replace(made, mopeq={0: np.array([1.0, 9.0, 5.0, 1.0]), 1: np.array([3.0, 3.0, 3.0, 3.0])})
    options = PlanOptions("mopeq", kinds, FLOORS, PER_EXPERT, MapOptions(PER_LAYER))
    plan = make_plan(source, made, source.kvs, None, options)
    write_plan(plan, tmp_path / "plan.json")
    found = read_type_map(tmp_path / "plan.json")
    assert (found.name, found.layout, found.made_by) == (
        "plan.json",
        "per-expert",
        "planner mopeq, sensitivity mopeq",
    )
    assert (found.file_bytes, found.bpw) == (plan.file_bytes, plan.bpw)
    for projection in ("gate", "up"):
        np.testing.assert_array_equal(found.bits(projection), [bits("2432"), bits("3333")])
    # rows of 96 weights take IQ4_NL
    np.testing.assert_array_equal(found.bits("down"), [[4.5] * 4] * 2)
    write_plan(make_plan(source, made, source.kvs, Budget(bpw=5), PlanOptions("fisher", kinds, FLOORS)), tmp_path / "b")
    stock = read_type_map(tmp_path / "b")
    assert (stock.layout, stock.made_by) == ("stock", "planner knapsack, sensitivity fisher")
    assert all(len(set(own)) == 1 for own in stock.types.values())


def test_what_has_no_map(tmp_path: Path) -> None:
    dense = tmp_path / "dense.gguf"
    dense.write_bytes(layout({"general.architecture": string("llama")}, []).header)
    text, broken = tmp_path / "text.json", tmp_path / "broken.gguf"
    text.write_text("{}")
    broken.write_bytes(write(tmp_path / "x.gguf").read_bytes()[:300])
    for path, expected in (
        (dense, "has no experts"),
        (text, "expected 'mopeq-edge plan' version"),
        (tmp_path / "none", "cannot be read"),
        (tmp_path, "cannot be read"),
        (broken, "broken GGUF"),
    ):
        with pytest.raises(MopeqError, match=expected) as caught:
            read_type_map(path)
        assert str(path) in str(caught.value)
        assert isinstance(caught.value, FormatError)
