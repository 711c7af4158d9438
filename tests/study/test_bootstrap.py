"""Intervals on data whose answer is known, and rank correlations by hand and by scipy."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import spearmanr

from mopeq_edge.study.bootstrap import (
    mean_estimate,
    mean_rank_estimate,
    rank_correlation,
    rank_estimate,
    ratio_estimate,
)


def test_rho_by_hand() -> None:
    # ranks 1 2 3 4 5 and 2 1 4 3 5: 1 - 6 * 4 / (5 * 24)
    assert rank_correlation([1, 2, 3, 4, 5], [20, 10, 40, 30, 50]) == pytest.approx(0.8)
    assert rank_correlation([1, 2, 3], [30, 20, 10]) == pytest.approx(-1)
    # of ties the mean rank: 1, 2.5, 2.5, 4 and 1, 2, 3, 4 have covariance 4.5 of sqrt(4.5 * 5)
    assert rank_correlation([1, 2, 2, 3], [1, 2, 3, 4]) == pytest.approx(4.5 / np.sqrt(4.5 * 5))
    assert np.isnan(rank_correlation([1, 1, 1], [1, 2, 3]))
    assert np.isnan(rank_correlation([1, 2], [1, 2]))


def test_the_interval_of_a_mean_is_the_normal_one() -> None:
    values = np.random.default_rng(0).normal(3, 2, 400)
    found = mean_estimate(values)
    half = 1.96 * values.std(ddof=1) / np.sqrt(len(values))
    assert found.value == pytest.approx(values.mean())
    assert found.low == pytest.approx(values.mean() - half, abs=0.06 * half)
    assert found.high == pytest.approx(values.mean() + half, abs=0.06 * half)


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    rng = np.random.default_rng(1)
    covered = [found.low <= 0 <= found.high for found in (mean_estimate(rng.normal(0, 1, 60)) for _ in range(300))]
    assert 0.9 <= np.mean(covered) <= 0.985


def test_pairing_removes_what_both_files_share() -> None:
    """Windows differ a hundred times more than the files do, and the difference is still clear."""
    rng = np.random.default_rng(2)
    window = rng.uniform(0, 1, 40)
    other = window + 0.01 + rng.normal(0, 0.005, 40)
    assert mean_estimate(other - window).low > 0
    assert mean_estimate(other).low < mean_estimate(window).high


def test_a_constant_difference_has_no_width() -> None:
    found = mean_estimate([0.5] * 10)
    assert (found.value, found.low, found.high) == pytest.approx((0.5, 0.5, 0.5))


def test_rank_intervals() -> None:
    rng = np.random.default_rng(3)
    truth = rng.uniform(0, 1, 30)
    noisy = truth[:, None] + rng.normal(0, 2, (30, 24))
    found = rank_estimate(truth, noisy)
    assert found.value == pytest.approx(spearmanr(truth, noisy.mean(axis=1)).statistic)
    assert found.low < found.value < found.high
    # without noise every draw of windows has the same order
    exact = rank_estimate(truth, np.repeat(truth[:, None], 24, axis=1))
    assert (exact.value, exact.low, exact.high) == pytest.approx((1, 1, 1))
    # more windows, surer
    more = rank_estimate(truth, truth[:, None] + rng.normal(0, 2, (30, 2400)))
    assert more.high - more.low < found.high - found.low


def test_the_mean_of_layers() -> None:
    up, down = np.array([1.0, 2.0, 3.0]), np.array([3.0, 2.0, 1.0])
    by_window = np.repeat(up[:, None], 4, axis=1)
    assert mean_rank_estimate([(up, by_window), (down, by_window)]).value == pytest.approx(0)
    assert mean_rank_estimate([(up, by_window), (np.ones(3), by_window)]).value == pytest.approx(1)
    assert np.isnan(mean_rank_estimate([(np.ones(3), by_window)]).value)


def test_a_ratio_is_drawn_with_its_windows_together() -> None:
    """Where one series is a multiple of the other there is no doubt, however much the windows differ."""
    base = np.random.default_rng(0).lognormal(0, 2, 30)
    same = ratio_estimate(0.5 * base, base)
    assert (same.value, same.low, same.high) == (pytest.approx(0.5), pytest.approx(0.5), pytest.approx(0.5))
    other = ratio_estimate(base[::-1].copy(), base)
    assert other.low < other.value < other.high
    assert other.value == pytest.approx(1)
