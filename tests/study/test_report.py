"""The order of the table, what is called noise, and pictures that do not depend on the clock."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from mopeq_edge.errors import ExtraMissingError, PlanError
from mopeq_edge.pictures.figure import require_matplotlib
from mopeq_edge.plan.budget import Budget
from mopeq_edge.study.bootstrap import Estimate
from mopeq_edge.study.cases import Grid
from mopeq_edge.study.ground_truth import Correlation, Unit, correlations
from mopeq_edge.study.plots import kld_picture, prediction_picture
from mopeq_edge.study.report import as_json, correlation_json, correlation_markdown, entries, label, markdown
from mopeq_edge.study.rows import Row

from .test_rows import ROW


def row(case: str, budget: int, windows: list[float], **changes: Any) -> Row:
    kld = float(np.mean(windows))
    return replace(ROW, case=case, budget_bytes=budget, kld_mean=kld, kld_by_window=tuple(windows), **changes)


ROWS = [
    row("c", 200, [0.1, 0.2, 0.3, 0.4]),
    row("worse", 100, [0.2, 0.3, 0.4, 0.5]),
    row("close", 100, [0.1, 0.25, 0.25, 0.45]),
    row("first", 100, [0.1, 0.2, 0.3, 0.4]),
]


def test_sorted_by_budget_then_kld_with_noise_marked() -> None:
    found = entries(ROWS)
    assert [entry.row.case for entry in found] == ["first", "close", "worse", "c"]
    assert [entry.within_noise for entry in found] == [True, True, False, True]
    # every window is 0.1 worse, so is every draw
    above = found[2].above_best
    assert (above.value, above.low, above.high) == pytest.approx((0.1, 0.1, 0.1))
    lines = markdown(found).splitlines()
    assert len({line.count("|") for line in lines}) == 1
    assert [line.split("|")[12].strip() for line in lines[2:]] == ["best", "≈", "", "best"]
    assert json.loads(json.dumps(as_json(found, [])))["cases"][2]["within_noise"] is False


def test_labels() -> None:
    assert label(replace(ROW, sensitivity="weight-mse")) == "knapsack (weight error only)"
    preset = replace(ROW, case="700-preset-Q2_K", kind="control", planner="llama-quantize")
    assert label(preset) == "llama-quantize Q2_K"


def test_correlations_over_all_and_by_layer() -> None:
    units = [Unit(layer, (), expert) for layer in (0, 1) for expert in range(3)]
    rows = [row(str(i), 1, [kld] * 4) for i, kld in enumerate([1.0, 2.0, 3.0, 30.0, 20.0, 10.0])]
    predicted = {"bad": np.array([6.0, 5, 4, 3, 2, 1]), "good": np.array([1.0, 2, 3, 4, 5, 6])}
    found = correlations(units, predicted, rows, per_layer=True)
    # ranks 1 2 3 6 5 4: 1 - 6 * 8 / (6 * 35)
    rho = {(one.score, one.scope): one.rho.value for one in found}
    assert found[0].score == "good"
    assert rho["good", "all"] == pytest.approx(1 - 48 / 210)
    assert (rho["good", "layer 0"], rho["good", "layer 1"]) == pytest.approx((1, -1))
    assert rho["good", "mean of layers"] == pytest.approx(0)
    assert rho["bad", "all"] == pytest.approx(48 / 210 - 1)
    assert correlation_markdown(found).count("\n") == 1 + len(found)
    nothing = Correlation("x", "all", 3, Estimate(float("nan"), float("nan"), float("nan")))
    assert correlation_json([nothing])[0]["rho"] == {"value": None, "low": None, "high": None}


def test_pictures_are_the_same_every_time() -> None:
    rows = [*ROWS, replace(ROWS[0], kind="control", planner="random-1")]
    predicted = {"fisher": np.array([1.0, 2, 3]), "zero": np.zeros(3)}
    for kind, start in (("png", b"\x89PNG"), ("svg", b"<?xml")):
        assert kld_picture(rows, kind).startswith(start)
        assert kld_picture(rows, kind) == kld_picture(rows, kind)
        assert prediction_picture(predicted, [1.0, 3.0, 2.0], "x", kind).startswith(start)
    assert b"fisher: rho 0.50" in prediction_picture(predicted, [1.0, 3.0, 2.0], "x", "svg")


def test_without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.style", None)
    with pytest.raises(ExtraMissingError, match=r"pip install 'mopeq-edge\[pictures\]'"):
        require_matplotlib()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"planners": ("best",)}, "--planners best: expected some of knapsack, mopeq"),
        ({"layouts": ("x",)}, "--layouts x: expected some of stock, per-expert"),
        ({"controls": ("random", "y")}, "--controls y: expected some of random, inverse, uniform, presets, hand"),
        ({"budgets": ()}, "give --budgets"),
    ],
)
def test_what_a_grid_may_be(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        Grid(**{"sensitivities": ("fisher",), "budgets": (Budget(gb=1),), **changes})
