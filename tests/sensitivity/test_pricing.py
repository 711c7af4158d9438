"""Prices by hand on statistics of a few numbers, and what is said when statistics are missing."""

from __future__ import annotations

import numpy as np
import pytest

from mopeq_edge.calibrate.statistics import Routing
from mopeq_edge.calibrate.traces import Traces
from mopeq_edge.errors import CalibrationError
from mopeq_edge.ggml.types import BF16
from mopeq_edge.imatrix import GRADIENT, LOOKUP, Entry, Imatrix
from mopeq_edge.sensitivity.pricing import Statistics, pricings, require_scores
from mopeq_edge.sensitivity.scores import DERIVED, Pricing
from mopeq_edge.source.model import SourceTensor

# two windows of five tokens, two experts of which the second was never used, a vocabulary of three
UP = SourceTensor("blk.0.ffn_up_exps.weight", (2, 4, 2), BF16)
OUTPUT = SourceTensor("output.weight", (2, 3), BF16)
EMBEDDING = SourceTensor("token_embd.weight", (2, 3), BF16)
QUERY = SourceTensor("blk.0.attn_q.weight", (2, 2), BF16)


def f32(*values: object) -> np.ndarray:
    return np.array(values, dtype=np.float32)


ACTIVATION = Imatrix(
    {UP.name: Entry(f32([6, 8], [1, 2]), f32(7, 1)), QUERY.name: Entry(f32([30, 50]), f32(10))}, ("x",), 2, 5
)
GRADIENTS = Imatrix(
    {
        UP.name: Entry(f32([3, 4], [1, 2]), f32(7, 1)),
        QUERY.name: Entry(f32([5, 6]), f32(10)),
        OUTPUT.name: Entry(f32([7, 9]), f32(10)),
        EMBEDDING.name: Entry(f32([11, 13]), f32(10)),
    },
    *(("x",), 2, 5, GRADIENT, 0.5),
)
ROUTING = Routing(10, {0: np.array([7.0, 0.0])}, {}, np.array([5.0, 2.0, 0.0]))
TRACES = Traces({UP.name: np.array([0.6, 0.2])}, {UP.name: np.ones(2)}, 2, 10, 1.0, (), "", "")
ALL = Statistics(ACTIVATION, GRADIENTS, ROUTING, TRACES)


def weights(pricing: Pricing, tensor: SourceTensor) -> list[list[float]]:
    """What one unit of squared error costs at every place, rows = outputs."""
    found = pricing.factor * np.ones((tensor.n_out, tensor.n_in))
    if pricing.columns is not None:
        found = found * pricing.columns
    if pricing.rows is not None:
        found = found * pricing.rows[:, None]
    if pricing.also is not None:
        found = found + np.array(weights(pricing.also, tensor))
    return found.tolist()


def prices(tensor: SourceTensor, score: str, statistics: Statistics = ALL) -> list[list[list[float]]]:
    made = pricings(tensor, statistics, [0.25, 0.75][: tensor.n_matrices])[score]
    assert len(made) == tensor.n_matrices
    return [weights(pricing, tensor) for pricing in made]


def close(found: list[list[list[float]]], expected: object) -> None:
    np.testing.assert_allclose(np.array(found), np.broadcast_to(np.array(expected), np.shape(found)), rtol=1e-12)


def test_experts() -> None:
    every = ["weight-mse", "mopeq", "frequency", "hybrid", "imatrix", "fisher", "trace"]
    assert list(pricings(UP, ALL, [1.0, 1.0])) == every
    close(prices(UP, "weight-mse"), 1.0)
    close(prices(UP, "mopeq"), [[[0.25]], [[0.75]]])
    # 7 of 10 tokens; the unused expert counts as if it had one
    close(prices(UP, "frequency"), [[[0.7]], [[0.1]]])
    # 0.7 and 0.1 over their mean 0.4, times S of 0.25 and 0.75 over their mean 0.5
    close(prices(UP, "hybrid"), [[[1.75 * 0.5]], [[0.25 * 1.5]]])
    close(prices(UP, "imatrix"), [[[0.6, 0.8]], [[0.1, 0.2]]])
    # half of sum/10 tokens, spread over 4 outputs, times the scale that the file was divided by
    close(prices(UP, "fisher"), np.array([[[3, 4]], [[1, 2]]]) * 0.5 / (2 * 10 * 4))
    close(prices(UP, "trace"), [[[0.3]], [[0.1]]])


def test_a_matrix_that_every_token_passes() -> None:
    close(prices(QUERY, "frequency"), 1.0)
    close(prices(QUERY, "hybrid"), 1.0)
    close(prices(QUERY, "imatrix"), [[[3, 5]]])
    close(prices(QUERY, "fisher"), np.array([[[5, 6]]]) * 0.5 / (2 * 10 * 2))


def test_a_stack_of_a_matrix_a_head() -> None:
    """No experts: every token passes all of them, and they are not ranked against each other."""
    keys = SourceTensor("blk.0.attn_k_b.weight", (2, 4, 2), BF16)
    entries = {keys.name: Entry(f32([3, 4], [1, 2]), f32(10, 10))}
    heads = Statistics(Imatrix(entries, ("x",), 2, 5), Imatrix(entries, ("x",), 2, 5, GRADIENT, 0.5), ROUTING)
    close(prices(keys, "mopeq", heads), [[[0.25]], [[0.75]]])
    close(prices(keys, "frequency", heads), 1.0)
    close(prices(keys, "hybrid", heads), 1.0)
    close(prices(keys, "imatrix", heads), [[[0.3, 0.4]], [[0.1, 0.2]]])
    close(prices(keys, "fisher", heads), np.array([[[3, 4]], [[1, 2]]]) * 0.5 / (2 * 10 * 4))


