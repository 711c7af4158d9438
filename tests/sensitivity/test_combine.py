"""``fisher-trace`` by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mopeq_edge.sensitivity.combine import with_fisher_trace
from mopeq_edge.sensitivity.measure import TensorErrors
from mopeq_edge.sensitivity.table import SensitivityTable, read_table, write_table

UP, QUERY = "blk.0.ffn_up_exps.weight", "blk.0.attn_q.weight"


def errors(fisher: object, trace: object) -> TensorErrors:
    """In Q2_K, Q3_K and the own type; the variance is a hundredth of the damage's square."""
    damage = {name: np.array(values, dtype=float) for name, values in (("fisher", fisher), ("trace", trace))}
    variance = {name: (values / 10) ** 2 for name, values in damage.items()}
    return TensorErrors(("Q2_K", "Q3_K", "BF16"), damage, variance, np.ones(damage["fisher"].shape[1]))


# experts of 4 and 2 in Q3_K by fisher, 1 and 2 by trace: the trace counts twice
EXPERTS = errors([[8, 4], [4, 2], [0, 0]], [[3, 5], [1, 2], [0, 0]])
OTHER = errors([[7], [5], [0]], [[7], [5], [0]])


def test_the_mean_with_the_trace_scaled_to_the_experts_fisher() -> None:
    found = with_fisher_trace({UP: EXPERTS, QUERY: OTHER})
    np.testing.assert_allclose(found[UP].damage["fisher-trace"], [[7, 7], [3, 3], [0, 0]])
    np.testing.assert_allclose(found[QUERY].damage["fisher-trace"], [[7], [5], [0]])
    # deviations of a tenth each, added
    np.testing.assert_allclose(found[UP].variance["fisher-trace"], (found[UP].damage["fisher-trace"] / 10) ** 2)
    np.testing.assert_array_equal(found[UP].damage["trace"], EXPERTS.damage["trace"])


def test_without_traces_there_is_none() -> None:
    damage, variance = ({"fisher": values["fisher"]} for values in (EXPERTS.damage, EXPERTS.variance))
    only = TensorErrors(EXPERTS.types, damage, variance, np.ones(2))
    assert set(with_fisher_trace({UP: only})[UP].damage) == {"fisher"}


def test_it_follows_from_what_is_stored(tmp_path: Path) -> None:
    both = {UP: EXPERTS, QUERY: OTHER}
    stored = SensitivityTable(both, {0: np.ones(2)}, ("fisher", "trace"), "gradient", (), None, "x")
    write_table(stored, tmp_path / "a.safetensors")
    found = read_table(tmp_path / "a.safetensors")
    assert found.scores == ("fisher", "trace", "fisher-trace")
    np.testing.assert_allclose(found.require(UP, "fisher-trace").damage["fisher-trace"][0], [7, 7])
    assert found.relative_error("fisher-trace") == pytest.approx(0.1)


def test_the_middle_type() -> None:
    assert EXPERTS.middle_type() == 1
    assert TensorErrors(("BF16",), {}, {}, np.ones(1)).middle_type() is None
