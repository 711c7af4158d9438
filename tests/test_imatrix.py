"""The imatrix file against gguf-py and llama.cpp's own tools, and what never-routed experts get."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import pytest

from mopeq_edge.errors import FormatError
from mopeq_edge.ggml.types import BY_NAME, F32
from mopeq_edge.gguf_file import KV, ValueType, read_header
from mopeq_edge.gguf_layout import string, uint32
from mopeq_edge.imatrix import (
    GRADIENT,
    PRIOR_COUNT,
    Entry,
    Imatrix,
    read_imatrix,
    split_stacks,
    with_prior,
    write_imatrix,
)

from .builders import write_raw_gguf

Floats = npt.NDArray[np.float32]

STACK, PLAIN = "blk.0.ffn_up_exps.weight", "blk.0.attn_q.weight"


def entry(sums: Any, counts: Any) -> Entry:
    return Entry(np.array(sums, dtype=np.float32), np.array(counts, dtype=np.float32))


@pytest.fixture
def imatrix() -> Imatrix:
    rng = np.random.default_rng(1)
    return Imatrix(
        entries={
            STACK: Entry(rng.random((3, 8), dtype=np.float32) + 1, np.array([5, 70, 2], dtype=np.float32)),
            PLAIN: Entry(rng.random((1, 4), dtype=np.float32) + 1, np.array([77], dtype=np.float32)),
        },
        datasets=("one.txt", "zwei ü.txt"),
        chunk_count=7,
        chunk_size=11,
        kind=GRADIENT,
        scale=2.0**-30,
        unrouted=(f"{STACK}[1]",),
    )


def same(a: Imatrix, b: Imatrix) -> None:
    assert a.entries.keys() == b.entries.keys()
    for name in a.entries:
        np.testing.assert_array_equal(a.entries[name].sums, b.entries[name].sums)
        np.testing.assert_array_equal(a.entries[name].counts, b.entries[name].counts)
    assert replace(a, entries={}) == replace(b, entries={})


def test_round_trip(imatrix: Imatrix, tmp_path: Path) -> None:
    write_imatrix(imatrix, tmp_path / "a.gguf")
    found = read_imatrix(tmp_path / "a.gguf")
    same(found, imatrix)
    assert found.n_tokens == 77
    write_imatrix(found, tmp_path / "b.gguf")
    assert (tmp_path / "b.gguf").read_bytes() == (tmp_path / "a.gguf").read_bytes()


def test_gguf_py_reads_the_same(imatrix: Imatrix, tmp_path: Path) -> None:
    write_imatrix(imatrix, tmp_path / "a.gguf")
    reader = gguf.GGUFReader(tmp_path / "a.gguf")
    assert reader.get_field("general.type").contents() == "imatrix"
    assert reader.get_field("imatrix.datasets").contents() == ["one.txt", "zwei ü.txt"]
    assert reader.get_field("imatrix.chunk_count").contents() == 7
    assert reader.get_field("imatrix.chunk_size").contents() == 11
    tensors = {t.name: t for t in reader.tensors}
    assert set(tensors) == {f"{n}{s}" for n in (STACK, PLAIN) for s in (".in_sum2", ".counts")}
    for name, values in imatrix.entries.items():
        assert tensors[f"{name}.in_sum2"].tensor_type == gguf.GGMLQuantizationType.F32
        np.testing.assert_array_equal(tensors[f"{name}.in_sum2"].data, values.sums)
        # llama-imatrix gives counts two dimensions, [1, n]
        assert list(tensors[f"{name}.counts"].shape) == [1, len(values.counts)]
        np.testing.assert_array_equal(tensors[f"{name}.counts"].data.reshape(-1), values.counts)


def test_same_bytes_whatever_the_order(imatrix: Imatrix, tmp_path: Path) -> None:
    backwards = replace(imatrix, entries=dict(reversed(list(imatrix.entries.items()))))
    assert list(backwards.entries) != list(imatrix.entries)
    write_imatrix(imatrix, tmp_path / "a.gguf")
    write_imatrix(backwards, tmp_path / "b.gguf")
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()
    assert str(tmp_path).encode() not in (tmp_path / "a.gguf").read_bytes()


def test_mean() -> None:
    found = entry([[2, 4], [30, 60]], [2, 10]).mean()
    np.testing.assert_array_equal(found, [[1, 2], [3, 6]])
    assert found.dtype == np.float32


def test_a_never_routed_expert_gets_the_mean_of_its_stack() -> None:
    filled, names = with_prior({STACK: entry([[2, 4, 6], [0, 0, 0], [10, 20, 30]], [2, 0, 4])})
    # 12, 24, 36 over 6 tokens
    np.testing.assert_allclose(filled[STACK].sums, [[2, 4, 6], np.multiply([2, 4, 6], PRIOR_COUNT), [10, 20, 30]])
    np.testing.assert_array_equal(filled[STACK].counts, [2, PRIOR_COUNT, 4])
    np.testing.assert_allclose(filled[STACK].mean()[1], [2, 4, 6])
    assert names == (f"{STACK}[1]",)


def test_a_stack_whose_tokens_are_counted_once_is_split() -> None:
    """As llama-imatrix has it where every token meets every matrix; other entries stay, also those that do not fit."""
    together = {
        "heads": entry([[1, 2, 3, 4, 5, 6]], [7]),
        "experts": entry([[1], [2]], [3, 4]),
        "odd": entry([[1]], [2]),
    }
    found = split_stacks(Imatrix(together, ("x",), 1, 7), {"heads": 3, "experts": 2, "odd": 2, "absent": 2}).entries
    assert found["heads"].sums.tolist() == [[1, 2], [3, 4], [5, 6]]
    assert found["heads"].counts.tolist() == [7, 7, 7]
    assert found["experts"] is together["experts"]
    assert found["odd"] is together["odd"]


def test_a_stack_that_no_token_reached_has_equal_weights() -> None:
    filled, names = with_prior({STACK: entry([[0, 0], [0, 0]], [0, 0]), PLAIN: entry([[3, 1]], [1])})
    np.testing.assert_array_equal(filled[STACK].mean(), np.ones((2, 2)))
    np.testing.assert_array_equal(filled[PLAIN].sums, [[3, 1]])
    assert names == (f"{STACK}[0]", f"{STACK}[1]")


def test_columns_without_activation_are_not_free() -> None:
    filled, names = with_prior({PLAIN: entry([[0, 4, 0.5], [0, 0, 0]], [2, 3])})
    np.testing.assert_array_equal(filled[PLAIN].sums[0], [0.5, 4, 0.5])
    # Routed, and nothing came through: there is no smallest positive one, but still no zero.
    assert (filled[PLAIN].sums[1] > 0).all()
    assert names == ()


@pytest.mark.parametrize("seed", range(20))
def test_never_zero_and_never_nan(seed: int) -> None:
    rng = np.random.default_rng(seed)
    counts = rng.integers(0, 3, 6) * rng.integers(0, 2, 6) * 10.0 ** rng.integers(0, 7)
    sums = 10.0 ** rng.uniform(-30, 30, (6, 5)) * rng.integers(0, 2, (6, 5)) * (counts[:, None] > 0)
    before = entry(sums, counts)
    filled, names = with_prior({STACK: before})
    after = filled[STACK]
    for values in (after.sums, after.counts, after.mean()):
        assert np.isfinite(values).all()
        assert (values > 0).all()
    assert names == tuple(f"{STACK}[{e}]" for e in np.flatnonzero(counts == 0))
    # What was measured stays
    measured = before.sums > 0
    np.testing.assert_array_equal(after.sums[measured], before.sums[measured])
    np.testing.assert_array_equal(after.counts[counts > 0], before.counts[counts > 0])
    # The input is not changed
    np.testing.assert_array_equal(before.sums, entry(sums, counts).sums)


GOOD: Mapping[str, KV] = {
    "general.type": string("imatrix"),
    "imatrix.datasets": KV(ValueType.ARRAY, ["t"], ValueType.STRING),
    "imatrix.chunk_count": uint32(1),
    "imatrix.chunk_size": uint32(8),
}


def write(path: Path, kvs: Mapping[str, KV], tensors: Mapping[str, Any]) -> Path:
    arrays = [(name, np.array(values, dtype="<f4")) for name, values in tensors.items()]
    write_raw_gguf(path, kvs, [(name, a.shape[::-1], F32, a.tobytes()) for name, a in arrays])
    return path


def test_a_file_with_an_unrouted_expert(tmp_path: Path) -> None:
    tensors = {f"{STACK}.in_sum2": [[1, 3], [0, 0]], f"{STACK}.counts": [[2], [0]]}
    found = read_imatrix(write(tmp_path / "a.gguf", GOOD, tensors))
    np.testing.assert_array_equal(found.entries[STACK].mean(), [[0.5, 1.5], [0.5, 1.5]])
    assert found.unrouted == (f"{STACK}[1]",)
    assert (found.kind, found.scale, found.chunk_count, found.chunk_size) == ("activation", 1.0, 1, 8)
    assert found.datasets == ("t",)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"general.type": string("model")}, "not an imatrix .general.type is 'model'"),
        ({"general.type": None}, "not an imatrix .general.type is None"),
        ({"imatrix.datasets": None}, "imatrix lacks imatrix.datasets; "),
        ({"imatrix.chunk_count": None}, "imatrix lacks imatrix.chunk_count; "),
        ({"imatrix.chunk_size": None, "imatrix.datasets": None}, "lacks imatrix.datasets, imatrix.chunk_size; "),
        ({"imatrix.chunk_size": string("many")}, "imatrix.chunk_size is 'many', expected a number"),
        ({"imatrix.datasets": uint32(3)}, "imatrix.datasets is 3, expected a list"),
        ({"imatrix.chunk_count": KV(ValueType.INT32, -1)}, "imatrix.chunk_count is -1, expected a number"),
        ({"imatrix.chunk_count": KV(ValueType.BOOL, True)}, "imatrix.chunk_count is True, expected a number"),
        ({"imatrix.chunk_size": KV(ValueType.UINT64, 2**40)}, "imatrix.chunk_size is 1099511627776, expected"),
        (
            {"imatrix.datasets": KV(ValueType.ARRAY, [1], ValueType.UINT8)},
            r"imatrix.datasets is \[1\], expected a list",
        ),
        ({"mopeq.imatrix.kind": uint32(1)}, "mopeq.imatrix.kind is 1, expected activation or gradient"),
        ({"mopeq.imatrix.scale": KV(ValueType.FLOAT64, 0.0)}, "mopeq.imatrix.scale is 0.0, expected a positive"),
        ({"mopeq.imatrix.scale": KV(ValueType.FLOAT64, float("nan"))}, "mopeq.imatrix.scale is nan, expected"),
        ({"mopeq.imatrix.unrouted": string("x")}, "mopeq.imatrix.unrouted is 'x', expected a list"),
    ],
)
def test_refused_for_its_metadata(tmp_path: Path, change: Mapping[str, KV | None], message: str) -> None:
    kvs = {key: kv for key, kv in {**GOOD, **change}.items() if kv is not None}
    path = write(tmp_path / "a.gguf", kvs, {f"{PLAIN}.in_sum2": [[1, 3]], f"{PLAIN}.counts": [[2]]})
    with pytest.raises(FormatError, match=f"^{path}: .*{message}"):
        read_imatrix(path)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"x.in_sum2": [[1, 3]]}, "entry 'x' needs both"),
        ({"x.counts": [[1]]}, "entry 'x' needs both"),
        ({"x.in_sum2": [[1, 3]], "y.counts": [[1]]}, "entry 'x' needs both"),
        ({"x.in_sum2": [[1, -3]], "x.counts": [[1]]}, "'x.in_sum2' holds negative or non-finite"),
        ({"x.in_sum2": [[1, np.nan]], "x.counts": [[1]]}, "'x.in_sum2' holds negative or non-finite"),
        ({"x.in_sum2": [[1, np.inf]], "x.counts": [[1]]}, "'x.in_sum2' holds negative or non-finite"),
        ({"x.in_sum2": [[1, 2]], "x.counts": [[-1]]}, "'x.counts' holds negative or non-finite"),
        ({"x.in_sum2": [[1, 2]], "x.counts": [[np.nan]]}, "'x.counts' holds negative or non-finite"),
        (
            {"x.in_sum2": [[1, 2, 3]], "x.counts": [[1], [2]]},
            r"'x' has sums of shape \[1, 3\] and counts of shape \[2, 1\]",
        ),
        ({"x.in_sum2": [[1, 2]], "x.counts": [[1, 1]]}, r"expected \[n, n_in\] and \[n, 1\]"),
        ({"x.in_sum2": [[3e38, 2]], "x.counts": [[1e-30]]}, "'x' has a mean .sums over counts. beyond F32"),
        ({"x.weight": [[1, 2]]}, r"tensor 'x.weight' \(F32\) has no place in an imatrix"),
    ],
)
def test_refused_for_its_tensors(tmp_path: Path, tensors: Mapping[str, Any], message: str) -> None:
    path = write(tmp_path / "a.gguf", GOOD, tensors)
    with pytest.raises(FormatError, match=f"^{path}: .*{message}") as caught:
        read_imatrix(path)
    assert "\n" not in str(caught.value)


def test_refused_for_another_type(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    write_raw_gguf(path, GOOD, [("x.in_sum2", (2, 1), BY_NAME["F16"], bytes(4)), ("x.counts", (1,), F32, bytes(4))])
    with pytest.raises(FormatError, match=r"tensor 'x.in_sum2' \(F16\) has no place"):
        read_imatrix(path)


def test_refused_for_no_gguf_at_all(tmp_path: Path) -> None:
    path = tmp_path / "imatrix.dat"
    path.write_bytes(b"\x21\0\0\0 an imatrix in the old format")
    with pytest.raises(FormatError, match="not a GGUF file"):
        read_imatrix(path)
    with pytest.raises(FormatError, match="cannot be read"):
        read_imatrix(tmp_path / "none.gguf")


@pytest.mark.runtime
def test_llama_imatrix_makes_what_we_read(bf16_gguf: Path, calibration_text: str, tmp_path: Path) -> None:
    from mopeq_edge.runtime.tools import run_tool

    (tmp_path / "text.txt").write_text(calibration_text[:6000], encoding="utf-8")
    options: list[str | Path] = ["-c", "128", "--chunks", "3", "--no-ppl", "-o", tmp_path / "a.gguf"]
    run_tool("llama-imatrix", ["-m", bf16_gguf, "-f", tmp_path / "text.txt", *options])
    found = read_imatrix(tmp_path / "a.gguf")
    assert (found.chunk_count, found.chunk_size, found.n_tokens) == (3, 128, 384)
    assert found.datasets == (str(tmp_path / "text.txt"),)
    assert found.kind == "activation"
    weights = {t.name: t for t in read_header(bf16_gguf).tensors}
    reader = {t.name: np.array(t.data) for t in gguf.GGUFReader(tmp_path / "a.gguf").tensors}
    never = 0
    for name, values in found.entries.items():
        n_in, _, *n_expert = weights[name].shape
        assert values.sums.shape == (n_expert[0] if n_expert else 1, n_in)
        counts = reader[f"{name}.counts"].reshape(-1)
        never += int((counts == 0).sum())
        np.testing.assert_array_equal(values.counts, np.where(counts == 0, PRIOR_COUNT, counts))
        stored = reader[f"{name}.in_sum2"].reshape(values.sums.shape)
        np.testing.assert_array_equal(values.sums[stored > 0], stored[stored > 0])
        # Every token goes to one matrix, or to 4 of the 16 experts.
        assert counts.sum() == 384 * (4 if n_expert else 1)
    assert {name for name in weights if "_exps." in name} <= set(found.entries)
    # So few tokens do not reach every expert: the prior is at work in this file.
    assert never == len(found.unrouted) > 0
    write_imatrix(found, tmp_path / "b.gguf")
    same(read_imatrix(tmp_path / "b.gguf"), found)

    said = run_tool("llama-quantize", ["--imatrix", tmp_path / "b.gguf", bf16_gguf, tmp_path / "q.gguf", "Q2_K"])
    assert f"have importance matrix data with {len(found.entries)} entries" in said
    header = read_header(tmp_path / "q.gguf")
    assert header.get("quantize.imatrix.entries_count") == len(found.entries)
    assert header.get("quantize.imatrix.chunks_count") == 3
