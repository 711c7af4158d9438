"""What a stack costs at least with the best of all its menus: branch and bound over many stacks at once.

A node is a stack without some types, of which others must stay. Rows take what they like best of the rest. If those are
too many types, each that goes costs at least what its rows lose by their second choice, so the cheapest that may go
bound the node from below; it is split by the one that is missed least: without it, or with it for good.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mopeq_edge.expert_groups.layout import MAX_GROUPS
from mopeq_edge.plan.hull import Doubles, Ints

Flags = npt.NDArray[np.bool_]

MOST_ROUNDS = 60
AT_ONCE = 256
"""Nodes that are looked at together: [types, rows] numbers each."""


@dataclass(frozen=True)
class _Nodes:
    """``stack`` [n]; ``gone`` and ``kept`` [n, n_types]; ``bound`` [n]; ``split`` [n], the type to split by or -1."""

    stack: Ints
    gone: Flags
    kept: Flags
    bound: Doubles
    split: Ints

    def pick(self, which: Flags) -> _Nodes:
        return _Nodes(self.stack[which], self.gone[which], self.kept[which], self.bound[which], self.split[which])

    def with_more(self, *others: _Nodes) -> _Nodes:
        every = (self, *others)
        return _Nodes(
            np.concatenate([own.stack for own in every]),
            np.concatenate([own.gone for own in every]),
            np.concatenate([own.kept for own in every]),
            np.concatenate([own.bound for own in every]),
            np.concatenate([own.split for own in every]),
        )


def least_of_stacks(value: Doubles, extra: Doubles, known: Doubles, enough: float) -> Doubles:
    """[n_stacks]: bounds below of the damage and price of every stack.

    ``value`` [n_stacks, n_types, n_rows] is that of each option, ``extra`` [n_stacks, MAX_GROUPS + 1] that of so many
    groups, ``known`` [n_stacks] what some menus cost. Ends when all bounds together are within ``enough`` of those.
    """
    n_stacks, n_types, _ = value.shape
    none = np.zeros((n_stacks, n_types), dtype=bool)
    nodes = _look(value, extra, np.arange(n_stacks), none, none)
    for _ in range(MOST_ROUNDS):
        lowest = np.full(n_stacks, np.inf)
        np.minimum.at(lowest, nodes.stack, nodes.bound)
        short = np.maximum(known - lowest, 0.0)
        if short.sum() <= enough:
            break
        # the stack's lowest nodes, where most is missing
        wanted = short[nodes.stack] > enough / n_stacks
        is_open = wanted & (nodes.split >= 0) & (nodes.bound < known[nodes.stack])
        if not is_open.any():
            break
        parents = nodes.pick(is_open)
        rows = np.arange(len(parents.stack))
        gone, kept = parents.gone.copy(), parents.kept.copy()
        gone[rows, parents.split] = True
        kept[rows, parents.split] = True
        nodes = nodes.pick(~is_open).with_more(
            _look(value, extra, parents.stack, gone, parents.kept),
            _look(value, extra, parents.stack, parents.gone, kept),
        )
    found: Doubles = np.minimum(lowest, known)
    return found


def _look(value: Doubles, extra: Doubles, stack: Ints, gone: Flags, kept: Flags) -> _Nodes:
    n_types = value.shape[1]
    least, lost = np.empty(len(stack)), np.empty((len(stack), n_types))
    used = np.empty((len(stack), n_types), dtype=bool)
    for start in range(0, len(stack), AT_ONCE):
        some = slice(start, start + AT_ONCE)
        least[some], lost[some], used[some] = _losses(value, stack[some], gone[some])
    may_go = used & ~kept
    lost = np.where(may_go, lost, np.inf)
    cheapest = np.sort(lost, axis=1)
    without = np.concatenate([np.zeros((len(stack), 1)), np.cumsum(cheapest, axis=1)], axis=1)
    n_used, rows = used.sum(axis=1), np.arange(len(stack))
    bound = np.full(len(stack), np.inf)
    for size in range(1, MAX_GROUPS + 1):
        np.minimum(bound, extra[stack, size] + without[rows, np.maximum(n_used - size, 0)], out=bound)
    split = np.where((n_used > MAX_GROUPS) & may_go.any(axis=1), lost.argmin(axis=1), -1)
    return _Nodes(stack, gone, kept, least + bound, split)


def _losses(value: Doubles, stack: Ints, gone: Flags) -> tuple[Doubles, Doubles, Flags]:
    """(sum of the rows' best [n], what is lost at least without a type [n, n_types], which are used)."""
    n, n_types, n_rows = len(stack), value.shape[1], value.shape[2]
    best, second = np.full((n, n_rows), np.inf), np.full((n, n_rows), np.inf)
    first = np.zeros((n, n_rows), dtype=np.int64)
    for kind in range(n_types):
        own = np.where(gone[:, kind, None], np.inf, value[stack, kind])
        better = own < best
        np.minimum(second, np.maximum(best, own), out=second)
        first[better] = kind
        np.minimum(best, own, out=best)
    place = (first + n_types * np.arange(n)[:, None]).ravel()
    lost = np.bincount(place, (second - best).ravel(), n * n_types).reshape(n, n_types).astype(np.float64)
    least: Doubles = best.sum(axis=1)
    return least, lost, np.bincount(place, minlength=n * n_types).reshape(n, n_types) > 0