def test_the_embedding_is_weighed_by_how_often_a_token_occurs() -> None:
    occurs = np.array([[6], [3], [1]]) / 10
    close(prices(EMBEDDING, "weight-mse"), 1.0)
    close(prices(EMBEDDING, "frequency"), [occurs])
    close(prices(EMBEDDING, "hybrid"), [occurs])
    close(prices(EMBEDDING, "imatrix"), [occurs])
    # one row is one token's output, so nothing is spread over rows
    close(prices(EMBEDDING, "fisher"), [occurs * np.array([[11, 13]]) * 0.5 / (2 * 10)])


def test_a_matrix_without_an_entry_costs_its_plain_error_once_a_token() -> None:
    close(prices(OUTPUT, "imatrix"), 1.0)
    close(prices(OUTPUT, "fisher"), np.array([[[7, 9]]]) * 0.5 / (2 * 10 * 3))


def test_only_what_the_statistics_allow() -> None:
    weights_only, foreign = Statistics(), Statistics(ACTIVATION, None, ROUTING)
    assert weights_only.available() == ("weight-mse", "mopeq") == tuple(pricings(UP, weights_only, [1.0, 1.0]))
    assert set(foreign.available()) == {"weight-mse", "mopeq", "frequency", "hybrid", "imatrix"}
    assert set(pricings(UP, foreign, [1.0, 1.0])) == set(foreign.available())
    assert set(ALL.available()) == {*pricings(UP, ALL, [1.0, 1.0]), *DERIVED}
    # traces of experts alone price no other matrix
    untraced = Statistics(ACTIVATION, GRADIENTS, ROUTING)
    without_gradients = Statistics(ACTIVATION, None, ROUTING, TRACES)
    for statistics in (untraced, without_gradients):
        assert "trace" not in statistics.available()
        assert set(statistics.available()) == set(pricings(UP, statistics, [1.0, 1.0]))
    for tensor in (QUERY, OUTPUT, EMBEDDING):
        close(prices(tensor, "trace"), prices(tensor, "fisher"))
    close(prices(UP, "imatrix", foreign), prices(UP, "imatrix"))


def test_a_score_without_its_statistics_says_what_to_do() -> None:
    require_scores(["fisher", "imatrix", "mopeq"], ALL)
    require_scores(["weight-mse", "mopeq"], Statistics())
    with pytest.raises(CalibrationError) as caught:
        require_scores(["imatrix", "fisher"], Statistics(ACTIVATION, None, ROUTING))
    for part in ("sensitivity 'fisher' needs gradients", "the Hugging Face directory with --fisher", "GGUF source"):
        assert part in str(caught.value)
    with pytest.raises(CalibrationError, match="'trace' needs gradients"):
        require_scores(["trace"], Statistics(ACTIVATION, None, ROUTING, TRACES))
    with pytest.raises(
        CalibrationError, match="'trace' needs Hessian traces, and none were measured: run calibrate --trace"
    ):
        require_scores(["trace"], Statistics(ACTIVATION, GRADIENTS, ROUTING))
    for score in ("imatrix", "frequency", "hybrid"):
        with pytest.raises(CalibrationError, match=f"'{score}' needs an imatrix: run calibrate, or give --imatrix"):
            require_scores([score], Statistics())


def test_an_embedding_that_is_the_output_matrix_is_priced_for_both() -> None:
    activation = Imatrix({**ACTIVATION.entries, EMBEDDING.name: Entry(f32([4, 6]), f32(10))}, ("x",), 2, 5)
    entries = {EMBEDDING.name: Entry(f32([7, 9]), f32(10)), LOOKUP: Entry(f32([11, 13]), f32(10))}
    tied = Statistics(activation, Imatrix(entries, ("x",), 2, 5, GRADIENT, 0.5), ROUTING)
    # every token multiplies all rows
    np.testing.assert_allclose(prices(EMBEDDING, "imatrix", tied)[0], [[0.4, 0.6]] * 3)
    np.testing.assert_allclose(prices(EMBEDDING, "frequency", tied)[0], [[1.0, 1.0]] * 3)
    # 0.5 / (2 * 10) of the output's sums over 3 rows, and of a look-up's by the token's share
    output = 0.025 / 3 * np.array([[7, 9]])
    lookup = 0.025 * np.array([[0.6], [0.3], [0.1]]) * [[11, 13]]
    np.testing.assert_allclose(prices(EMBEDDING, "fisher", tied)[0], output + lookup)


def test_a_matrix_with_two_uses_costs_the_sum() -> None:
    squared = np.array([[1, 4], [9, 16]], dtype=np.float32)
    both = Pricing(2.0, columns=np.array([1.0, 3.0]), also=Pricing(10.0, rows=np.array([0.5, 2.0])))
    np.testing.assert_allclose(both.row_damage(squared, np.arange(2)), [2 * 13 + 5 * 5, 2 * 57 + 20 * 25])
