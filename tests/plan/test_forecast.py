"""The forecast's statistics by hand, and its ratio against two plans made apart."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from mopeq_edge.calibrate.statistics import Routing
from mopeq_edge.ggml.types import BY_NAME
from mopeq_edge.plan.artifact import PER_EXPERT, STOCK, Plan
from mopeq_edge.plan.budget import Budget
from mopeq_edge.plan.candidates import FLOORS, parse_types
from mopeq_edge.plan.forecast import MEASURED_OVER_PREDICTED, forecast, routing_skew
from mopeq_edge.plan.make import make_plan
from mopeq_edge.plan.options import PlanOptions
from mopeq_edge.sensitivity.table import SensitivityTable

from .synthetic import KVS, MemorySource, table

TYPES = parse_types("default")
SOURCE = MemorySource()
STACKS = [t for t in SOURCE.tensors if "_exps" in t.name]


def with_experts(costs: list[float]) -> SensitivityTable:
    """Damage ``costs[e]`` 4^-b of expert e in every stack."""
    made = table(SOURCE, TYPES, ("fisher", "imatrix"))
    errors = dict(made.errors)
    for stack in STACKS:
        own = errors[stack.name]
        values = np.array([[4.0 ** -BY_NAME[name].bpw] for name in own.types]) * np.array(costs)
        values[-1] = 0
        errors[stack.name] = replace(own, damage=dict.fromkeys(own.damage, values))
    return replace(made, errors=errors)


def plans(made: SensitivityTable, sensitivity: str = "fisher") -> tuple[Plan, Plan]:
    """(stock, per-expert) of one budget."""
    options = PlanOptions(sensitivity, TYPES, FLOORS)
    budget = Budget(bpw=4.2)
    other = replace(options, layout=PER_EXPERT)
    return make_plan(SOURCE, made, KVS, budget, options), make_plan(SOURCE, made, KVS, budget, other)


def test_statistics_by_hand() -> None:
    made = with_experts([1.0, 4.0, 16.0, 64.0])
    stock, per_expert = plans(made)
    found = forecast(
        STACKS, made, Routing(8, {1: np.array([1.0, 3.0]), 2: np.full(2, 2.0)}, {}, np.ones(3)), stock, per_expert
    )
    assert found.coding_gain == pytest.approx(21.25 / 8)
    assert found.damage_spread == pytest.approx(math.log(4) * math.sqrt(1.25))
    assert found.routing_skew == pytest.approx(0.25)
    assert found.ratio == per_expert.damage / stock.damage < 1
    assert (found.layout, found.damage, found.file_bytes) == (PER_EXPERT, per_expert.damage, per_expert.file_bytes)


def test_the_same_from_either_layout() -> None:
    made = with_experts([1.0, 4.0, 16.0, 64.0])
    stock, per_expert = plans(made)
    one, other = forecast(STACKS, made, None, stock, per_expert), forecast(STACKS, made, None, per_expert, stock)
    assert one.ratio == other.ratio
    assert (one.layout, other.layout) == (PER_EXPERT, STOCK)
    assert "--layout per-expert" in one.sentence()
    assert "--layout" not in other.sentence()


def test_experts_alike_have_nothing_to_gain() -> None:
    made = with_experts([2.0] * 4)
    found = forecast(STACKS, made, None, *plans(made))
    assert (found.coding_gain, found.damage_spread) == (pytest.approx(1), pytest.approx(0, abs=1e-12))
    # all that is left is how well whole experts fill the budget
    assert 0.75 < found.ratio <= 1


def test_the_gain_grows_with_the_spread() -> None:
    ratios = []
    for factor in (1.0, 2.0, 6.0):
        made = with_experts([factor**e for e in range(4)])
        ratios.append(forecast(STACKS, made, None, *plans(made)).ratio)
    assert ratios[0] > ratios[1] > ratios[2]


def test_experts_that_hurt_nothing_do_not_make_the_gain_infinite() -> None:
    made = with_experts([0.0, 1.0, 1.0, 1.0])
    assert forecast(STACKS, made, None, *plans(made)).coding_gain == pytest.approx(1)


def test_what_to_expect_is_said_of_the_score_that_was_measured() -> None:
    made = with_experts([1.0, 4.0, 16.0, 64.0])
    found = forecast(STACKS, made, None, *plans(made))
    low, high = MEASURED_OVER_PREDICTED
    assert found.measured == (low * found.ratio, high * found.ratio)
    assert forecast(STACKS, made, None, *plans(made, "imatrix")).measured is None


def test_skew_of_even_and_of_single_routing() -> None:
    assert routing_skew(Routing(4, {0: np.full(8, 5.0)}, {}, np.ones(1))) == 0
    assert routing_skew(Routing(4, {0: np.array([4.0, 0.0, 0.0, 0.0])}, {}, np.ones(1))) == pytest.approx(math.sqrt(3))
