"""Multiple-choice knapsack with thousands of rows: along the convex hulls, then exactly around the last step.

Without integrality the best choice for every budget lies on one path: start at the cheapest options and take the
hull steps of all rows by damage saved per byte. Where a budget cuts that path, the rows that lose least by another
option at the price of a byte there (the core) are solved exactly and all others stay. The damage never rises with the
budget: the core depends only on the step that is cut, and at a whole number of steps the path is optimal.

Of many rows only those have their hulls made whose options differ between two prices on either side of the cut.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from mopeq_edge.plan.hull import (
    Doubles,
    Ints,
    Steps,
    first_options,
    hull_steps,
    last_options,
    picked,
    rate_range,
    two_least,
)

CORE, SMALL_CORE, MANY = 100, 30, 4096
"""Rows that are solved exactly, at most; fewer where there are more than :data:`MANY`, of which each matters less."""

FEW = 1024
"""Rows whose hulls are made where there are many."""

MOST_STATES = 10**5
"""Of the exact solution that are kept; hundreds are usual."""


@dataclass(frozen=True)
class Chosen:
    """``choice`` [n] is the option of every row; ``bound`` <= the least possible damage <= ``damage``.

    ``rate`` is what one more byte saves where the budget cuts the path; 0 beyond its end.
    """

    choice: Ints
    cost: int
    damage: float
    bound: float
    rate: float


class Path:
    """All hull steps of ``costs`` and ``damages`` [n, n_options], by damage saved per byte."""

    def __init__(self, costs: Ints, damages: Doubles) -> None:
        self.costs, self.damages = costs, damages
        self.start, self.end = first_options(costs, damages), last_options(costs, damages)
        self.least_cost, self.end_cost = (int(picked(costs, way).sum()) for way in (self.start, self.end))
        self.start_damage, self.end_damage = (float(picked(damages, way).sum()) for way in (self.start, self.end))

    @cached_property
    def rates(self) -> tuple[float, float] | None:
        """(lowest, highest) rate of all steps; None if there are none."""
        return rate_range(self.costs, self.damages, self.start, self.end)

    def rate_at(self, budget: int) -> float:
        """:attr:`Chosen.rate` for ``budget``."""
        return self._cut(budget)[1]

    def rate_to(self, damage: float) -> float | None:
        """The rate of the step that leaves no more than ``damage``; None if even the last one leaves more."""
        if self.start_damage <= damage or self.rates is None:
            return self.rates[1] if self.rates is not None else None
        if self.end_damage > damage:
            return None
        some, guess = self._sample, 0.0
        if some is not None:
            share = (self.start_damage - damage) / (self.start_damage - self.end_damage)
            guess = some.rate_to(some.start_damage - share * (some.start_damage - some.end_damage)) or 0.0
        rows, choice = self._around(lambda _, left: left > damage, guess)
        steps = self._steps(rows)
        choice[rows] = self.start[rows]
        left = self._evaluate(choice)[1] - np.cumsum(steps.saved)
        crossed = int(np.searchsorted(-left, -damage))
        return float(steps.rate[min(crossed, len(left) - 1)])

    def solve(self, budget: int, *, exactly: bool = False) -> Chosen | None:
        """The best choice found within ``budget``; None where even the cheapest is too much.

        ``exactly`` makes all rows the core, largest steps first, so that the many small ones at the end leave few
        states: the choice is then proven best, unless there came to be more than :data:`MOST_STATES`.
        """
        if budget < self.least_cost:
            return None
        choice, rate = self._cut(budget)
        cost, damage = self._evaluate(choice)
        if rate == 0:
            return Chosen(choice, cost, damage, damage, rate)
        bound = max(0.0, damage - rate * (budget - cost))
        core = self._by_size() if exactly else self._core(rate)
        room = budget - cost + int(picked(self.costs[core], choice[core]).sum())
        found = choice.copy()
        found[core], is_best = self._solve_core(core, room, choice[core])
        better_cost, better = self._evaluate(found)
        if better < damage:
            choice, cost, damage = found, better_cost, better
        return Chosen(choice, cost, damage, damage if exactly and is_best else min(bound, damage), rate)

    def _cut(self, budget: int) -> tuple[Ints, float]:
        """(choice, rate): after the steps that ``budget`` pays in full, and of the one that it does not; 0 for none."""
        if budget >= self.end_cost or self.rates is None:
            return self.end.copy(), 0.0
        some, guess = self._sample, 0.0
        if some is not None:
            share = (budget - self.least_cost) / (self.end_cost - self.least_cost)
            guess = some.rate_at(some.least_cost + int(share * (some.end_cost - some.least_cost)))
        rows, choice = self._around(lambda cost, _: cost <= budget, guess)
        steps = self._steps(rows)
        choice[rows] = self.start[rows]
        spent = np.concatenate([[0], np.cumsum(steps.extra)])
        cut = max(0, int(np.searchsorted(spent, budget - self._evaluate(choice)[0], side="right")) - 1)
        choice[rows[steps.row[:cut]]] = steps.to[:cut]  # of several steps of a row the last one counts
        return choice, float(steps.rate[min(cut, len(steps.rate) - 1)])

    def _around(self, comes_before: Callable[[int, float], bool], guess: float) -> tuple[Ints, Ints]:
        """(rows, choice of all): the rows that matter for a cut, and what all others have there.

        ``comes_before`` is told the cost and the damage of a place on the path; ``guess`` is the rate there, or nearly.
        All rows matter if they are not many.
        """
        rows, choice = np.arange(len(self.start)), self.start.copy()
        if len(rows) <= MANY:
            return rows, choice
        costs, damages = np.ascontiguousarray(self.costs.T, dtype=np.float64), np.ascontiguousarray(self.damages.T)
        settled_cost, settled_damage = 0.0, 0.0
        before, behind = self.start, self.end
        low, price, high, step = 0.0, guess or 1.0, math.inf, 1.15
        while len(rows) > FEW and high > low * (1 + 1e-12):
            own = (damages + price * costs).argmin(axis=0)
            place = np.arange(len(rows))
            cost, damage = costs[own, place].sum(), damages[own, place].sum()
            if comes_before(int(settled_cost + cost), float(settled_damage + damage)):
                high, before = price, own
            else:
                low, behind = price, own
            choice[rows] = before
            is_open = before != behind
            closed = np.flatnonzero(~is_open)
            settled_cost += costs[before[closed], closed].sum()
            settled_damage += damages[before[closed], closed].sum()
            rows, before, behind = rows[is_open], before[is_open], behind[is_open]
            costs, damages = costs[:, is_open], damages[:, is_open]
            if low and high < math.inf:
                price = math.sqrt(low * high)
            else:
                price, step = price * step if low else price / step, step**2
        return rows, choice

    @cached_property
    def _sample(self) -> Path | None:
        """Of some of many rows, which tell about what a rate is."""
        stride = len(self.start) // (MANY // 2)
        return Path(self.costs[::stride], self.damages[::stride]) if len(self.start) > MANY else None

    def _steps(self, rows: Ints) -> Steps:
        return (
            self._all_steps
            if len(rows) == len(self.start)
            else hull_steps(self.costs[rows], self.damages[rows], self.start[rows])
        )

    @cached_property
    def _all_steps(self) -> Steps:
        return hull_steps(self.costs, self.damages, self.start)

    def _evaluate(self, choice: Ints) -> tuple[int, float]:
        return int(picked(self.costs, choice).sum()), math.fsum(picked(self.damages, choice).tolist())

    def _core(self, price: float) -> Ints:
        """Rows that lose least by another option when a byte costs ``price``, those first that lose most."""
        least, _, second = two_least(self.damages.T + price * self.costs.T)
        regret = second - least
        order = np.argsort(regret, kind="stable")[: CORE if len(regret) <= MANY else SMALL_CORE]
        return np.asarray(order[np.isfinite(regret[order])][::-1])

    def _by_size(self) -> Ints:
        """All rows, those of large steps first, in classes of a factor of two."""
        largest = np.ones(len(self.costs))
        np.maximum.at(largest, self._all_steps.row, self._all_steps.extra)
        return np.argsort(-np.round(np.log2(largest)), kind="stable")

    def _solve_core(self, core: Ints, room: int, fallback: Ints) -> tuple[Ints, bool]:
        """The best options of the rows ``core`` within ``room`` bytes together, row by row with bounds, and whether
        they are proven best.

        States are (cost, damage) of the rows so far. One is dropped if another costs and hurts no more, or if even
        without integrality the rows that are left cannot make it better than the best known.
        """
        n = len(core)
        own = hull_steps(self.costs[core], self.damages[core], self.start[core])
        of, extra, saved = own.row, own.extra, own.saved
        first_cost = np.concatenate([np.cumsum(picked(self.costs[core], self.start[core])[::-1])[::-1], [0]])
        first_damage = np.concatenate([np.cumsum(picked(self.damages[core], self.start[core])[::-1])[::-1], [0.0]])
        cost, damage = np.zeros(1, dtype=np.int64), np.zeros(1)
        best = float(picked(self.damages[core], fallback).sum())
        rounding = 1e-13 * float(first_damage[0])
        trail: list[tuple[Ints, Ints]] = []
        is_best = True
        for i in range(n):
            options = np.flatnonzero(np.isfinite(self.damages[core[i]]))
            options = options[self.costs[core[i], options] <= room]
            parent, option = np.divmod(np.arange(len(cost) * len(options)), len(options))
            option = options[option]
            cost, damage = cost[parent] + self.costs[core[i], option], damage[parent] + self.damages[core[i], option]
            later = of > i
            steps = np.concatenate([[0], np.cumsum(extra[later])]).astype(np.int64)
            gains = np.concatenate([[0.0], np.cumsum(saved[later])])
            left = room - cost - first_cost[i + 1]
            fits = left >= 0
            ideal = damage + first_damage[i + 1] - np.interp(left, steps, gains)
            whole = damage + first_damage[i + 1] - gains[np.searchsorted(steps, np.maximum(left, 0), side="right") - 1]
            best = min(best, float(whole[fits].min(initial=math.inf)))
            keep = np.flatnonzero(fits & (ideal <= best + rounding))
            keep = keep[np.lexsort((damage[keep], cost[keep]))]
            lowest = np.minimum.accumulate(damage[keep])
            keep = keep[np.concatenate([[True], damage[keep][1:] < lowest[:-1]])] if len(keep) else keep
            if not len(keep):
                return fallback, is_best
            if len(keep) > MOST_STATES:
                is_best = False
                keep = np.sort(keep[np.argsort(ideal[keep], kind="stable")[:MOST_STATES]])
            cost, damage = cost[keep], damage[keep]
            trail.append((parent[keep], option[keep]))
        at = int(np.lexsort((cost, damage))[0])
        picks = np.empty(n, dtype=np.int64)
        for i in range(n - 1, -1, -1):
            parent, option = trail[i]
            picks[i], at = option[at], int(parent[at])
        return picks, is_best
