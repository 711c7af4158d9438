"""The solver against complete enumeration and against dynamic programming over the costs."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
from collections.abc import Callable, Sequence

import numpy as np
import pytest

from mopeq_edge.errors import PlanError
from mopeq_edge.plan.solve import Group, Solution, largest_cost, smallest_cost, solve

Rng = np.random.Generator

CLOSE = 1e-9
"""Relative difference that two orders of adding the same damages may have, and HiGHS's own rounding."""


def enumerate_all(groups: Sequence[Group]) -> tuple[list[int], list[float]]:
    """Every reachable cost, rising, and the least damage within it."""
    found: list[tuple[int, float]] = []
    for picks in itertools.product(*(range(len(g.costs)) for g in groups)):
        cost = sum(g.costs[i] for g, i in zip(groups, picks, strict=True))
        damage = math.fsum(g.damages[i] for g, i in zip(groups, picks, strict=True))
        found.append((cost, damage))
    costs: list[int] = []
    best: list[float] = []
    for cost, damage in sorted(found):
        if costs and costs[-1] == cost:
            continue
        costs.append(cost)
        best.append(min(damage, best[-1]) if best else damage)
    return costs, best


def dynamic_programming(groups: Sequence[Group], budget: int) -> float:
    """The least damage within ``budget``, by a table over all costs up to it."""
    table = np.full(budget + 1, np.inf)
    table[0] = 0.0
    for group in groups:
        following = np.full(budget + 1, np.inf)
        for cost, damage in zip(group.costs, group.damages, strict=True):
            if cost <= budget:
                reached = table[: budget + 1 - cost] + damage
                following[cost:] = np.minimum(following[cost:], reached)
        table = following
    return float(table.min())


def check(groups: Sequence[Group], budget: int, solution: Solution) -> None:
    """What must hold for every solution: it is what it says, and it is within the budget."""
    assert len(solution.choice) == len(groups)
    picked = list(zip(groups, solution.choice, strict=True))
    assert solution.cost == sum(g.costs[i] for g, i in picked)
    assert solution.damage == math.fsum(g.damages[i] for g, i in picked)
    assert solution.cost <= budget
    assert 0 <= solution.bound <= solution.damage
    assert 0 <= solution.gap <= 1


def plain(rng: Rng, n: int) -> Group:
    costs = np.cumsum(rng.integers(1, 50, n))
    damages = np.cumsum(rng.exponential(size=n))[::-1]
    return Group("plain", tuple(int(c) for c in costs), tuple(float(d) for d in damages))


def ties(rng: Rng, n: int) -> Group:
    """Few different values: equal costs, equal damages, options that are dominated or appear twice."""
    costs, damages = rng.integers(1, 5, n), rng.integers(0, 4, n)
    return Group("ties", tuple(int(c) for c in costs), tuple(float(d) for d in damages))


def no_order(rng: Rng, n: int) -> Group:
    costs, damages = rng.integers(0, 100, n), rng.random(n)
    return Group("no order", tuple(int(c) for c in costs), tuple(float(d) for d in damages))


def zeros(rng: Rng, n: int) -> Group:
    costs = rng.integers(1, 30, n)
    damages = rng.random(n) * (rng.random(n) < 0.4)
    return Group("zeros", tuple(int(c) for c in costs), tuple(float(d) for d in damages))


