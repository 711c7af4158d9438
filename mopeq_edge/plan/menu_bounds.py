"""What any choice of types costs at least, when bytes are bought at a price instead of limited."""

from __future__ import annotations

import math

import numpy as np

from mopeq_edge.expert_groups.layout import MAX_GROUPS
from mopeq_edge.plan.hull import Doubles, Ints, two_least
from mopeq_edge.plan.menu_problem import Menus, Problem
from mopeq_edge.plan.menu_search import least_of_stacks

MOST_SUMS = 10**8
"""Sums that the search through all menus of a stack makes, at most: rows times menus."""

CLOSE = 1e-4
"""Share of the damage within which a bound is good enough."""


class Priced:
    """``problem`` with bytes at ``price`` (damage a byte)."""

    def __init__(self, problem: Problem, price: float) -> None:
        self.problem, self.price = problem, price
        n_types = problem.costs.shape[1]
        self._value = problem.priced(price)
        self._best, first, second = two_least(self._value)
        place = problem.stack * n_types + first
        size = len(problem.grouped) * n_types
        lost = second - self._best
        self._used: Menus = (np.bincount(place, minlength=size) > 0).reshape(-1, n_types)
        self._lost: Doubles = np.bincount(place, lost, minlength=size).reshape(-1, n_types).astype(np.float64)
        """[n_stacks, n_types]: what is lost at least without a type."""

    def estimate(self, menus: Menus) -> float:
        """At most what :meth:`least` finds, from sums alone."""
        missing = self._used & ~menus
        return float(self._best.sum() + self._lost[missing].sum())

    def least(self, menus: Menus) -> float:
        """Damage and price of the best choice within ``menus``, without what groups cost."""
        least = np.full(len(self._best), np.inf)
        for kind, own in enumerate(self._value):
            np.minimum(least, np.where(menus[:, kind][self.problem.stack], own, np.inf), out=least)
        return float(least.sum())

    def lower_bound(self, budget: int, known: tuple[Menus, float] | None) -> float:
        """No choice within ``budget`` bytes has less damage; ``known`` are the best menus found and their damage."""
        grouped = self.problem.grouped
        of_stack = grouped[self.problem.stack]
        total = float(self._best[~of_stack].sum())
        if of_stack.any():
            useful = np.flatnonzero(np.isfinite(self._value[:, of_stack]).any(axis=1))
            n_menus = sum(math.comb(len(useful), k) for k in range(1, MAX_GROUPS + 1))
            if known is None or n_menus * len(of_stack) <= MOST_SUMS:
                total += float(self._over_all_menus(of_stack, useful).sum())
            else:
                total += self._searched(*known)
        return total - self.price * budget

    def _over_all_menus(self, of_stack: Menus, useful: Ints) -> Doubles:
        """[n_stacks]: damage and price of a stack, groups included, with the best of all menus."""
        stack = self.problem.stack[of_stack]
        starts = np.flatnonzero(np.diff(stack, prepend=-1))
        extra: Doubles = self.price * self.problem.overhead[stack[starts]].astype(np.float64)
        padding: Doubles = self.price * self.problem.padding[stack[starts]].astype(np.float64)
        value = np.ascontiguousarray(self._value[np.ix_(useful, of_stack)])
        return _least_over_menus(value, starts, extra, padding[:, useful])

    def _searched(self, menus: Menus, damage: float) -> float:
        """The same, summed, within :data:`CLOSE` of what ``menus`` cost or as far as the search comes."""
        numbers = np.flatnonzero(self.problem.grouped)
        starts, ends = (np.searchsorted(self.problem.stack, numbers, side=side) for side in ("left", "right"))
        total = 0.0
        enough = CLOSE * damage
        for n_rows in np.unique(ends - starts):
            alike = np.flatnonzero(ends - starts == n_rows)
            rows = starts[alike][:, None] + np.arange(n_rows)
            value = np.ascontiguousarray(self._value[:, rows].swapaxes(0, 1))
            own = menus[numbers[alike]]
            extra: Doubles = self.price * self.problem.overhead[numbers[alike]].astype(np.float64)
            within = np.where(own[:, :, None], value, np.inf).min(axis=1).sum(axis=1)
            known = within + extra[np.arange(len(own)), own.sum(axis=1)]
            total += float(least_of_stacks(value, extra, known, enough * len(alike) / len(numbers)).sum())
        return total


def _least_over_menus(value: Doubles, starts: Ints, extra: Doubles, padding: Doubles) -> Doubles:
    """[n_stacks]: the least sum over a stack's rows plus ``extra`` of the menu's size, over all menus."""
    best = np.full(len(starts), np.inf)

    def add(least: Doubles, first: int, size: int) -> None:
        for kind in range(first, len(value)):
            lower = np.minimum(least, value[kind])
            total = np.add.reduceat(lower, starts) + extra[:, size]
            if size == 1:
                total += padding[:, kind]
            np.minimum(best, total, out=best)
            if size < MAX_GROUPS:
                add(lower, kind + 1, size + 1)

    add(np.full(value.shape[1], np.inf), 0, 1)
    return best
