"""Problems of many rows: against the searches that small ones get, and what must hold of any plan."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest

from mopeq_edge.expert_groups.layout import MAX_GROUPS
from mopeq_edge.ggml.types import BF16
from mopeq_edge.plan import menu_bounds, menu_series, solve
from mopeq_edge.plan.budget import Budget
from mopeq_edge.plan.candidates import FLOORS, parse_types
from mopeq_edge.plan.make import make_plan, size_range
from mopeq_edge.plan.menu_search import least_of_stacks
from mopeq_edge.plan.options import PlanOptions
from mopeq_edge.plan.solve import Group
from mopeq_edge.source.model import SourceTensor

from .synthetic import MemorySource, table

STACKS = [
    SourceTensor(f"blk.{n}.ffn_{name}_exps.weight", (512, 512, 24), BF16) for n in range(2) for name in ("gate", "up")
]


def test_near_menus_are_as_good_and_never_rise(monkeypatch: pytest.MonkeyPatch) -> None:
    source = MemorySource(STACKS)
    options = PlanOptions(
        "fisher", parse_types("Q2_K,IQ2_S,Q3_K,IQ3_S,Q4_K,IQ4_NL,Q5_K,Q6_K,Q8_0"), FLOORS, "per-expert"
    )
    damages = table(source, options.types, ("fisher",), seed=2)
    smallest, largest = size_range(source, source.kvs, options, has_imatrix=True)
    budgets = [Budget(nbytes=int(n)) for n in np.linspace(smallest, (smallest + largest) / 2, 12)]
    searched = [make_plan(source, damages, source.kvs, budget, options) for budget in budgets[::4]]
    monkeypatch.setattr(menu_series, "MANY", 10)
    monkeypatch.setattr(menu_bounds, "MOST_SUMS", 0)
    before = math.inf
    found = []
    for budget in budgets:
        plan = make_plan(source, damages, source.kvs, budget, options)
        assert plan.gap is not None
        assert plan.damage <= before * (1 + 1e-12)
        assert plan.file_bytes <= budget.nbytes
        before = plan.damage
        found.append(plan)
    for plan, other in zip(found[::4], searched, strict=True):
        assert plan.damage <= other.damage * 1.003
        # a proven bound lies below what any search finds
        assert plan.damage * (1 - plan.gap) <= other.damage * (1 + 1e-12)


@pytest.mark.parametrize("seed", range(4))
def test_bounds_of_stacks_against_all_menus(seed: int) -> None:
    rng = np.random.default_rng(seed)
    value = rng.uniform(0, 1, (3, 10, 12))
    extra = np.broadcast_to(np.arange(MAX_GROUPS + 1) * 0.01 * seed, (3, MAX_GROUPS + 1)).copy()
    exact = np.array(
        [
            min(
                own[list(menu)].min(axis=0).sum() + extra[0, size]
                for size in range(1, MAX_GROUPS + 1)
                for menu in itertools.combinations(range(10), size)
            )
            for own in value
        ]
    )
    first = value[:, :MAX_GROUPS].min(axis=1).sum(axis=1) + extra[:, MAX_GROUPS]
    assert (least_of_stacks(value, extra, first, math.inf) <= exact + 1e-12).all()
    close = least_of_stacks(value, extra, first, 0.0)
    assert (close <= exact + 1e-12).all()
    assert close == pytest.approx(exact, rel=0.02)


@pytest.mark.parametrize("seed", range(5))
def test_many_groups_are_solved_exactly_too(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(seed)
    groups = []
    for index in range(30):
        costs = np.sort(rng.integers(1, 10 ** rng.integers(2, 6), 6))
        groups.append(Group(str(index), tuple(costs.tolist()), tuple(np.sort(rng.exponential(size=6))[::-1].tolist())))
    least, most = solve.smallest_cost(groups), solve.largest_cost(groups)
    for share in (0.1, 0.35, 0.7):
        budget = int(least + share * (most - least))
        by_highs = solve.solve(groups, budget)
        with monkeypatch.context() as patch:
            patch.setattr(solve, "MOST_GROUPS", 0)
            found = solve.solve(groups, budget)
        assert found.cost <= budget
        assert found.gap == 0
        assert found.damage == pytest.approx(by_highs.damage, rel=1e-9)


def test_a_known_stock_plan_saves_its_making() -> None:
    source = MemorySource(STACKS)
    options = PlanOptions("fisher", parse_types("k"), FLOORS, "per-expert")
    damages = table(source, options.types, ("fisher",))
    budget = Budget(bpw=3.5)
    stock = make_plan(source, damages, source.kvs, budget, replace(options, layout="stock"))
    assert make_plan(source, damages, source.kvs, budget, options, stock) == make_plan(
        source, damages, source.kvs, budget, options
    )
