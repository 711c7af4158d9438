"""The sensitivity artifact: what goes in comes out, the same bytes every time, other versions are refused."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save

from mopeq_edge.errors import FormatError
from mopeq_edge.sensitivity.measure import TensorErrors
from mopeq_edge.sensitivity.table import SensitivityTable, read_table, write_table


def make() -> SensitivityTable:
    rng = np.random.default_rng(0)

    def errors(types: tuple[str, ...], n_matrices: int) -> TensorErrors:
        shape = (len(types), n_matrices)
        damage = {score: rng.random(shape) for score in ("imatrix", "mopeq")}
        variance = {score: rng.random(shape) for score in ("imatrix", "mopeq")}
        return TensorErrors(types, damage, variance, rng.random(n_matrices))

    return SensitivityTable(
        errors={
            "blk.0.ffn_up_exps.weight": errors(("Q2_K", "Q4_K", "BF16"), 4),
            "blk.10.ffn_up_exps.weight": errors(("Q2_K", "BF16"), 4),
            "output.weight": errors(("Q8_0", "F16"), 1),
        },
        mopeq={10: rng.random(4), 0: rng.random(4)},
        scores=("imatrix", "mopeq"),
        quantized_with="activation",
        unrouted=("blk.0.ffn_up_exps.weight[3]",),
        sample_rows=64,
        made_from="ab" * 32,
    )


def test_what_goes_in_comes_out(tmp_path: Path) -> None:
    table = make()
    write_table(table, tmp_path / "t")
    back = read_table(tmp_path / "t")
    simple = ("scores", "quantized_with", "unrouted", "sample_rows", "made_from")
    assert [getattr(back, name) for name in simple] == [getattr(table, name) for name in simple]
    assert back.mopeq.keys() == table.mopeq.keys()
    for layer, scores in table.mopeq.items():
        np.testing.assert_array_equal(back.mopeq[layer], scores)
    assert back.errors.keys() == table.errors.keys()
    for name, errors in table.errors.items():
        assert back.errors[name].types == errors.types
        np.testing.assert_array_equal(back.errors[name].norms, errors.norms)
        for score in table.scores:
            np.testing.assert_array_equal(back.errors[name].damage[score], errors.damage[score])
            np.testing.assert_array_equal(back.errors[name].variance[score], errors.variance[score])
    whole = dataclasses.replace(table, sample_rows=None, unrouted=())
    write_table(whole, tmp_path / "t")
    assert (read_table(tmp_path / "t").sample_rows, read_table(tmp_path / "t").unrouted) == (None, ())


def test_the_order_of_insertion_changes_no_byte(tmp_path: Path) -> None:
    table = make()
    backwards = dataclasses.replace(
        table, errors=dict(reversed(table.errors.items())), mopeq=dict(reversed(table.mopeq.items()))
    )
    for name, one in (("a", table), ("b", make()), ("c", backwards)):
        write_table(one, tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes() == (tmp_path / "c").read_bytes()


@pytest.mark.parametrize(
    ("metadata", "found"),
    [
        ({"format": "mopeq-edge sensitivity", "version": "2"}, "'mopeq-edge sensitivity' version '2'"),
        ({"format": "mopeq-edge routing", "version": "1"}, "'mopeq-edge routing' version '1'"),
        (None, "None version None"),
    ],
)
def test_another_format_or_version_is_refused(tmp_path: Path, metadata: dict[str, str] | None, found: str) -> None:
    path = tmp_path / "t"
    path.write_bytes(save({"x": np.zeros(1)}, metadata=metadata))
    expected = f"{path}: expected 'mopeq-edge sensitivity' version 1, found {found}; run sensitivity again"
    with pytest.raises(FormatError, match=f"^{re.escape(expected)}$"):
        read_table(path)


@pytest.mark.parametrize("content", [b"", b"\xff" * 64, None])
def test_what_is_no_table_is_named(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "t"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(FormatError, match=r"cannot be read as sensitivity .* run sensitivity again"):
        read_table(path)


def test_relative_error_is_the_worst_type_of_the_worst_tensor() -> None:
    def one(damage: list[list[float]], variance: list[list[float]]) -> TensorErrors:
        return TensorErrors(("Q2_K", "BF16"), {"x": np.array(damage)}, {"x": np.array(variance)}, np.ones(2))

    table = dataclasses.replace(
        make(),
        # experts add up: sqrt(9 + 16) of 10 + 40; the own type has no damage and no error
        errors={
            "a": one([[10, 40], [0, 0]], [[9, 16], [0, 0]]),
            "b": one([[99, 1], [0, 0]], [[1, 0], [0, 0]]),
        },
        scores=("x",),
    )
    assert table.relative_error("x") == 5 / 50