def real_sizes(rng: Rng, n: int) -> Group:
    """Bytes of a large model: up to 1e10, multiples of the alignment."""
    costs = np.sort(rng.integers(1, 10**10 // 32, n)) * 32
    damages = np.sort(rng.random(n))[::-1]
    return Group("real sizes", tuple(int(c) for c in costs), tuple(float(d) for d in damages))


def magnitudes(rng: Rng, n: int) -> Group:
    """Damages over eighteen orders of magnitude."""
    costs = np.sort(rng.integers(1, 1000, n)) * 32
    damages = np.sort(10.0 ** rng.uniform(-12, 6, n))[::-1]
    return Group("magnitudes", tuple(int(c) for c in costs), tuple(float(d) for d in damages))


def bits(rng: Rng, n: int) -> Group:
    """What quantization looks like: damage falls about fourfold a bit, sizes are proportional to bits."""
    weights = 256 * int(rng.integers(1, 5000))
    widths = np.sort(rng.choice(np.arange(8, 34), size=n, replace=False)) / 4
    scale = 10.0 ** rng.uniform(-9, -2)
    damages = scale * 4.0**-widths * rng.uniform(0.8, 1.25, n)
    return Group("bits", tuple(int(weights * w / 8) for w in widths), tuple(float(d) for d in damages))


KINDS = (plain, ties, no_order, zeros, real_sizes, magnitudes, bits)


def instance(kind: Callable[[Rng, int], Group], seed: int) -> list[Group]:
    rng = np.random.default_rng(seed)
    return [kind(rng, int(rng.integers(1, 6))) for _ in range(int(rng.integers(1, 6)))]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("seed", range(12))
def test_optimal(kind: Callable[[Rng, int], Group], seed: int) -> None:
    groups = instance(kind, seed)
    costs, best = enumerate_all(groups)
    rng = np.random.default_rng(seed)
    for index in sorted({0, len(costs) - 1, *(int(i) for i in rng.integers(0, len(costs), 5))}):
        # Exactly a reachable cost, one less than the next one, and anything between
        ends = costs[index + 1] - 1 if index + 1 < len(costs) else costs[index] + 10**6
        for budget in {costs[index], ends, (costs[index] + ends) // 2}:
            solution = solve(groups, budget)
            check(groups, budget, solution)
            assert solution.damage == pytest.approx(best[index], rel=CLOSE, abs=0)
            assert solution.bound <= best[index] * (1 + CLOSE)


@pytest.mark.parametrize("kind", [plain, ties, magnitudes, bits], ids=lambda kind: kind.__name__)
def test_damage_never_rises_with_the_budget(kind: Callable[[Rng, int], Group]) -> None:
    rng = np.random.default_rng(7)
    groups = [kind(rng, 4) for _ in range(5)]
    least, most = smallest_cost(groups), largest_cost(groups)
    before = math.inf
    for budget in np.unique(np.linspace(least, most + 1, 250).astype(np.int64)):
        solution = solve(groups, int(budget))
        check(groups, int(budget), solution)
        assert solution.damage <= before
        before = solution.damage
    assert before == math.fsum(min(g.damages) for g in groups)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_the_smallest_budget(kind: Callable[[Rng, int], Group]) -> None:
    groups = instance(kind, 99)
    least = sum(min(g.costs) for g in groups)
    assert smallest_cost(groups) == least
    solution = solve(groups, least)
    check(groups, least, solution)
    assert solution.cost == least
    # Of options with the least cost, the best one
    wanted = math.fsum(min(d for c, d in zip(g.costs, g.damages, strict=True) if c == min(g.costs)) for g in groups)
    assert solution.damage == wanted
    with pytest.raises(PlanError, match=f"budget of {least - 1} bytes: the smallest choice takes {least} bytes"):
        solve(groups, least - 1)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_the_largest_budget(kind: Callable[[Rng, int], Group]) -> None:
    groups = instance(kind, 5)
    wanted = math.fsum(min(g.damages) for g in groups)
    for budget in (largest_cost(groups), 10**15):
        solution = solve(groups, budget)
        check(groups, budget, solution)
        assert solution.damage == wanted
        assert solution.gap == 0 or solution.damage > 0


@pytest.mark.parametrize("seed", range(5))
def test_against_dynamic_programming(seed: int) -> None:
    rng = np.random.default_rng(seed)
    groups = [plain(rng, 5) for _ in range(25)]
    least, most = smallest_cost(groups), largest_cost(groups)
    for share in (0.05, 0.3, 0.5, 0.9):
        budget = int(least + share * (most - least))
        solution = solve(groups, budget)
        check(groups, budget, solution)
        assert solution.damage == pytest.approx(dynamic_programming(groups, budget), rel=CLOSE)


def test_a_greedy_walk_is_not_enough() -> None:
    # By damage saved per byte the first group comes first, and then the second does not fit.
    groups = [Group("a", (0, 1), (2.0, 0.0)), Group("b", (0, 10), (10.0, 0.0))]
    assert solve(groups, 10).choice == (0, 1)
    assert solve(groups, 11).choice == (1, 1)
    # No convex combination: the middle option lies above the line between its neighbours.
    groups = [Group("a", (1, 2, 3), (10.0, 9.0, 0.0)), Group("b", (1, 2, 3), (10.0, 9.0, 0.0))]
    assert solve(groups, 5).damage == 9.0
    assert sorted(solve(groups, 4).choice) == [0, 2]


def test_equal_damage_at_less_cost() -> None:
    groups = [Group("a", (5, 3, 4), (1.0, 1.0, 1.0)), Group("b", (7, 2), (0.0, 0.0))]
    solution = solve(groups, 100)
    assert (solution.choice, solution.cost, solution.damage) == ((1, 1), 5, 1.0)
    assert largest_cost(groups) == 5


def test_no_decision_at_all() -> None:
    solution = solve([], 0)
    assert (solution.choice, solution.cost, solution.damage, solution.gap) == ((), 0, 0.0, 0.0)


def test_a_model_of_real_size() -> None:
    """48 layers and more, the types of --types default: near the optimum, and proven so."""
    rng = np.random.default_rng(3)
    groups = [bits(rng, 13) for _ in range(300)]
    least, most = smallest_cost(groups), largest_cost(groups)
    before = math.inf
    for share in (0.1, 0.3, 0.6):
        budget = int(least + share * (most - least))
        solution = solve(groups, budget)
        check(groups, budget, solution)
        assert solution.gap < 1e-4
        assert solution.bound > 0
        assert solution.damage < before
        before = solution.damage


def test_the_same_answer_twice() -> None:
    rng = np.random.default_rng(11)
    groups = [ties(rng, 6) for _ in range(30)]
    budget = (smallest_cost(groups) + largest_cost(groups)) // 2
    assert solve(groups, budget) == solve(groups, budget)


CHATTY = """
import numpy as np
from mopeq_edge.plan.solve import Group, largest_cost, smallest_cost, solve

rng = np.random.default_rng(0)
bpw = np.array([2.0625, 2.3125, 2.5625, 2.625, 3.0625, 3.4375, 4.25, 4.5, 5.5, 6.5625, 8.5])
groups = []
for _ in range(300):
    damages = 10.0 ** rng.uniform(-9, -2) * 4.0**-bpw * rng.uniform(0.8, 1.25, len(bpw))
    weights = 256 * int(rng.integers(1000, 400_000))
    groups.append(Group("", tuple(int(weights * b / 8) // 32 * 32 for b in bpw), tuple(map(float, damages))))
print("first")
budget = int(0.7 * smallest_cost(groups) + 0.3 * largest_cost(groups))
for step in range(5):
    solve(groups, budget + step * 3200)
print("last")
"""


def test_nothing_is_printed() -> None:
    # HiGHS prints lines of its own while it solves these
    done = subprocess.run([sys.executable, "-c", CHATTY], check=True, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("first\nlast\n", "")
