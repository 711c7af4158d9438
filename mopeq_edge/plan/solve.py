"""Multiple-choice knapsack: one option a group, least total damage, total cost within a budget.

HiGHS solves it as an integer program, through scipy. Its tolerances are relative to floating-point
numbers and ours is a hard budget in bytes, so costs and choices are checked in integers, and the
walk along the groups' convex hulls gives a second solution that is always feasible. Of many groups it takes seconds;
they are solved exactly along the hulls instead.
"""

from __future__ import annotations

import ctypes
import math
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np

from mopeq_edge.errors import PlanError
from mopeq_edge.plan.hull import NEVER, Doubles
from mopeq_edge.plan.path import Path

MOST_GROUPS = 500
"""Groups that HiGHS is asked about, at most: it takes seconds for them. Always, so that damage never rises with the
budget."""

ATTEMPTS = 20
"""How often HiGHS is asked before the best solution so far is taken."""


@dataclass(frozen=True)
class Group:
    """Options of one decision: integer ``costs`` (bytes) and ``damages`` >= 0, in the same order."""

    name: str
    costs: tuple[int, ...]
    damages: tuple[float, ...]


@dataclass(frozen=True)
class Solution:
    """``choice[i]`` is the option of group i; ``bound`` <= the least possible damage <= ``damage``."""

    choice: tuple[int, ...]
    cost: int
    damage: float
    bound: float

    @property
    def gap(self) -> float:
        """(damage - bound) / damage; 0 when optimality is proven."""
        return 0.0 if self.damage <= 0 else max(0.0, (self.damage - self.bound) / self.damage)


def smallest_cost(groups: Sequence[Group]) -> int:
    """Cost of the cheapest choice."""
    return sum(min(group.costs) for group in groups)


def largest_cost(groups: Sequence[Group]) -> int:
    """Cost of the choice with the least damage in every group (the cheaper one of equals)."""
    return sum(min(zip(g.damages, g.costs, strict=True))[1] for g in groups)


def solve(groups: Sequence[Group], budget: int, *, time_limit: float = 60.0) -> Solution:
    """Choose one option a group. Raises :class:`PlanError` when even the cheapest choice is too big."""
    least = smallest_cost(groups)
    if least > budget:
        raise PlanError(f"budget of {budget} bytes: the smallest choice takes {least} bytes")
    pruned = [_undominated(group) for group in groups]
    if all(len(options) == 1 for options in pruned):
        only = _evaluate(groups, [options[0] for options in pruned])
        return replace(only, bound=only.damage)
    best = hull = _along_hulls(groups, budget)
    bound = hull.bound
    if len(groups) > MOST_GROUPS:
        return best
    # HiGHS rounds: a choice may exceed the budget by its tolerance. Cut off that choice, and all that cost at least
    # as much in every group, and ask again: the optimum stays.
    too_big: list[list[int]] = []
    for _ in range(ATTEMPTS):
        choice, dual = _highs(groups, pruned, budget, hull.damage, too_big, time_limit)
        bound = max(bound, dual)
        if choice is None:
            break
        found = _evaluate(groups, choice)
        if found.cost <= budget:
            if found.damage < best.damage or (found.damage == best.damage and found.cost < best.cost):
                best = found
            break
        too_big.append(choice)
    return Solution(best.choice, best.cost, best.damage, min(bound, best.damage))


def _undominated(group: Group) -> list[int]:
    """Options worth considering, by rising cost and falling damage."""
    order = sorted(range(len(group.costs)), key=lambda i: (group.costs[i], group.damages[i], i))
    kept: list[int] = []
    for i in order:
        if not kept or group.damages[i] < group.damages[kept[-1]]:
            kept.append(i)
    return kept


def _evaluate(groups: Sequence[Group], choice: Sequence[int]) -> Solution:
    cost = sum(g.costs[i] for g, i in zip(groups, choice, strict=True))
    damage = math.fsum(g.damages[i] for g, i in zip(groups, choice, strict=True))
    return Solution(tuple(choice), cost, damage, 0.0)


