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

CORE = 100
"""Rows that are solved exactly, at most."""


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
        self.row, self.to, self.extra, self.saved, self.rate = _steps(costs, damages, self.start)
        self.spent: Ints = np.concatenate([[0], np.cumsum(self.extra)])

    def rate_at(self, budget: int) -> float:
        """Damage that one more byte saves where ``budget`` cuts the path; 0 beyond its end."""
        cut = self._cut(budget)
        return float(self.rate[cut]) if cut < len(self.rate) else 0.0

    def solve(self, budget: int) -> Chosen | None:
        """The best choice found within ``budget``; None where even the cheapest is too much."""
        if budget < self.least_cost:
            return None
        cut = self._cut(budget)
        choice = self.start.copy()
        choice[self.row[:cut]] = self.to[:cut]  # of several steps of a row the last one counts
        cost, damage = self._evaluate(choice)
        if cut == len(self.row):
            return Chosen(choice, cost, damage, damage)
        bound = max(0.0, damage - float(self.rate[cut]) * (budget - cost))
        core = self._core(float(self.rate[cut]))
        room = budget - cost + int(_at(self.costs[core], choice[core]).sum())
        found = choice.copy()
        found[core] = self._solve_core(core, room, choice[core])
        better_cost, better = self._evaluate(found)
        if better < damage:
            choice, cost, damage = found, better_cost, better
        return Chosen(choice, cost, damage, min(bound, damage))

    def _cut(self, budget: int) -> int:
        """Number of steps that ``budget`` pays in full."""
        return max(0, int(np.searchsorted(self.spent, budget - self.least_cost, side="right")) - 1)

    def _evaluate(self, choice: Ints) -> tuple[int, float]:
        return int(_at(self.costs, choice).sum()), math.fsum(_at(self.damages, choice))

    def _core(self, price: float) -> Ints:
        """Rows that lose least by another option when a byte costs ``price``, those first that lose most."""
        value = np.sort(self.damages + price * self.costs, axis=1)
        regret = value[:, 1] - value[:, 0] if value.shape[1] > 1 else np.full(len(value), np.inf)
        order = np.argsort(regret, kind="stable")[:CORE]
        return np.asarray(order[np.isfinite(regret[order])][::-1])

    def _solve_core(self, core: Ints, room: int, fallback: Ints) -> Ints:
        """The best options of the rows ``core`` within ``room`` bytes together, row by row with bounds.

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
                return fallback
            cost, damage = cost[keep], damage[keep]
            trail.append((parent[keep], option[keep]))
        at = int(np.lexsort((cost, damage))[0])
        picks = np.empty(n, dtype=np.int64)
        for i in range(n - 1, -1, -1):
            parent, option = trail[i]
            picks[i], at = option[at], int(parent[at])
        return picks


def _at(values: npt.NDArray[np.generic], choice: Ints) -> npt.NDArray[np.generic]:
    return values[np.arange(len(choice)), choice]


def _steps(costs: Ints, damages: Doubles, start: Ints) -> tuple[Ints, Ints, Ints, Doubles, Doubles]:
    """(row, option, extra cost, damage saved, rate) of every hull step, by falling rate."""
    at, live, rate = start.copy(), np.arange(len(costs)), np.full(len(costs), np.inf)
    found: list[tuple[Ints, Ints, Ints, Doubles, Doubles]] = []
    while len(live):
        extra = costs[live] - costs[live, at[live]][:, None]
        saved = damages[live, at[live]][:, None] - damages[live]
        useful = (extra > 0) & (saved > 0)
        rates = np.where(useful, saved / np.where(useful, extra, 1), 0.0)
        most = rates.max(axis=1)
        # of equally steep steps the longest: those in between lie on it
        to = np.where(useful & (rates == most[:, None]), extra, 0).argmax(axis=1)
        onward = np.flatnonzero(most > 0)
        live, to = live[onward], to[onward]
        # rounding must not let a later step of a row come first
        rate[live] = np.minimum(rate[live], most[onward])
        found.append((live, to, extra[onward, to], saved[onward, to], rate[live].copy()))
        at[live] = to
    row, option, extra, saved, rates = (np.concatenate(part) for part in zip(*found, strict=True))
    piece = np.repeat(np.arange(len(found)), [len(part[0]) for part in found])
    order = np.lexsort((piece, row, -rates))
    return row[order], option[order], extra[order], saved[order], rates[order]
