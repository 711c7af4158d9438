"""Divergence against scipy in float64 and against values computed by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.special import log_softmax, rel_entr, softmax
from scipy.stats import sem

from mopeq_edge.evaluate import divergence
from mopeq_edge.evaluate.divergence import PositionScores, compare, summarise

INF = float("inf")


def random_logits(seed: int, n: int, n_vocab: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 4, (n, n_vocab)).astype(np.float32)


def test_two_tokens_by_hand() -> None:
    base = np.log(np.array([[0.5, 0.5], [0.9, 0.1]], np.float32))
    target = np.log(np.array([[0.25, 0.75], [0.2, 0.8]], np.float32))
    scores = compare(base, target, np.array([1, 0], np.int32))
    expected = [0.5 * math.log(2) + 0.5 * math.log(2 / 3), 0.9 * math.log(4.5) + 0.1 * math.log(1 / 8)]
    np.testing.assert_allclose(scores.kld, expected, rtol=1e-6)
    np.testing.assert_allclose(scores.nll_base, [-math.log(0.5), -math.log(0.9)], rtol=1e-6)
    np.testing.assert_allclose(scores.nll_target, [-math.log(0.75), -math.log(0.2)], rtol=1e-6)
    assert scores.same_top.tolist() == [False, False]


@pytest.mark.parametrize("block", [1, 700, 1 << 21])
def test_random_logits_against_scipy(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(divergence, "_BLOCK", block)
    base, target = random_logits(1, 17, 301), random_logits(2, 17, 301)
    tokens = np.arange(17, dtype=np.int32) * 9
    scores = compare(base, target, tokens)
    p, q = softmax(base.astype(np.float64), axis=1), softmax(target.astype(np.float64), axis=1)
    np.testing.assert_allclose(scores.kld, rel_entr(p, q).sum(axis=1), rtol=1e-12)
    rows = np.arange(17)
    for got, logits in ((scores.nll_base, base), (scores.nll_target, target)):
        np.testing.assert_allclose(got, -log_softmax(logits.astype(np.float64), axis=1)[rows, tokens], rtol=1e-12)
    assert scores.same_top.tolist() == (p.argmax(axis=1) == q.argmax(axis=1)).tolist()


def test_kld_is_of_the_base_against_the_target_not_the_other_way() -> None:
    base, target = random_logits(3, 4, 50), random_logits(4, 4, 50)
    tokens = np.zeros(4, np.int32)
    there, back = compare(base, target, tokens), compare(target, base, tokens)
    assert (np.abs(there.kld - back.kld) > 1e-3).all()
    np.testing.assert_array_equal(there.nll_base, back.nll_target)


def test_a_model_against_itself_is_exactly_zero() -> None:
    logits = random_logits(5, 9, 1000)
    scores = compare(logits, logits.copy(), np.zeros(9, np.int32))
    assert (scores.kld == 0).all()
    assert scores.same_top.all()
    summary = summarise([scores])
    assert (summary.kld_mean, summary.kld_max, summary.ln_ppl_ratio, summary.same_top) == (0, 0, 0, 1)


def test_large_logits_do_not_overflow() -> None:
    base = np.array([[1e4, 0, -1e4]], np.float32)
    scores = compare(base, base - np.float32(500), np.array([0], np.int32))
    assert (scores.kld[0], scores.nll_base[0]) == (0, 0)


def test_of_equal_logits_the_first_is_the_top() -> None:
    base = np.array([[1, 3, 3]], np.float32)
    tokens = np.zeros(1, np.int32)
    assert compare(base, np.array([[0, 5, 4]], np.float32), tokens).same_top[0]
    assert not compare(base, np.array([[0, 4, 5]], np.float32), tokens).same_top[0]


def test_tokens_that_are_ruled_out() -> None:
    tokens = np.zeros(1, np.int32)
    half = np.array([[0, 0, -INF]], np.float32)
    third = np.array([[0, 0, 0]], np.float32)
    assert compare(half, third, tokens).kld[0] == pytest.approx(math.log(1.5), rel=1e-12)
    assert compare(third, half, tokens).kld[0] == INF
    assert compare(half, half, tokens).kld[0] == 0


@pytest.mark.parametrize("bad", [float("nan"), INF])
def test_logits_that_are_no_numbers_give_nan_and_touch_no_other_row(bad: float) -> None:
    base, target = random_logits(6, 3, 20), random_logits(7, 3, 20)
    target[1, 4] = bad
    kld = compare(base, target, np.zeros(3, np.int32)).kld
    assert np.isnan(kld).tolist() == [False, True, False]


def test_shapes_must_fit() -> None:
    with pytest.raises(ValueError, match="do not belong together"):
        compare(np.zeros((2, 3), np.float32), np.zeros((2, 4), np.float32), np.zeros(2, np.int32))
    with pytest.raises(ValueError, match="do not belong together"):
        compare(np.zeros((2, 3), np.float32), np.zeros((2, 3), np.float32), np.zeros(3, np.int32))


finite = hnp.arrays(np.float32, (3, 12), elements=st.floats(-30, 30, width=32))


@settings(max_examples=60, deadline=None)
@given(finite, finite, st.floats(-50, 50, width=32))
def test_never_negative_and_blind_to_a_constant(base: np.ndarray, target: np.ndarray, shift: float) -> None:
    tokens = np.array([0, 5, 11], np.int32)
    scores = compare(base, target, tokens)
    assert (scores.kld >= 0).all()
    shifted = compare(base, (target.astype(np.float64) + shift).astype(np.float32), tokens)
    np.testing.assert_allclose(shifted.kld, scores.kld, rtol=1e-4, atol=1e-4)


def scores_of(kld: list[float], nll_base: list[float], nll_target: list[float], same: list[bool]) -> PositionScores:
    return PositionScores(np.array(kld), np.array(nll_base), np.array(nll_target), np.array(same))


def test_summary_by_hand() -> None:
    first = scores_of([0.1, 0.4], [1.0, 2.0], [1.5, 2.5], [True, False])
    second = scores_of([0.2, 0.3], [3.0, 2.0], [3.0, 2.0], [True, True])
    got = summarise([first, second])
    assert got.n_positions == 4
    assert got.kld_mean == pytest.approx(0.25)
    assert got.kld_median == pytest.approx(0.25)
    assert got.kld_max == pytest.approx(0.4)
    assert got.kld_p99 == pytest.approx(0.3 + 0.1 * 0.97)
    assert got.kld_p99_9 == pytest.approx(0.3 + 0.1 * 0.997)
    assert got.same_top == pytest.approx(0.75)
    assert got.ppl_base == pytest.approx(math.exp(2.0))
    assert got.ppl_target == pytest.approx(math.exp(2.25))
    assert got.ln_ppl_ratio == pytest.approx(0.25)
    assert got.ln_ppl_ratio_se == pytest.approx(sem([0.5, 0.5, 0, 0]))
    assert got.kld_mean_se == pytest.approx(sem([0.1, 0.4, 0.2, 0.3]))
    assert got.ppl_target_se == pytest.approx(math.exp(2.25) * sem([1.5, 2.5, 3.0, 2.0]))


def test_standard_errors_are_those_of_llama_perplexity() -> None:
    values = np.random.default_rng(8).gamma(1, 0.1, 500)
    got = summarise([PositionScores(values, values, 2 * values, values > 0.1)])
    n, top = len(values), (values > 0.1).mean()
    expected = math.sqrt(((values**2).mean() - values.mean() ** 2) / (n - 1))
    assert got.kld_mean_se == pytest.approx(expected)
    assert got.same_top_se == pytest.approx(math.sqrt(top * (1 - top) / (n - 1)))


def test_a_single_position_has_no_error() -> None:
    got = summarise([scores_of([0.5], [1.0], [2.0], [True])])
    assert (got.kld_mean, got.kld_mean_se, got.kld_p99_9) == (0.5, 0, 0.5)
