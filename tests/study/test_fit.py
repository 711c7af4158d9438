"""Factors that are known, and predictions of what was left out."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import spearmanr

from mopeq_edge.study.fit import layer_factors, left_out

RNG = np.random.default_rng(0)
DAMAGE = RNG.uniform(1, 2, (40, 3))


def test_known_factors_are_found() -> None:
    measured = 5 + DAMAGE @ [2.0, 0.5, 1.0]
    np.testing.assert_allclose(layer_factors(DAMAGE, measured), [2.0, 0.5, 1.0], atol=0.03)


def test_a_map_that_was_left_out_is_predicted_better_than_by_the_plain_sum() -> None:
    measured = DAMAGE @ [3.0, 0.2, 1.0] + RNG.normal(0, 0.05, 40)
    plain, fitted = (
        spearmanr(values, measured).statistic for values in (DAMAGE.sum(axis=1), left_out(DAMAGE, measured))
    )
    assert fitted > 0.98 > plain


def test_its_own_measurement_does_not_help() -> None:
    """What is noise stays unpredicted: an answer that leaks would correlate with itself."""
    rhos = [spearmanr(left_out(DAMAGE, noise), noise).statistic for noise in RNG.normal(0, 1, (20, 40))]
    assert np.mean(rhos) < 0.1


def test_a_layer_that_seems_to_help_counts_nothing() -> None:
    factors = layer_factors(DAMAGE, DAMAGE @ [1.0, -1.0, 1.0])
    assert factors[1] == 0
    assert factors[0] > 0.5


def test_maps_that_do_not_differ_tell_nothing() -> None:
    same = np.ones((5, 2))
    assert layer_factors(same, np.arange(5.0)).tolist() == [0, 0]
    assert left_out(same, np.arange(5.0))[0] == pytest.approx(2.5)
