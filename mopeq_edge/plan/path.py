"""Multiple-choice knapsack with thousands of rows: along the convex hulls, then exactly around the last step.

Without integrality the best choice for every budget lies on one path: start at the cheapest options and take the
hull steps of all rows by damage saved per byte. Where a budget cuts that path, the rows that lose least by another
option at the price of a byte there (the core) are solved exactly and all others stay. The damage never rises with the
budget: the core depends only on the step that is cut, and at a whole number of steps the path is optimal.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Doubles = npt.NDArray[np.float64]

NEVER = 2**60
"""Cost of an option that a row lacks; its damage is infinite."""

CORE, SMALL_CORE, MANY = 100, 30, 4096
"""Rows that are solved exactly, at most; fewer where there are more than :data:`MANY`, of which each matters less."""

MOST_STATES = 10**5
"""Of the exact solution that are kept; hundreds are usual."""


@dataclass(frozen=True)
class Chosen:
    """``choice`` [n] is the option of every row; ``bound`` <= the least possible damage <= ``damage``."""

    choice: Ints
    cost: int
    damage: float
    bound: float


class Path:
    """All hull steps of ``costs`` and ``damages`` [n, n_options], by damage saved per byte."""

    def __init__(self, costs: Ints, damages: Doubles) -> None:
        self.costs, self.damages = costs, damages
        cheapest = costs == costs.min(axis=1, keepdims=True)
        self.start: Ints = np.where(cheapest, damages, np.inf).argmin(axis=1)
        self.least_cost = int(_at(costs, self.start).sum())
        self.start_damage = float(_at(damages, self.start).sum())
        self.row, self.to, self.extra, self.saved, self.rate = _steps(costs, damages, self.start)
        self.spent: Ints = np.concatenate([[0], np.cumsum(self.extra)])

    def rate_at(self, budget: int) -> float:
        """Damage that one more byte saves where ``budget`` cuts the path; 0 beyond its end."""
        cut = self._cut(budget)
        return float(self.rate[cut]) if cut < len(self.rate) else 0.0

    def solve(self, budget: int, *, exactly: bool = False) -> Chosen | None:
        """The best choice found within ``budget``; None where even the cheapest is too much.

        ``exactly`` makes all rows the core, largest steps first, so that the many small ones at the end leave few
        states: the choice is then proven best, unless there came to be more than :data:`MOST_STATES`.
        """
        if budget < self.least_cost:
            return None
        cut = self._cut(budget)
        choice = self.start.copy()
        choice[self.row[:cut]] = self.to[:cut]  # of several steps of a row the last one counts
        cost, damage = self._evaluate(choice)
        if cut == len(self.row):
            return Chosen(choice, cost, damage, damage)
        bound = max(0.0, damage - float(self.rate[cut]) * (budget - cost))
        core = self._by_size() if exactly else self._core(float(self.rate[cut]))
        room = budget - cost + int(_at(self.costs[core], choice[core]).sum())
        found = choice.copy()
        found[core], is_best = self._solve_core(core, room, choice[core])
        better_cost, better = self._evaluate(found)
        if better < damage:
            choice, cost, damage = found, better_cost, better
        return Chosen(choice, cost, damage, damage if exactly and is_best else min(bound, damage))

    def _cut(self, budget: int) -> int:
        """Number of steps that ``budget`` pays in full."""
        return max(0, int(np.searchsorted(self.spent, budget - self.least_cost, side="right")) - 1)

    def _evaluate(self, choice: Ints) -> tuple[int, float]:
        return int(_at(self.costs, choice).sum()), math.fsum(_at(self.damages, choice))

    def _core(self, price: float) -> Ints:
        """Rows that lose least by another option when a byte costs ``price``, those first that lose most."""
        value = self.damages + price * self.costs
        if value.shape[1] < 2:
            return np.empty(0, dtype=np.int64)
        value = np.partition(value, 1, axis=1)
        regret = value[:, 1] - value[:, 0]
        order = np.argsort(regret, kind="stable")[: CORE if len(value) <= MANY else SMALL_CORE]
        return np.asarray(order[np.isfinite(regret[order])][::-1])

    def _by_size(self) -> Ints:
        """All rows, those of large steps first, in classes of a factor of two."""
        largest = np.ones(len(self.costs))
        np.maximum.at(largest, self.row, self.extra)
        return np.argsort(-np.round(np.log2(largest)), kind="stable")

    def _solve_core(self, core: Ints, room: int, fallback: Ints) -> tuple[Ints, bool]:
        """The best options of the rows ``core`` within ``room`` bytes together, row by row with bounds, and whether
        they are proven best.

        States are (cost, damage) of the rows so far. One is dropped if another costs and hurts no more, or if even
        without integrality the rows that are left cannot make it better than the best known.
        """
        n = len(core)
        rank = np.full(len(self.costs), -1)
        rank[core] = np.arange(n)
        of = rank[self.row]
        inside = of >= 0
        of, extra, saved = of[inside], self.extra[inside], self.saved[inside]
        first_cost = np.concatenate([np.cumsum(_at(self.costs[core], self.start[core])[::-1])[::-1], [0]])
        first_damage = np.concatenate([np.cumsum(_at(self.damages[core], self.start[core])[::-1])[::-1], [0.0]])
        cost, damage = np.zeros(1, dtype=np.int64), np.zeros(1)
        best = float(_at(self.damages[core], fallback).sum())
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


def _at(values: npt.NDArray[np.generic], choice: Ints) -> npt.NDArray[np.generic]:
    return values[np.arange(len(choice)), choice]


def _steps(costs: Ints, damages: Doubles, start: Ints) -> tuple[Ints, Ints, Ints, Doubles, Doubles]:
    """(row, option, extra cost, damage saved, rate) of every hull step, by falling rate.

    One option after the other by rising cost, all rows at once: an option that helps goes on top of its row's hull,
    when those below it that it makes pointless are gone.
    """
    n, n_options = costs.shape
    rows = np.arange(n)
    by_cost = None if _rise(costs) else np.argsort(costs, axis=1, kind="stable")
    hull, top = np.zeros((n_options + 1, n), dtype=np.int64), np.zeros(n, dtype=np.int64)
    cost, damage, rate = hull.copy(), np.zeros((n_options + 1, n)), np.full((n_options + 1, n), np.inf)
    hull[0], cost[0], damage[0] = start, costs[rows, start], damages[rows, start]
    for column in range(n_options):
        option = None if by_cost is None else by_cost[:, column]
        own_cost, own_damage = (
            np.ascontiguousarray(a[:, column]) if option is None else a[rows, option] for a in (costs, damages)
        )
        live = np.flatnonzero((own_damage < damage[top, rows]) & (own_cost >= cost[top, rows]))
        while len(live):
            depth = top[live]
            extra, saved = own_cost[live] - cost[depth, live], damage[depth, live] - own_damage[live]
            steep = np.divide(saved, extra, out=np.full(len(live), np.inf), where=extra > 0)
            # of equally steep steps the longest: those in between lie on it
            on_top = steep < rate[depth, live]
            at, place = depth[on_top] + 1, live[on_top]
            hull[at, place] = column if option is None else option[place]
            cost[at, place], damage[at, place], rate[at, place] = own_cost[place], own_damage[place], steep[on_top]
            top[place] = at
            live = live[~on_top]
            top[live] -= 1
    row, at = np.nonzero(np.arange(1, n_options + 1) <= top[:, None])
    at += 1
    found = rate[at, row]
    order = np.argsort(-found, kind="stable")
    row, at = row[order].astype(np.int64), at[order]
    gain: Doubles = damage[at - 1, row] - damage[at, row]
    longer: Ints = cost[at, row] - cost[at - 1, row]
    steepness: Doubles = found[order]
    return row, hull[at, row], longer, gain, steepness


def _rise(costs: Ints) -> bool:
    """Whether the costs of every row rise from left to right, those that it lacks apart."""
    last = costs[:, 0] % NEVER
    for column in range(1, costs.shape[1]):
        own = costs[:, column]
        if ((own < last) & (own != NEVER)).any():
            return False
        last = np.where(own == NEVER, last, own)
    return True
