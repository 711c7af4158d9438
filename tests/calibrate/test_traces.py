"""The trace artifact: the prior by hand, and what is read back."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mopeq_edge.calibrate.traces import Traces, read_traces, with_prior, write_traces
from mopeq_edge.errors import FormatError

UP, DOWN = "blk.0.ffn_up_exps.weight", "blk.3.ffn_down_exps.weight"


def test_the_prior_by_hand() -> None:
    estimates = {UP: np.array([6.0, -1.0, 0.0, 4.0]), DOWN: np.array([-2.0, 0.0])}
    errors = {UP: np.ones(4), DOWN: np.array([0.5, 0.1])}
    counts = {0: np.array([3.0, 4.0, 0.0, 2.0]), 3: np.array([1.0, 0.0])}
    filled, clamped = with_prior(estimates, errors, counts)
    # 10 over 3 + 4 + 1 + 2 tokens is one a token: four for the second expert, one for the third
    assert filled[UP].tolist() == [6.0, 4.0, 1.0, 4.0]
    # nothing positive to learn from: as large as the noise
    assert filled[DOWN].tolist() == [0.3, 0.3]
    assert clamped == (f"{UP}[1]", f"{UP}[2]", f"{DOWN}[0]", f"{DOWN}[1]")
    same, none = with_prior({UP: np.array([1.0, 2.0])}, {UP: np.ones(2)}, {0: np.array([5.0, 6.0])})
    assert (same[UP].tolist(), none) == ([1.0, 2.0], ())


def make() -> Traces:
    values = {UP: np.array([1.0, 2.5]), DOWN: np.array([0.5, 4.0])}
    errors = {UP: np.array([0.1, 0.2]), DOWN: np.array([0.3, 0.4])}
    return Traces(values, errors, 8, 4096, 2.75, (f"{UP}[1]",), "source", "made")


def test_read_back_and_the_same_bytes_again(tmp_path: Path) -> None:
    write_traces(make(), tmp_path / "a")
    write_traces(make(), tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    back = read_traces(tmp_path / "a")
    for ours, theirs in ((back.mean_diagonal, make().mean_diagonal), (back.standard_error, make().standard_error)):
        assert ours.keys() == theirs.keys()
        for name, values in theirs.items():
            np.testing.assert_array_equal(ours[name], values)
    plain = ("n_probes", "n_tokens", "loss", "clamped", "source_sha256", "made_from")
    assert [getattr(back, name) for name in plain] == [getattr(make(), name) for name in plain]


def test_the_stated_error_is_the_median_of_what_was_estimated() -> None:
    # 0.1, 0.6 and 0.1; the clamped one does not count
    assert make().relative_error == pytest.approx(0.1)
    assert make().sentence() == "8 probes on 4,096 tokens, median relative standard error 10 %, 1 not positive"
    assert make().summary()["clamped"] == [f"{UP}[1]"]


def test_another_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "t").write_bytes(b"x" * 64)
    with pytest.raises(FormatError, match=r"cannot be read as trace .* calibrate with --trace again"):
        read_traces(tmp_path / "t")
