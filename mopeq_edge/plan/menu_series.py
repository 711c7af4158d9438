"""Menus for a fixed series of prices of a byte; nothing here depends on the budget."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cache

import numpy as np

from mopeq_edge.expert_groups.layout import MAX_GROUPS
from mopeq_edge.plan.menu_problem import Menus, Problem
from mopeq_edge.plan.path import MANY, Path

PRICES_AN_OCTAVE, FEW_AN_OCTAVE = 16, 4
"""Prices that menus are made for, and those of a problem of more than :data:`MANY` rows."""
MOST_PRICES = 1600
NEAR = 0.5
"""Octaves on either side of the price where the budget cuts the path that a problem of many rows looks at."""


class Series:
    """Menus of ``problem`` by number: those of each price, and those with the types of two prices that differ.

    ``whole`` is the path of ``problem`` with all types.
    """

    def __init__(self, problem: Problem, whole: Path) -> None:
        self._problem, self._whole = problem, whole
        self.is_large = len(problem.costs) > MANY
        self._octaves = _octaves(whole, FEW_AN_OCTAVE if self.is_large else PRICES_AN_OCTAVE)
        self._menus_at = cache(lambda number: problem.menus_at(float(2.0 ** self._octaves[number])))

    def near(self, rate: float) -> range:
        """Numbers of the prices for a budget that cuts the path at ``rate``: all, or of a large problem some."""
        if not self.is_large or rate <= 0:
            return range(len(self._octaves))
        at = min(max(math.log2(rate), self._octaves[0]), self._octaves[-1])
        first, last = np.searchsorted(self._octaves, (at - NEAR, at + NEAR))
        return range(int(first), min(int(last) + 1, len(self._octaves)))

    def missing(self, damage: float, looked_at: range) -> range:
        """Numbers whose menus could have had less than ``damage`` at a smaller budget, which did look at them.

        Even without groups no budget has less damage than its point on the path. From where that is ``damage`` on,
        none may be left out, or the damage could rise with the budget.
        """
        rate = self._whole.rate_to(damage * (1 - 1e-9))
        if rate is None:
            return range(0)
        reach = self.near(rate).stop
        return range(looked_at.stop, max(reach, looked_at.stop))

    def menus(self, numbers: range) -> Iterator[Menus]:
        """The menus of ``numbers``, and, if that is few types for every stack, all of them."""
        every = self._problem.every_type()
        if every[self._problem.grouped].sum(axis=1).max(initial=0) <= MAX_GROUPS:
            yield every
        for number in numbers:
            own = self._menus_at(number)
            yield own
            if number + 1 < len(self._octaves):
                above = self._menus_at(number + 1)
                if (own != above).any():
                    yield self._problem.both(above, own)


def _octaves(whole: Path, an_octave: int) -> list[float]:
    """Logarithms (base 2) of prices over the range of the path's rates, rising."""
    if whole.rates is None:
        return [0.0]
    low, high = (an_octave * math.log2(rate) for rate in whole.rates)
    step = max(1.0, (high - low) / MOST_PRICES)
    return [(low + index * step) / an_octave for index in range(int((high - low) / step) + 2)]
