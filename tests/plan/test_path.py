"""The knapsack along the convex hulls, against complete enumeration and dynamic programming."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from mopeq_edge.plan.hull import NEVER, Doubles, Ints, hull_steps
from mopeq_edge.plan.path import Chosen, Path

CLOSE = 1e-9


def instance(rng: np.random.Generator, n: int, n_options: int, sizes: int) -> tuple[Ints, Doubles]:
    """Damage falls about fourfold a bit; not all rows have all options; ``sizes`` different numbers of weights."""
    widths = np.sort(rng.choice(np.arange(8, 34), size=n_options, replace=False)) / 4
    weights = 256 * rng.integers(1, 500, sizes)[rng.integers(0, sizes, n)]
    costs = (weights[:, None] * widths / 8).astype(np.int64)
    damages = 10.0 ** rng.uniform(-4, 0, (n, 1)) * 4.0**-widths * rng.uniform(0.5, 2, (n, n_options))
    lacking = rng.random((n, n_options)) < 0.2
    lacking[np.arange(n), rng.integers(0, n_options, n)] = False
    return np.where(lacking, NEVER, costs), np.where(lacking, np.inf, damages)


def check(costs: Ints, damages: Doubles, budget: int, found: Chosen) -> None:
    every = np.arange(len(costs))
    assert found.cost == costs[every, found.choice].sum() <= budget
    assert found.damage == math.fsum(damages[every, found.choice])
    assert 0 <= found.bound <= found.damage


@pytest.mark.parametrize("seed", range(25))
def test_optimal(seed: int) -> None:
    """All rows are in the core, so nothing is lost."""
    rng = np.random.default_rng(seed)
    costs, damages = instance(rng, int(rng.integers(1, 6)), int(rng.integers(1, 6)), sizes=5)
    every = np.arange(len(costs))
    reachable = []
    for pick in itertools.product(*(np.flatnonzero(np.isfinite(row)) for row in damages)):
        reachable.append((int(costs[every, list(pick)].sum()), math.fsum(damages[every, list(pick)])))
    reachable.sort()
    path = Path(costs, damages)
    assert path.least_cost == reachable[0][0]
    assert path.solve(path.least_cost - 1) is None
    for index in {0, len(reachable) - 1, *(int(i) for i in rng.integers(0, len(reachable), 8))}:
        for budget in (reachable[index][0], reachable[index][0] + 7):
            found = path.solve(budget)
            assert found is not None
            check(costs, damages, budget, found)
            best = min(damage for cost, damage in reachable if cost <= budget)
            assert found.damage == pytest.approx(best, rel=CLOSE)
            assert found.bound <= best * (1 + CLOSE)


@pytest.mark.parametrize("seed", range(4))
def test_near_dynamic_programming_with_many_rows(seed: int) -> None:
    rng = np.random.default_rng(seed)
    costs, damages = instance(rng, 300, 6, sizes=2)
    costs = np.where(costs < NEVER, costs // 256, costs)
    path, finite = Path(costs, damages), np.isfinite(damages)
    most = int(np.where(finite, costs, 0).max(axis=1).sum())
    for share in (0.02, 0.3, 0.7):
        budget = int(path.least_cost + share * (most - path.least_cost))
        reached = np.full(budget + 1, np.inf)
        reached[0] = 0.0
        for row in range(len(costs)):
            following = np.full(budget + 1, np.inf)
            for option in np.flatnonzero(finite[row]):
                cost = int(costs[row, option])
                np.minimum(following[cost:], reached[: budget + 1 - cost] + damages[row, option], out=following[cost:])
            reached = following
        found = path.solve(budget)
        assert found is not None
        check(costs, damages, budget, found)
        best = float(reached.min())
        assert found.bound <= best * (1 + CLOSE)
        assert best <= found.damage * (1 + CLOSE)
        assert found.damage <= best * (1 + 1e-4)


def test_damage_never_rises_with_the_budget() -> None:
    rng = np.random.default_rng(3)
    # More rows than the core has, of sizes without a common divisor
    costs, damages = instance(rng, 400, 7, sizes=400)
    path = Path(costs, damages)
    most = int(np.where(np.isfinite(damages), costs, 0).max(axis=1).sum())
    before = math.inf
    budgets = [
        np.linspace(path.least_cost, most, 150),
        path.least_cost + (most - path.least_cost) // 4 + np.arange(150),
    ]
    for budget in np.sort(np.concatenate(budgets).astype(np.int64)):
        found = path.solve(int(budget))
        assert found is not None
        check(costs, damages, int(budget), found)
        assert found.damage <= before
        before = found.damage
    assert before == math.fsum(damages.min(axis=1))


def test_a_model_of_real_size() -> None:
    """48 layers of 128 experts of 3 matrices: the gap is proven and small."""
    rng = np.random.default_rng(0)
    widths = np.array([2.0625, 2.3125, 2.5625, 2.625, 3.0625, 3.4375, 3.4375, 4.25, 4.5, 4.5, 5.5, 6.5625, 8.5])
    n = 48 * 128 * 3
    costs = np.tile((widths * 2048 * 768 / 8).astype(np.int64), (n, 1))
    damages = 10.0 ** rng.uniform(-9, -4, (n, 1)) * 4.0**-widths * rng.uniform(0.8, 1.25, (n, len(widths)))
    path = Path(costs, damages)
    for share in (0.1, 0.4, 0.8):
        budget = int((1 - share) * costs[:, 0].sum() + share * costs[:, -1].sum())
        found = path.solve(budget)
        assert found is not None
        check(costs, damages, budget, found)
        assert (found.damage - found.bound) / found.damage < 1e-4


@pytest.mark.parametrize("seed", range(5))
def test_range_of_rates_without_the_steps(seed: int) -> None:
    costs, damages = instance(np.random.default_rng(seed), 40, 5, sizes=6)
    path = Path(costs, damages)
    steps = hull_steps(costs, damages, path.start)
    assert path.rates == (steps.rate[-1], steps.rate[0])
    last = path.start.copy()
    last[steps.row] = steps.to
    assert (last == path.end).all()
    single = Path(costs[:, :1] % NEVER, np.ones((40, 1)))
    assert single.rates is None
