"""Chances of the next token, by hand."""

from __future__ import annotations

import numpy as np
import pytest

from mopeq_edge.vision.sample import Sampling, candidates, chooser

ROW = np.log(np.array([0.1, 0.4, 0.05, 0.3, 0.15], np.float32))


@pytest.mark.parametrize(
    ("sampling", "tokens", "chances"),
    [
        (Sampling(1.0, 0, 1.0), [1, 3, 4, 0, 2], [0.4, 0.3, 0.15, 0.1, 0.05]),
        (Sampling(1.0, 2, 1.0), [1, 3], [4 / 7, 3 / 7]),
        (Sampling(1.0, 0, 0.6), [1, 3], [4 / 7, 3 / 7]),
        (Sampling(1.0, 0, 0.8), [1, 3, 4], [0.4 / 0.85, 0.3 / 0.85, 0.15 / 0.85]),
        # twice as cold: chances squared
        (Sampling(0.5, 2, 1.0), [1, 3], [16 / 25, 9 / 25]),
    ],
)
def test_candidates(sampling: Sampling, tokens: list[int], chances: list[float]) -> None:
    found, weights = candidates(ROW, sampling)
    assert found.tolist() == tokens
    np.testing.assert_allclose(weights, chances, rtol=1e-5)


def test_draws_follow_the_chances_and_the_seed() -> None:
    choose = chooser(Sampling(1.0, 0, 1.0, seed=3))
    drawn = [choose(ROW) for _ in range(4000)]
    np.testing.assert_allclose(np.bincount(drawn, minlength=5) / 4000, np.exp(ROW), atol=0.03)
    again = chooser(Sampling(1.0, 0, 1.0, seed=3))
    assert drawn[:50] == [again(ROW) for _ in range(50)]
    assert {chooser(Sampling())(ROW) for _ in range(9)} == {1}
