"""Problems of many rows: against the searches that small ones get, and what must hold of any plan."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest

from mopeq_edge.expert_groups.layout import MAX_GROUPS
from mopeq_edge.ggml.types import BF16
from mopeq_edge.plan import menu_bounds, menu_series, path, per_expert, prepared, solve
from mopeq_edge.plan.budget import Budget
from mopeq_edge.plan.candidates import FLOORS, parse_types
from mopeq_edge.plan.hull import NEVER
from mopeq_edge.plan.make import Planner, make_plan, size_range
from mopeq_edge.plan.menu_search import least_of_stacks
from mopeq_edge.plan.options import PlanOptions
from mopeq_edge.plan.path import Path
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


def test_one_planner_makes_what_single_plans_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """Budgets and layouts in any order; what does not depend on them is worked out once."""
    source = MemorySource(STACKS)
    options = PlanOptions("fisher", parse_types("k"), FLOORS)
    damages = table(source, options.types, ("fisher",))
    asked = [(Budget(bpw=bpw), layout) for bpw in (4.5, 3.5, 4.0) for layout in ("per-expert", "stock")]
    single = [make_plan(source, damages, source.kvs, b, replace(options, layout=layout)) for b, layout in asked]
    calls: list[str] = []
    for module, name in ((per_expert, "_problem"), (prepared, "solve")):
        made = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args, f=made, n=name: (calls.append(n), f(*args))[1])
    planner = Planner(source, damages, source.kvs, options)
    assert [planner.plan(budget, layout) for budget, layout in asked] == single
    unproven = planner.plan(*asked[0], proven=False)
    assert unproven == replace(single[0], gap=None) != single[0]
    assert sorted(calls) == ["_problem", "solve", "solve", "solve"]


@pytest.mark.parametrize("seed", range(4))
def test_few_hulls_lead_to_the_same_cut_as_all(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of very different sizes, some alike, some with one option."""
    rng = np.random.default_rng(seed)
    n, n_options = 600, 6
    widths = np.sort(rng.uniform(2, 9, n_options))
    costs = (10 ** rng.uniform(2, 6, (n, 1)) * widths).astype(np.int64)
    damages = 10 ** rng.uniform(-5, 0, (n, 1)) * 4.0**-widths * rng.uniform(0.5, 2, (n, n_options))
    costs[50:100], damages[50:100] = costs[50], damages[50]
    costs[100:120, 1:], damages[100:120, 1:] = NEVER, np.inf
    # the core is solved in the same way by both, and not what is tested here
    monkeypatch.setattr(path, "CORE", 6)
    monkeypatch.setattr(path, "SMALL_CORE", 6)
    every = Path(costs, damages)
    budgets = [int(b) for b in np.geomspace(every.least_cost, 1.1 * every.end_cost, 15)]
    wanted = [(every.solve(budget, exactly=False), every.rate_at(budget)) for budget in budgets]
    targets = [chosen.damage * (1 - 1e-9) for chosen, _ in wanted if chosen is not None]
    rates = [every.rate_to(target) for target in targets]
    assert None in rates
    assert any(rate is not None for rate in rates)
    monkeypatch.setattr(path, "MANY", 100)
    for few in (1, 20):
        monkeypatch.setattr(path, "FEW", few)
        narrowed = Path(costs, damages)
        for budget, (chosen, rate) in zip(budgets, wanted, strict=True):
            found = narrowed.solve(budget)
            assert found is not None
            assert chosen is not None
            assert (found.cost, found.damage, found.rate) == (chosen.cost, chosen.damage, chosen.rate)
            assert found.bound == pytest.approx(chosen.bound, rel=1e-12)
            assert narrowed.rate_at(budget) == rate
        assert [narrowed.rate_to(target) for target in targets] == rates
        rows, _ = narrowed._around(lambda cost, _: cost <= budgets[7], 1e-9)
        assert len(rows) < 120
