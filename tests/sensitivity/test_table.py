"""The sensitivity artifact: what goes in comes out, the same bytes every time, other versions are refused."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save

from mopeq_edge.array_file import read_arrays, write_arrays
from mopeq_edge.errors import FormatError, PlanError
from mopeq_edge.sensitivity.measure import TensorErrors
from mopeq_edge.sensitivity.table import FORMAT, VERSION, SensitivityTable, read_table, write_table


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
    asked: list[tuple[str, ...]] = []
    one = read_table(tmp_path / "t", lambda scores: (asked.append(tuple(scores)), "mopeq")[1])
    assert (asked, one.scores) == ([("imatrix", "mopeq")], ("mopeq",))
    for name, errors in table.errors.items():
        assert one.errors[name].damage.keys() == one.errors[name].variance.keys() == {"mopeq"}
        np.testing.assert_array_equal(one.errors[name].damage["mopeq"], errors.damage["mopeq"])
    with pytest.raises(PlanError, match="has no 'hybrid' damage"):
        read_table(tmp_path / "t", lambda _: "hybrid").require("output.weight", "hybrid")
    assert not back.rows_only
    write_table(dataclasses.replace(table, rows_only=True), tmp_path / "t")
    assert read_table(tmp_path / "t").rows_only
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


CHANGES: dict[str, tuple[Any, str]] = {
    "scores": (lambda info, arrays: info.update(scores="x"), "scores is 'x'"),
    "another score": (lambda info, arrays: info["scores"].append("x"), "damage/x/.* is missing"),
    "types": (lambda info, arrays: info.update(types=[]), r"types is \[\]"),
    "no types": (lambda info, arrays: info["types"].update({"output.weight": []}), "types is "),
    "unknown type": (lambda info, arrays: info["types"].update({"output.weight": ["Q9", "F16"]}), "has type 'Q9'"),
    "more types": (lambda info, arrays: info["types"]["output.weight"].append("F32"), "no damages of 3 types"),
    "no info": (lambda info, arrays: info.clear(), "is missing"),
    "rows": (lambda info, arrays: info.update(sample_rows=-1), "sample_rows is -1"),
    "no number": (lambda info, arrays: arrays["norms/output.weight"].fill(np.nan), "holds a number that is none"),
    "layer": (lambda info, arrays: arrays.update({"mopeq/x": np.ones(1)}), "invalid literal"),
    "vector": (lambda info, arrays: arrays.update({"mopeq/0": np.ones((1, 1))}), "is no vector"),
    "kind": (lambda info, arrays: arrays.update({"mopeq/0": np.ones(1, np.uint8)}), "is of type U8"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_another_form(tmp_path: Path, name: str) -> None:
    change, message = CHANGES[name]
    write_table(make(), tmp_path / "good")
    info, arrays = read_arrays(tmp_path / "good", FORMAT, VERSION, "again")
    change(info, arrays)
    write_arrays(tmp_path / "t", FORMAT, VERSION, info, arrays)
    with pytest.raises(FormatError, match=f"^{tmp_path / 't'}: .*{message}.*; run sensitivity again"):
        read_table(tmp_path / "t")


@pytest.mark.parametrize("text", ["[" * 10_000, "[]", "NaN", ""])
def test_info_of_another_form(tmp_path: Path, text: str) -> None:
    metadata = {"format": FORMAT, "version": VERSION, "info": text}
    (tmp_path / "t").write_bytes(save({"a": np.ones(1)}, metadata=metadata))
    with pytest.raises(FormatError, match="run sensitivity again"):
        read_table(tmp_path / "t")
