"""The knapsack of the per-expert layout: a type for every expert, where each further type of a stack costs bytes.

A group more means a tensor info, a column of the map and padding. A *menu* says which types each stack may use; with
menus given, that overhead is a constant and what remains is the knapsack of :mod:`mopeq_edge.plan.path`. Menus are
made for a fixed series of prices of a byte and the best one for the budget is taken, skipping those whose bound is
no better than what is known. Nothing but the final cut depends on the budget, so the damage never rises with it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mopeq_edge.expert_groups.layout import MAX_GROUPS
from mopeq_edge.plan.path import NEVER, Chosen, Doubles, Ints, Path

Menus = npt.NDArray[np.bool_]
"""[n_stacks, n_types]: the types that a stack may use."""

PRICES_AN_OCTAVE = 16
MOST_PRICES = 1600
MOST_MENUS = 30_000
"""Menus of one stack that the lower bound enumerates, at most."""


@dataclass(frozen=True)
class Problem:
    """Rows are matrices (experts, or whole tensors of one matrix), columns are types.

    ``costs`` [n, n_types] are bytes without padding, ``damages`` [n, n_types]; a type that a row lacks has cost
    :data:`NEVER` and infinite damage. ``stack`` [n], rising, is the number of the tensor that a row belongs to.
    ``overhead`` [n_stacks, MAX_GROUPS + 1] are the bytes that 0 to MAX_GROUPS groups add to one stock tensor.
    ``padding`` [n_stacks, n_types] is the padding of a stock tensor, ``group_padding`` the most that a group's can be.
    ``grouped`` [n_stacks] tells stacks from tensors of one matrix, which have no overhead.
    """

    costs: Ints
    damages: Doubles
    stack: Ints
    overhead: Ints
    padding: Ints
    group_padding: Ints
    grouped: npt.NDArray[np.bool_]

    def overhead_of(self, menus: Menus) -> int:
        """Bytes beyond those of the rows, at most, if every stack uses its whole menu."""
        size = menus.sum(axis=1)
        single = np.where(menus, self.padding, 0).max(axis=1)
        several = np.where(menus, self.group_padding, 0).sum(axis=1) + self._groups(size)
        return int(np.where(size == 1, single, several)[self.grouped].sum())

    def _groups(self, size: Ints) -> Ints:
        return self.overhead[np.arange(len(size)), np.minimum(size, MAX_GROUPS)]

    def menus_at(self, price: float) -> Menus:
        """What every stack uses at ``price`` (damage a byte): all that its rows like best, less what does not pay."""
        value = self.damages + price * self.costs
        everyone, n_types = np.arange(len(value)), value.shape[1]
        menus: Menus = np.zeros((len(self.grouped), n_types), dtype=bool)
        menus[self.stack, value.argmin(axis=1)] = True
        while True:
            inner = np.where(menus[self.stack], value, np.inf)
            first = inner.argmin(axis=1)
            least = inner[everyone, first]
            inner[everyone, first] = np.inf
            lost = np.bincount(self.stack * n_types + first, inner.min(axis=1) - least, menus.size).reshape(menus.shape)
            size = menus.sum(axis=1)
            spared = (self._groups(size) - self._groups(size - 1))[:, None] + self.group_padding
            net = np.where(menus & self.grouped[:, None], lost - price * spared, np.inf)
            worst = net.argmin(axis=1)
            drop = ((net.min(axis=1) < 0) | (size > MAX_GROUPS)) & self.grouped & (size > 1)
            if not drop.any():
                return menus
            menus[drop, worst[drop]] = False

    def within(self, menus: Menus) -> Path:
        """The knapsack with the types of ``menus`` only."""
        allowed = menus[self.stack]
        return Path(np.where(allowed, self.costs, NEVER), np.where(allowed, self.damages, np.inf))


def solve_menus(problem: Problem, budget: int, spare: int = 0) -> tuple[Chosen | None, float]:
    """The least damage found within ``budget`` bytes (None where no menus fit it) and a lower bound of it.

    The bound holds for budgets of ``spare`` bytes more, too.
    """
    whole = Path(problem.costs, problem.damages)
    price = whole.rate_at(budget)
    value = problem.damages + price * problem.costs
    found = {menus.tobytes(): menus for menus in _series(problem, whole.rate)}
    known: list[tuple[float, int, Menus]] = []
    for menus in found.values():
        overhead = problem.overhead_of(menus)
        least = np.where(menus[problem.stack], value, np.inf).min(axis=1).sum()
        known.append((float(least) - price * (budget - overhead), overhead, menus))
    best: Chosen | None = None
    tightest = price
    for bound, overhead, menus in sorted(known, key=lambda item: (item[0], item[1], item[2].tobytes())):
        if best is not None and bound > best.damage * (1 + 1e-12):
            break
        path = problem.within(menus)
        chosen = path.solve(budget - overhead)
        if chosen is not None and (best is None or chosen.damage < best.damage):
            best, tightest = chosen, path.rate_at(budget - overhead)
    return best, max(0.0, *(_lower_bound(problem, p, budget + spare) for p in {price, tightest}))


def _series(problem: Problem, rates: Doubles) -> Iterator[Menus]:
    """Menus for all prices, between two that differ those with the types of both, and, if few, all types."""
    every = np.zeros((len(problem.grouped), problem.costs.shape[1]), dtype=bool)
    np.logical_or.at(every, problem.stack, np.isfinite(problem.damages))
    if every[problem.grouped].sum(axis=1).max(initial=0) <= MAX_GROUPS:
        yield every
    before: Menus | None = None
    for price in _prices(rates):
        menus = problem.menus_at(price)
        if before is not None and (menus != before).any():
            both = menus | before
            too_many = (both.sum(axis=1) > MAX_GROUPS) & problem.grouped
            both[too_many] = before[too_many]
            yield both
        yield menus
        before = menus


def _prices(rates: Doubles) -> Iterator[float]:
    """Prices over the range of ``rates``; the same for every budget."""
    if not len(rates):
        yield 0.0
        return
    low, high = (PRICES_AN_OCTAVE * math.log2(float(r)) for r in (rates[-1], rates[0]))
    step = max(1.0, (high - low) / MOST_PRICES)
    for index in range(int((high - low) / step) + 2):
        yield float(2.0 ** ((low + index * step) / PRICES_AN_OCTAVE))


def _lower_bound(problem: Problem, price: float, budget: int) -> float:
    """The least damage that any menus allow is no less: bytes are bought at ``price`` instead of limited."""
    value = problem.damages + price * problem.costs
    least = value.min(axis=1)
    of_stack = problem.grouped[problem.stack]
    total = float(least[~of_stack].sum())
    if of_stack.any():
        rows, stack = value[of_stack], problem.stack[of_stack]
        starts = np.flatnonzero(np.diff(stack, prepend=-1))
        sums = np.add.reduceat(least[of_stack], starts)
        numbers = stack[starts]
        extra: Doubles = price * problem.overhead[numbers].astype(np.float64)
        padding: Doubles = price * problem.padding[numbers].astype(np.float64)
        useful = np.flatnonzero(np.isfinite(rows).any(axis=0))
        if sum(math.comb(len(useful), k) for k in range(1, MAX_GROUPS + 1)) <= MOST_MENUS:
            sums = _least_over_menus(np.ascontiguousarray(rows[:, useful].T), starts, extra, padding[:, useful])
        total += float(sums.sum())
    return total - price * budget


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
