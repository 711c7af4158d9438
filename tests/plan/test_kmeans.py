"""Exact k-means against all assignments, its rule for ties, and sizes of real models."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import numpy.typing as npt
import pytest

from mopeq_edge.plan.kmeans import clusters


def distance(values: Sequence[float], labels: Sequence[int]) -> Fraction:
    """Squared distance of all values from the means of their clusters."""
    total = Fraction(0)
    for label in set(labels):
        own = [Fraction(v) for v, other in zip(values, labels, strict=True) if other == label]
        mean = sum(own, Fraction(0)) / len(own)
        total += sum(((v - mean) ** 2 for v in own), Fraction(0))
    return total


def least_distance(values: npt.NDArray[np.float64], k: int) -> float:
    """Over all k^n assignments, whatever their order."""
    n = len(values)
    ways = np.array(list(itertools.product(range(k), repeat=n)), dtype=np.int8).reshape(-1, n)
    total = np.zeros(len(ways))
    for label in range(k):
        inside = ways == label
        count = np.maximum(inside.sum(axis=1), 1)
        mean = (inside @ values) / count
        total += (inside * (values - mean[:, None]) ** 2).sum(axis=1)
    return float(total.min())


@pytest.mark.parametrize("n", range(1, 13))
def test_no_assignment_is_better(n: int) -> None:
    rng = np.random.default_rng(n)
    for values in (rng.normal(size=n), 10 ** rng.uniform(-4, 0, n), rng.integers(0, 6, n).astype(float)):
        labels = clusters(values.tolist(), 3)
        assert float(distance(values.tolist(), labels)) == pytest.approx(least_distance(values, 3), rel=1e-9, abs=1e-12)
        means = [values[np.array(labels) == label].mean() for label in sorted(set(labels))]
        assert means == sorted(means)
        assert sorted(set(labels)) == list(range(min(3, len(set(values.tolist())))))


@pytest.mark.parametrize("k", [1, 2, 3, 4])
@pytest.mark.parametrize("seed", range(40))
def test_the_rule_for_ties(k: int, seed: int) -> None:
    """Small whole numbers tie often: all ways to cut the distinct values, exactly."""
    rng = np.random.default_rng(seed)
    values = [float(v) for v in rng.integers(0, 9, rng.integers(1, 15))]
    distinct = sorted(set(values))
    ways = []
    for cuts in itertools.combinations(range(1, len(distinct)), min(k, len(distinct)) - 1):
        labels = [sum(distinct.index(v) >= cut for cut in cuts) for v in values]
        sizes = tuple(labels.count(label) for label in reversed(range(len(cuts) + 1)))
        ways.append((distance(values, labels), sizes, labels))
    assert clusters(values, k) == tuple(min(ways)[2])


def test_by_hand() -> None:
    assert clusters([1, 2, 10, 11, 30], 3) == (0, 0, 1, 1, 2)
    # the order of the values is that of the labels
    assert clusters([30, 1, 11, 2, 10], 3) == (2, 0, 1, 0, 1)
    # {0} {1, 2} {3}, {0, 1} {2} {3} and {0} {1} {2, 3} are as good: few in the highest, then few in the middle
    assert clusters([0, 1, 2, 3], 3) == (0, 0, 1, 2)
    assert clusters([5, 5, 5], 3) == (0, 0, 0)
    assert clusters([7, 5, 7, 5], 3) == (1, 0, 1, 0)
    assert clusters([0.0, -0.0, 1], 2) == (0, 0, 1)
    assert clusters([4.0], 3) == (0,)
    assert clusters([], 3) == ()


def test_scale_and_shift_change_nothing() -> None:
    values = np.random.default_rng(5).integers(0, 1000, 50).astype(float)
    expected = clusters(values.tolist(), 3)
    assert clusters((values * 2.0**-300).tolist(), 3) == expected
    assert clusters((values + 4096).tolist(), 3) == expected
    assert len(set(expected)) == 3


def test_order_changes_nothing() -> None:
    values = np.random.default_rng(6).integers(0, 12, 40).astype(float)
    labels = np.array(clusters(values.tolist(), 3))
    order = np.random.default_rng(7).permutation(40)
    np.testing.assert_array_equal(clusters(values[order].tolist(), 3), labels[order])


def test_a_whole_model() -> None:
    """48 layers of 128 experts."""
    values = np.random.default_rng(8).lognormal(size=6144).tolist()
    began = time.monotonic()
    labels = clusters(values, 3)
    assert time.monotonic() - began < 30
    # no single value gains by going to the nearest other mean
    array, numbers = np.array(values), np.array(labels)
    means = np.array([array[numbers == c].mean() for c in range(3)])
    np.testing.assert_array_equal(np.abs(array[:, None] - means).argmin(axis=1), numbers)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_value_that_is_not_finite(value: float) -> None:
    with pytest.raises(ValueError, match="not finite"):
        clusters([1.0, value], 3)
