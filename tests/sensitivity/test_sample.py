"""The sample's estimate, its stated error and its sizes, against populations of which all is known."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from mopeq_edge.ggml.library import load_ggml
from mopeq_edge.ggml.types import BF16, BY_NAME, GgmlType
from mopeq_edge.sensitivity import sample
from mopeq_edge.sensitivity.measure import measure_tensor
from mopeq_edge.sensitivity.sample import (
    AUTO,
    Rows,
    dominated,
    drawn_rows,
    estimate,
    rows_needed,
    rows_to_measure,
    share_read,
)
from mopeq_edge.sensitivity.scores import Pricing
from mopeq_edge.source import model
from mopeq_edge.source.model import SourceTensor

N_OUT, N_IN, N_EXPERT = 512, 256, 24


class Uneven:
    """Experts whose rows differ in size as those of trained models do: by factors, with some far larger."""

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        shape = (N_EXPERT, N_OUT, N_IN)
        sizes = np.exp(0.5 * rng.standard_normal((N_EXPERT, N_OUT, 1)))
        self.values = (0.02 * sizes * rng.standard_t(5, shape)).astype(np.float32)

    def read(self, tensor: SourceTensor, matrix: int = 0, rows: slice | None = None) -> np.ndarray:
        return self.values[matrix, rows or slice(None)].copy()


class Counting:
    """The real quantizer, and the rows that it was given."""

    def __init__(self) -> None:
        self.rows: list[int] = []
        self.dequantize = load_ggml().dequantize

    def quantize(self, to: GgmlType, rows: np.ndarray, imatrix: np.ndarray | None = None) -> np.ndarray:
        self.rows.append(len(rows))
        return load_ggml().quantize(to, rows, imatrix)


STACK = SourceTensor("blk.0.ffn_up_exps.weight", (N_IN, N_OUT, N_EXPERT), BF16)


def prices() -> dict[str, list[Pricing]]:
    columns = np.random.default_rng(1).lognormal(0, 1.5, (N_EXPERT, N_IN))
    return {"plain": [Pricing(2.0)] * N_EXPERT, "columns": [Pricing(3.0, own) for own in columns]}


@pytest.mark.runtime
def test_what_is_stated_holds_against_all_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Quantized for real: 24 experts x 3 types x 2 scores, of which 95 % must lie within two standard errors."""
    monkeypatch.setattr(sample, "WHOLE", 0)
    types = [*(BY_NAME[name] for name in ("Q2_K", "Q3_K", "Q4_K")), BF16]
    found, quantized = [], []
    with ThreadPoolExecutor(2) as pool:
        for rows in (None, AUTO, sample.FIRST_ROWS):
            counting = Counting()
            found.append(measure_tensor(Uneven(), STACK, types, prices(), None, counting, pool, sample_rows=rows))  # type: ignore[arg-type]
            quantized.append(sum(counting.rows))
    whole, auto, _ = found
    assert quantized[0] == N_EXPERT * N_OUT * 3
    assert quantized[2] == N_EXPERT * sample.FIRST_ROWS * 3
    # rows were added where the first said too little
    assert 1.5 * quantized[2] < quantized[1] < 0.2 * quantized[0]
    for score in whole.damage:
        truth = whole.damage[score][:-1]
        stated = np.sqrt(auto.variance[score][:-1])
        off = np.abs(auto.damage[score][:-1] - truth) / stated
        assert (off < 2).mean() > 0.9
        assert off.max() < 5
        # the stack's total, what a stock plan chooses by, within three of its own standard errors
        total = np.sqrt(auto.variance[score][:-1].sum(axis=1))
        assert (np.abs(auto.damage[score][:-1].sum(axis=1) - truth.sum(axis=1)) < 3 * total).all()
    np.testing.assert_array_equal(auto.norms, whole.norms)


def test_the_ratio_estimate_by_hand() -> None:
    d, x = np.array([2.0, 5.0, 8.0]), np.array([1.0, 2.0, 5.0])
    damage, variance = estimate(d, x, total_x=20.0, n_out=6)
    assert damage == pytest.approx(20 * 15 / 8)
    residuals = d - 15 / 8 * x
    assert variance == pytest.approx(36 / 3 * (1 - 3 / 6) * (residuals**2).sum() / 2)
    assert estimate(d, x, 8.0, n_out=3) == (15.0, 0.0)
    # zeros, and weights whose squares are too large for float32: the mean of the rows seen
    assert estimate(d, np.zeros(3), 4.0, n_out=6)[0] == pytest.approx(30)
    assert estimate(d, x, np.inf, n_out=6)[0] == pytest.approx(30)


def test_the_ratio_estimate_is_right_on_the_average_and_better_than_the_mean() -> None:
    rng = np.random.default_rng(0)
    x = rng.lognormal(0, 1, 400)
    d = x * rng.lognormal(0, 0.2, 400)
    draws = [drawn_rows(400, 32, seed) for seed in range(2000)]
    found = np.array([estimate(d[rows], x[rows], x.sum(), 400) for rows in draws])
    spread = found[:, 0].std()
    assert found[:, 0].mean() == pytest.approx(d.sum(), rel=0.01)
    assert np.sqrt(found[:, 1].mean()) == pytest.approx(spread, rel=0.15)
    assert spread < 0.3 * np.array([400 * d[rows].mean() for rows in draws]).std()


