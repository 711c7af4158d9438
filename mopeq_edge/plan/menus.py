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


def solve_menus(problem: Problem, budget: int, spare: int = 0) -> tuple[Chosen | None, float]:
    """The least damage found within ``budget`` bytes (None where no menus fit it) and a lower bound of it.

    The bound holds for budgets of ``spare`` bytes more, too.
    """
    whole = Path(problem.costs, problem.damages)
    series, price = Series(problem, whole), whole.rate_at(budget)
    priced = Priced(problem, price)
    looked_at = series.near(price)
    best = _best_of(problem, series.menus(looked_at), priced, budget, None)
    if best is None:
        best = _best_of(problem, series.menus(series.near(0)), priced, budget, None)
    while best is not None and (missing := series.missing(best.chosen.damage, looked_at)):
        looked_at = range(looked_at.start, missing.stop)
        best = _best_of(problem, series.menus(missing), priced, budget, best)
    bounds = [priced] if best is None or best.price == price else [priced, Priced(problem, best.price)]
    known = None if best is None else (best.menus, best.chosen.damage)
    bound = max(0.0, *(own.lower_bound(budget + spare, known) for own in bounds))
    return None if best is None else best.chosen, bound


@dataclass(frozen=True)
class _Best:
    """What was ``chosen`` within ``menus``, and the ``price`` of a byte there."""

    chosen: Chosen
    menus: Menus
    price: float


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
        path = problem.within(found[at])
        chosen = path.solve(rooms[at])
        if chosen is not None and (best is None or chosen.damage < best.chosen.damage):
            best = _Best(chosen, found[at], path.rate_at(rooms[at]))
    return best
