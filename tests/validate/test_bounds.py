"""The bounds hold for what libggml makes of weights, and for nothing that is not in its place."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import pytest

from mopeq_edge.ggml.library import load_ggml
from mopeq_edge.ggml.types import BF16, BY_NAME, F32, QUANTIZABLE
from mopeq_edge.validate.bounds import HEADROOM, MEASURED, Bound, bound_of
from mopeq_edge.validate.weights import errors

Floats = npt.NDArray[np.float32]
ROWS, N = 24, 1024


def weights(seed: int) -> Iterator[Floats]:
    rng = np.random.default_rng(seed)
    normal = rng.standard_normal((ROWS, N))
    for values in (
        normal,
        rng.laplace(size=(ROWS, N)),
        rng.standard_t(4, (ROWS, N)),
        rng.standard_t(2.5, (ROWS, N)),
        normal * np.exp(rng.standard_normal((1, N))),
    ):
        yield (0.05 * values).astype(np.float32)


@pytest.mark.runtime
@pytest.mark.parametrize("name", QUANTIZABLE)
def test_what_a_type_loses(name: str) -> None:
    kind, ggml = BY_NAME[name], load_ggml()
    bound = bound_of(kind, F32)
    assert bound is not None
    skewed = np.exp(1.5 * np.random.default_rng(5).standard_normal(N)).astype(np.float32)
    found = []
    for values in weights(seed=1):
        for imatrix in (np.ones(N, np.float32), skewed):
            ours = ggml.dequantize(kind, ggml.quantize(kind, values, imatrix), N).reshape(values.shape)
            error, worst, _ = errors(ours, values, bound)
            assert error <= bound.matrix
            assert worst <= bound.row
            found.append(error)
    # what was measured with other numbers is no more than a tenth from what is measured here
    assert 0.75 * MEASURED[name] < max(found) < 1.1 * MEASURED[name]


@pytest.mark.parametrize("name", MEASURED)
def test_other_weights_and_zeros_are_beyond_every_bound(name: str) -> None:
    bound = bound_of(BY_NAME[name], F32)
    assert bound is not None
    assert bound.matrix == min(0.95, HEADROOM * MEASURED[name])
    one, other = np.random.default_rng(2).standard_normal((2, 16, 64)).astype(np.float32)
    for wrong in (other, np.zeros_like(one), one[::-1], -one):
        error, worst, _ = errors(wrong, one, bound)
        assert error > bound.matrix
        assert worst > bound.row


def test_what_is_kept_is_exact() -> None:
    q4 = BY_NAME["Q4_K"]
    assert bound_of(F32, BF16) == Bound(0, 0, 0)
    assert bound_of(q4, F32) != bound_of(q4, q4)
    assert bound_of(BY_NAME["I32"], F32) is None
    values = np.ones((2, 32), np.float32)
    more = values.copy()
    more[1, 3] = np.nextafter(np.float32(1), np.float32(2))
    exact = Bound(0, 0, 0)
    assert errors(values, values, exact) == (0, 0, 0)
    error, worst, row = errors(more, values, exact)
    assert error > 0
    assert (worst > 0, row) == (True, 1)


def test_errors_by_hand() -> None:
    ours = np.array([[3, 4], [0, 0], [1, 1]], np.float32)
    theirs = np.array([[3, 0], [0, 0], [1, 1]], np.float32)
    error, worst, row = errors(ours, theirs, Bound(1, 1, 0))
    # 16 over 9 + 2 in all; of the first row 16 over 9
    assert error == pytest.approx(np.sqrt(16 / 11))
    assert (worst, row) == (pytest.approx(4 / 3), 0)
    # NaN fits nothing
    assert errors(np.full((1, 2), np.nan, np.float32), theirs[:1], Bound(1, 1, 0))[0] == np.inf
    # weights where there should be none
    assert errors(ours[:1], np.zeros((1, 2), np.float32), Bound(1, 1, 0))[0] == np.inf
    # of almost nothing F16 scales leave nothing
    assert errors(np.zeros((1, 2), np.float32), np.full((1, 2), 1e-8, np.float32), Bound(1, 1, 1e-6)) == (0, 0, 0)