def _along_hulls(groups: Sequence[Group], budget: int) -> Solution:
    shape = (len(groups), max(len(group.costs) for group in groups))
    costs, damages = np.full(shape, NEVER, dtype=np.int64), np.full(shape, np.inf)
    for index, group in enumerate(groups):
        costs[index, : len(group.costs)] = group.costs
        damages[index, : len(group.damages)] = group.damages
    chosen = Path(costs, damages).solve(budget, exactly=len(groups) > MOST_GROUPS)
    assert chosen is not None, "the cheapest choice fits"
    return Solution(tuple(chosen.choice.tolist()), chosen.cost, chosen.damage, chosen.bound)


def _highs(
    groups: Sequence[Group],
    pruned: Sequence[list[int]],
    budget: int,
    known: float,
    too_big: Sequence[list[int]],
    time_limit: float,
) -> tuple[list[int] | None, float]:
    """(choice or None, lower bound on the damage) from HiGHS. ``known`` is the damage of some choice that fits,
    ``too_big`` are choices known to exceed the budget."""
    # here, because it takes half a second to import and large problems do without
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_matrix

    # costs over their common divisor and damages over a known total keep both in HiGHS's best range
    unit = math.gcd(*(c for g in groups for c in g.costs)) or 1
    base = [g.costs[options[0]] for g, options in zip(groups, pruned, strict=True)]
    scale = known / 1e4 if known > 0 else 1.0
    costs = [(g.costs[i] - b) // unit for g, options, b in zip(groups, pruned, base, strict=True) for i in options]
    damages = [g.damages[i] / scale for g, options in zip(groups, pruned, strict=True) for i in options]
    sizes = [len(options) for options in pruned]
    n = sum(sizes)
    rows = np.repeat(np.arange(len(groups)), sizes)
    one_each = csr_matrix((np.ones(n), (rows, np.arange(n))), shape=(len(groups), n))
    room = (budget - sum(base)) // unit
    with _silent_stdout():
        result = milp(
            c=np.array(damages),
            integrality=np.ones(n, dtype=np.int64),
            bounds=Bounds(0, 1),
            constraints=[
                LinearConstraint(one_each, 1, 1),
                LinearConstraint(csr_matrix(np.array(costs, dtype=float)), -np.inf, room),
                *(
                    LinearConstraint(csr_matrix(_cover(groups, pruned, choice)), -np.inf, len(groups) - 1)
                    for choice in too_big
                ),
            ],
            options={"time_limit": time_limit, "mip_rel_gap": 0.0},
        )
    dual = getattr(result, "mip_dual_bound", None)
    bound = max(0.0, float(dual) * scale) if dual is not None and np.isfinite(dual) else 0.0
    if result.x is None:
        return None, bound
    choice, at = [], 0
    for options, size in zip(pruned, sizes, strict=True):
        choice.append(options[int(np.argmax(result.x[at : at + size]))])
        at += size
    return choice, bound


def _cover(groups: Sequence[Group], pruned: Sequence[list[int]], choice: Sequence[int]) -> Doubles:
    """A row of ones at all options that cost at least what ``choice`` does: with one in every group it is too big."""
    row = [
        float(group.costs[i] >= group.costs[picked])
        for group, options, picked in zip(groups, pruned, choice, strict=True)
        for i in options
    ]
    return np.array(row)


@contextmanager
def _silent_stdout() -> Iterator[None]:
    """Drop what HiGHS prints on stdout whatever its options (traces of its own): results go there."""
    if os.name != "posix" or sys.stdout is None:
        yield
        return
    libc = ctypes.CDLL(None)
    sys.stdout.flush()
    libc.fflush(None)
    saved = os.dup(1)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 1)
        yield
    finally:
        libc.fflush(None)
        os.dup2(saved, 1)
        os.close(saved)
        os.close(nowhere)
