"""The knapsack of the per-expert layout: a type for every expert, where each further type of a stack costs bytes.

A group more means a tensor info, a column of the map and padding. A *menu* says which types each stack may use; with
menus given, that overhead is a constant and what remains is the knapsack of :mod:`mopeq_edge.plan.path`. Menus are
made for a fixed series of prices of a byte and the best one for the budget is taken, skipping those whose bound is
no better than what is known. Nothing but the final cut depends on the budget, so the damage never rises with it.
A problem of many rows looks at the menus of prices near its own alone, and further where that could make it rise.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from dataclasses import dataclass

from mopeq_edge.plan.menu_bounds import Priced
from mopeq_edge.plan.menu_problem import Menus, Problem
from mopeq_edge.plan.menu_series import Series
from mopeq_edge.plan.path import Chosen, Path


class MenuKnapsack:
    """``problem`` for any number of budgets: what does not depend on them is worked out once."""

    def __init__(self, problem: Problem) -> None:
        self._problem = problem
        self._whole = Path(problem.costs, problem.damages)
        self._series = Series(problem, self._whole)

    def solve(self, budget: int, spare: int = 0, *, proven: bool = True) -> tuple[Chosen | None, float | None]:
        """The least damage found within ``budget`` bytes (None where no menus fit it) and a lower bound of it.

        The bound holds for budgets of ``spare`` bytes more, too; it is None unless it is to be ``proven``, which can
        take as long as all the rest.
        """
        problem, series, price = self._problem, self._series, self._whole.rate_at(budget)
        priced = Priced(problem, price)
        looked_at = series.near(price)
        best = _best_of(problem, series.menus(looked_at), priced, budget, None)
        if best is None:
            best = _best_of(problem, series.menus(series.near(0)), priced, budget, None)
        while best is not None and (missing := series.missing(best.chosen.damage, looked_at)):
            looked_at = range(looked_at.start, missing.stop)
            best = _best_of(problem, series.menus(missing), priced, budget, best)
        if not proven:
            return None if best is None else best.chosen, None
        if best is None:
            return None, max(0.0, priced.lower_bound(budget + spare, None))
        # the price of a byte within the menus, which knows what groups cost, leads to the sharper bound
        bound = Priced(problem, best.chosen.rate).lower_bound(budget + spare, (best.menus, best.chosen.damage))
        return best.chosen, max(0.0, bound)


@dataclass(frozen=True)
class _Best:
    """What was ``chosen`` within ``menus``."""

    chosen: Chosen
    menus: Menus


def _best_of(problem: Problem, every: Iterable[Menus], priced: Priced, budget: int, best: _Best | None) -> _Best | None:
    """The best choice within any of the menus, or ``best``; those whose bound is no better are not solved."""
    found = list({menus.tobytes(): menus for menus in every}.values())
    rooms = [budget - problem.overhead_of(menus) for menus in found]
    # by the lowest bound first, which is made sharper before a whole path is
    waiting = [(priced.estimate(menus) - priced.price * rooms[at], False, at) for at, menus in enumerate(found)]
    heapq.heapify(waiting)
    while waiting:
        bound, is_sharp, at = heapq.heappop(waiting)
        if best is not None and bound > best.chosen.damage * (1 + 1e-12):
            break
        if not is_sharp:
            heapq.heappush(waiting, (priced.least(found[at]) - priced.price * rooms[at], True, at))
            continue
        chosen = problem.within(found[at]).solve(rooms[at])
        if chosen is not None and (best is None or chosen.damage < best.chosen.damage):
            best = _Best(chosen, found[at])
    return best
