"""Lower convex hulls of many rows at once: which options of a row are worth their bytes at some price.

Rows are [n, n_options] of costs (bytes) and damages; one that lacks an option has :data:`NEVER` and infinity there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Doubles = npt.NDArray[np.float64]
_Real = TypeVar("_Real", np.float32, np.float64)

NEVER = 2**60
"""Cost of an option that a row lacks; its damage is infinite."""


@dataclass(frozen=True)
class Steps:
    """From option to option along the hulls, by falling ``rate``: all arrays [n_steps].

    A step takes ``row`` to the option ``to`` for ``extra`` bytes; ``saved`` damage over that is its ``rate``.
    """

    row: Ints
    to: Ints
    extra: Ints
    saved: Doubles
    rate: Doubles


def first_options(costs: Ints, damages: Doubles) -> Ints:
    """[n]: where every hull begins, at the cheapest option; of several the one of least damage."""
    cheapest = costs == costs.min(axis=1, keepdims=True)
    return np.asarray(np.where(cheapest, damages, np.inf).argmin(axis=1))


def last_options(costs: Ints, damages: Doubles) -> Ints:
    """[n]: where every hull ends, at the option of least damage; of several the cheapest."""
    least = damages == damages.min(axis=1, keepdims=True)
    return np.asarray(np.where(least, costs, NEVER).argmin(axis=1))


def rate_range(costs: Ints, damages: Doubles, first: Ints, last: Ints) -> tuple[float, float] | None:
    """(lowest, highest) rate of all steps; None if there are none."""
    goes = np.flatnonzero(first != last)
    if not len(goes):
        return None
    slowest, steepest = np.inf, 0.0
    start, end = (((picked(costs, way)[goes], picked(damages, way)[goes])) for way in (first, last))
    with np.errstate(divide="ignore", invalid="ignore"):
        for cost, damage in zip(costs.T, damages.T, strict=True):
            own_cost, own_damage = cost[goes], damage[goes]
            ahead, behind = own_cost > start[0], own_cost < end[0]
            rise = np.where(ahead, (start[1] - own_damage) / (own_cost - start[0]), 0.0)
            fall = np.where(behind, (own_damage - end[1]) / (end[0] - own_cost), np.inf)
            steepest, slowest = max(steepest, float(rise.max())), min(slowest, float(fall.min()))
    return slowest, steepest


def picked(values: npt.NDArray[np.generic], choice: Ints) -> npt.NDArray[np.generic]:
    """[n]: of every row of ``values`` [n, n_options] that of its ``choice``."""
    return values[np.arange(len(choice)), choice]


def two_least(value: npt.NDArray[_Real]) -> tuple[npt.NDArray[_Real], Ints, npt.NDArray[_Real]]:
    """[n] each, of ``value`` [n_options, n]: the least, which it is, and the second least (infinity for none)."""
    least, first = value[0].copy(), np.zeros(value.shape[1], dtype=np.int64)
    second = np.full_like(least, np.inf)
    for option, own in enumerate(value[1:], 1):
        better = own < least
        np.minimum(second, np.maximum(least, own), out=second)
        first[better] = option
        np.minimum(least, own, out=least)
    return least, first, second


def hull_steps(costs: Ints, damages: Doubles, start: Ints) -> Steps:
    """All steps of all rows, from ``start``.

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
    return Steps(row, hull[at, row], longer, gain, steepness)


def _rise(costs: Ints) -> bool:
    """Whether the costs of every row rise from left to right, those that it lacks apart."""
    last = costs[:, 0] % NEVER
    for column in range(1, costs.shape[1]):
        own = costs[:, column]
        if ((own < last) & (own != NEVER)).any():
            return False
        last = np.where(own == NEVER, last, own)
    return True
