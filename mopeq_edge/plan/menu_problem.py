"""What the per-expert layout has to decide: a type for every matrix, and which types the matrices of a stack share."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from mopeq_edge.expert_groups.layout import MAX_GROUPS
from mopeq_edge.plan.hull import NEVER, Doubles, Ints, two_least
from mopeq_edge.plan.path import Path

Menus = npt.NDArray[np.bool_]
"""[n_stacks, n_types]: the types that a stack may use."""


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
        """[n_stacks] bytes that ``size`` groups of each stack add."""
        return self.overhead[np.arange(len(size)), np.minimum(size, MAX_GROUPS)]

    def menus_at(self, price: float) -> Menus:
        """What every stack uses at ``price`` (damage a byte): all that its rows like best, less what does not pay.

        Tensors of one matrix may use anything.
        """
        value = self._in_bytes(price)
        stack, (n_stacks, n_types) = self.stack, (len(self.grouped), len(value))
        menus: Menus = np.zeros((n_stacks, n_types), dtype=bool)
        menus[stack, value.argmin(axis=0)] = True
        # none but these can be in a menu from here on
        kinds = np.flatnonzero(menus.any(axis=0))
        own = menus[:, kinds]
        value = np.where(own.T[:, stack], value[kinds], np.float32(np.inf))
        least, first, second = two_least(value)
        lost, rows = np.zeros(own.shape), np.arange(len(stack))
        changed = np.ones(n_stacks, dtype=bool)
        while True:
            place = stack[rows] * len(kinds) + first[rows]
            lost[changed] = np.bincount(place, (second - least)[rows], own.size).reshape(own.shape)[changed]
            size = own.sum(axis=1)
            may_go = own & self.grouped[:, None] & (size > 1)[:, None]
            net = np.where(may_go, lost - self.spared(size)[:, kinds], np.inf)
            worst = net.argmin(axis=1)
            changed = np.isfinite(net.min(axis=1)) & ((net.min(axis=1) < 0) | (size > MAX_GROUPS))
            if not changed.any():
                menus[:, kinds] = own
                return menus | ~self.grouped[:, None]
            own[changed, worst[changed]] = False
            rows = np.flatnonzero(changed[stack])
            gone = worst[stack[rows]]
            # the others keep their first and second choice
            moved = rows[value[gone, rows] <= second[rows]]
            value[gone, rows] = np.inf
            least[moved], first[moved], second[moved] = two_least(value[:, moved])

    def _in_bytes(self, price: float) -> npt.NDArray[np.float32]:
        """[n_types, n]: what every option is worth in bytes at ``price``; digits enough to choose menus by."""
        costs, damages = self._by_type
        with np.errstate(over="ignore"):
            return np.asarray(damages / price + costs, dtype=np.float32) if price > 0 else damages.astype(np.float32)

    def priced(self, price: float) -> Doubles:
        """[n_types, n]: damage and price of every option."""
        costs, damages = self._by_type
        return damages + price * costs

    @cached_property
    def _by_type(self) -> tuple[Doubles, Doubles]:
        return np.ascontiguousarray(self.costs.T, dtype=np.float64), self.damages.T

    def within(self, menus: Menus) -> Path:
        """The knapsack with the types of ``menus`` only."""
        allowed = menus.T[:, self.stack]
        return Path(np.where(allowed, self.costs.T, NEVER).T, np.where(allowed, self.damages.T, np.inf).T)

    def spared(self, size: Ints) -> Ints:
        """[n_stacks, n_types] bytes that a stack of ``size`` groups saves by doing without one of them."""
        return (self._groups(size) - self._groups(size - 1))[:, None] + self.group_padding

    def both(self, menus: Menus, other: Menus) -> Menus:
        """The types of either; of ``other`` alone where they are too many."""
        either = menus | other
        too_many = (either.sum(axis=1) > MAX_GROUPS) & self.grouped
        either[too_many] = other[too_many]
        return either

    def every_type(self) -> Menus:
        """All that a stack has."""
        every: Menus = np.zeros((len(self.grouped), self.costs.shape[1]), dtype=bool)
        np.logical_or.at(every, self.stack, np.isfinite(self.damages))
        return every