def test_how_many_rows() -> None:
    expert = SourceTensor("blk.0.ffn_up_exps.weight", (2048, 1024, 64), BF16)
    matrix = SourceTensor("blk.0.attn_q.weight", (2048, 2048), BF16)
    small = SourceTensor("blk.0.attn_q.weight", (1024, 1024), BF16)
    assert rows_to_measure(expert, None) == Rows(1024, 1024)
    assert rows_to_measure(expert, 40) == Rows(40, 40)
    assert rows_to_measure(matrix, 40) == Rows(320, 320)
    assert rows_to_measure(matrix, 400) == Rows(2048, 2048)
    assert rows_to_measure(expert, AUTO) == Rows(16, 128, 0.05)
    assert rows_to_measure(matrix, AUTO) == Rows(128, 1024, 0.05)
    assert rows_to_measure(small, AUTO) == Rows(1024, 1024)
    # an error twice as large as wanted needs four times the rows, one below it none, and nobody gets more than the most
    needed = rows_needed(np.array([1.0, 1.0, 1.0, 0.0]), np.array([0.01, 0.0001, 1.0, 0.0]), 16, Rows(16, 128, 0.05))
    assert needed.tolist() == [64, 16, 128, 16]


def test_a_type_is_dropped_only_for_one_of_no_more_bits_that_is_clearly_better() -> None:
    bits = np.array([4.5, 4.25, 4.5, 2.6])
    damage, variance = np.array([2.0, 1.0, 1.05, 9.0]), np.array([0.01, 0.01, 0.01, 0.01])
    # the first loses to the second; the third is too near to it; the last has the fewest bits
    assert dominated(bits, damage, variance).tolist() == [True, False, False, False]


class Watched(Uneven):
    """Remembers which rows were read of which expert."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[int, set[int]] = {}

    def read(self, tensor: SourceTensor, matrix: int = 0, rows: slice | None = None) -> np.ndarray:
        self.seen.setdefault(matrix, set()).update(range(N_OUT)[rows or slice(None)])
        return super().read(tensor, matrix, rows)


@pytest.mark.runtime
def test_rows_only_reads_no_others_and_states_its_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same rows, and no more: a plain mean, whose error is larger and stated."""
    monkeypatch.setattr(model, "SMALL_MATRIX", 0)
    types = [*(BY_NAME[name] for name in ("Q2_K", "Q4_K")), BF16]
    n, source = 24, Watched()
    with ThreadPoolExecutor(2) as pool:
        given = (STACK, types, prices(), None, load_ggml(), pool)
        whole = measure_tensor(Uneven(), *given)  # type: ignore[arg-type]
        ratio = measure_tensor(Uneven(), *given, sample_rows=n)  # type: ignore[arg-type]
        found = measure_tensor(source, *given, sample_rows=n, rows_only=True)  # type: ignore[arg-type]
    assert source.seen == {e: set(drawn_rows(N_OUT, n, seed=N_OUT + e).tolist()) for e in range(N_EXPERT)}
    for score in whole.damage:
        truth, stated = whole.damage[score][:-1], np.sqrt(found.variance[score][:-1])
        off = np.abs(found.damage[score][:-1] - truth) / stated
        # a mean of 24 rows of which some are far larger
        assert (off < 2).mean() > 0.85
        total = np.sqrt((stated**2).sum(axis=1))
        assert (np.abs(found.damage[score][:-1].sum(axis=1) - truth.sum(axis=1)) < 3 * total).all()
        assert found.variance[score][:-1].sum() > 1.5 * ratio.variance[score][:-1].sum()
        by_hand = [_damage_by_hand(source.values[e], n, e, prices()[score][e]) for e in range(N_EXPERT)]
        np.testing.assert_allclose(found.damage[score][0], by_hand, rtol=1e-5)
    norms = [np.sqrt((source.values[e][sorted(source.seen[e])] ** 2).sum() * N_OUT / n) for e in range(N_EXPERT)]
    np.testing.assert_allclose(found.norms, norms, rtol=1e-5)
    np.testing.assert_allclose(found.norms, whole.norms, rtol=0.5)


def _damage_by_hand(w: np.ndarray, n: int, expert: int, pricing: Pricing) -> float:
    """Of Q2_K: the drawn rows' mean times the number of rows."""
    rows = w[drawn_rows(N_OUT, n, seed=N_OUT + expert)]
    kind, ggml = BY_NAME["Q2_K"], load_ggml()
    squared = (ggml.dequantize(kind, ggml.quantize(kind, rows), N_IN) - rows) ** 2
    columns = np.ones(N_IN) if pricing.columns is None else pricing.columns
    return float(pricing.factor * (squared @ columns).mean() * N_OUT)


def test_share_of_the_weights_that_are_read() -> None:
    expert, matrix = SourceTensor("a", (256, 1024, 64), BF16), SourceTensor("b", (256, 2048), BF16)
    small = SourceTensor("c", (256, 1024), BF16)
    assert share_read([expert, matrix], 4) == (256 * 64 * 4 + 256 * 32) / (256 * 1024 * 64 + 256 * 2048)
    assert share_read([small], AUTO) == 1
    assert rows_to_measure(expert, 4, only=True) == Rows(4, 4, only=True)
    assert not rows_to_measure(small, AUTO, only=True).only
