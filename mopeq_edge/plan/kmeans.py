"""Exact k-means of numbers: the partition of least squared distance, by dynamic programming in exact arithmetic."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from fractions import Fraction
from itertools import accumulate

_Sums = tuple[list[int], list[int]]
"""Running totals [n + 1] over the sorted values: how many there are, and their sum (scaled to integers)."""


def clusters(values: Sequence[float], k: int) -> tuple[int, ...]:
    """The cluster of each value: 0 for the cluster of the lowest mean, and so on up.

    Equal values are always together, so there are as many clusters as distinct values where those are fewer than
    ``k``. Among partitions of the same squared distance the one with the fewest values in the highest cluster is
    taken, then in the next lower one. Fractions decide, so rounding does not. Raises :class:`ValueError` for a value
    that is not finite.
    """
    if not all(math.isfinite(value) for value in values):
        raise ValueError("k-means of a value that is not finite")
    counts = Counter(values)
    distinct = sorted(counts)
    scaled = _as_integers(distinct)
    weights = [counts[value] for value in distinct]
    sums = (
        [0, *accumulate(weights)],
        [0, *accumulate(w * x for w, x in zip(weights, scaled, strict=True))],
    )
    edges = _edges(sums, len(distinct), min(k, len(distinct)))
    cluster_of = {value: sum(edge <= i for edge in edges) for i, value in enumerate(distinct)}
    return tuple(cluster_of[value] for value in values)


def _as_integers(values: Sequence[float]) -> list[int]:
    """The values times a common factor: clusters do not change, and integers add exactly."""
    ratios = [Fraction(value) for value in values]
    factor = max((ratio.denominator for ratio in ratios), default=1)
    # the denominators are powers of two
    return [ratio.numerator * (factor // ratio.denominator) for ratio in ratios]


def _edges(sums: _Sums, n: int, k: int) -> list[int]:
    """Where the second and later of ``k`` clusters start among ``n`` distinct sorted values.

    The squared distance within the clusters is a constant less the sum of (sum of values)^2 / count, so that sum
    is made as large as possible.
    """
    best = [Fraction(0), *(_weight(sums, 0, j) for j in range(1, n + 1))]
    starts: list[list[int]] = []
    for level in range(2, k + 1):
        # the first j values in ``level`` clusters, the last of which starts at start[j]
        start, found = [0] * (n + 1), [Fraction(0)] * (n + 1)
        # the best start does not fall as j rises, so halving finds all of them in n log n steps
        todo = [(level, n, level - 1, n - 1)]
        while todo:
            low, high, first, last = todo.pop()
            if low > high:
                continue
            j = (low + high) // 2
            choices = range(first, min(last, j - 1) + 1)
            # a later start wins a tie: fewer values in the higher cluster
            found[j], start[j] = max((best[i] + _weight(sums, i, j), i) for i in choices)
            todo += [(low, j - 1, first, start[j]), (j + 1, high, start[j], last)]
        best = found
        starts.append(start)
    edges, end = [], n
    for start in reversed(starts):
        end = start[end]
        edges.append(end)
    return edges[::-1]


def _weight(sums: _Sums, i: int, j: int) -> Fraction:
    """(sum of values)^2 / count of the distinct values i to j - 1."""
    counts, totals = sums
    return Fraction((totals[j] - totals[i]) ** 2, counts[j] - counts[i])
