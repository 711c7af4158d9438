"""The pass over a file: pieces that begin and end anywhere, rows of zeros, and zeros that are meant."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from mopeq_edge.ggml.types import BY_NAME, F32, GgmlType
from mopeq_edge.gguf_file import KV, ValueType, read_header
from mopeq_edge.gguf_layout import string
from mopeq_edge.progress import SilentProgress
from mopeq_edge.source.padded import ExpertPadding
from mopeq_edge.validate import scan as module
from mopeq_edge.validate.check import Check
from mopeq_edge.validate.damage import check_scales, check_zeros
from mopeq_edge.validate.scan import Scanned, scan
from mopeq_edge.validate.stored import StoredModel, stored_model

from ..builders import write_raw_gguf

Q4_0 = BY_NAME["Q4_0"]
OLMOE = {"general.architecture": string("olmoe")}


def model_of(
    path: Path, *tensors: tuple[str, tuple[int, ...], GgmlType, bytes], kvs: dict[str, KV] | None = None
) -> StoredModel:
    write_raw_gguf(path, kvs or OLMOE, tensors)
    return stored_model([read_header(path)])


def stack(name: str, n_zero: dict[int, int], n_out: int = 16) -> tuple[str, tuple[int, ...], GgmlType, bytes]:
    """Four experts in Q4_0 [64, n_out] whose last rows are zeros."""
    rows = np.full((4, n_out, 36), 7, np.uint8)
    for expert, n in n_zero.items():
        rows[expert, n_out - n :] = 0
    return f"blk.0.ffn_{name}.weight", (64, n_out, 4), Q4_0, rows.tobytes()


def zeros(model: StoredModel, padding: ExpertPadding | None = None) -> list[Check]:
    return [
        check for check in check_zeros(model, scan(model, 1, SilentProgress()), padding, None) if check.passed is False
    ]


@pytest.mark.parametrize("piece", [1, 100, 36 * 5, 36 * 16, 10**6])
@pytest.mark.parametrize("threads", [1, 3])
def test_pieces_of_any_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece: int, threads: int) -> None:
    """A matrix of 16 rows with a bad scale in rows 3 and 9, one with 7 rows of zeros, one of nothing else."""
    name, shape, kind, raw = stack("up_exps", {2: 7, 3: 16})
    values = np.frombuffer(raw, np.uint8).reshape(4, 16, 36).copy()
    values[1, 3, 18:20] = values[1, 9, 0:2] = [0x00, 0x7E]
    values[2, 4] = 0  # not at the end
    model = model_of(tmp_path / "m.gguf", (name, shape, kind, values.tobytes()))
    monkeypatch.setattr(module, "PIECE_BYTES", piece)
    found = scan(model, threads, SilentProgress())
    assert [one.zero_rows for one in found] == [0, 0, 7, 16]
    assert [one.bad is not None for one in found] == [False, True, False, False]
    bad = found[1].bad
    assert bad is not None
    # two blocks a row
    assert (bad.block, bad.n_blocks, bad.scale, bad.found) == (7, 2, "d", "NaN")
    [line] = check_scales(found)
    assert line.message == (
        "expert 1 of blk.0.ffn_up_exps.weight: Q4_0 block 7 (row 3, block 1 of it): 'd' is NaN; 2 such in it"
    )


def test_ends_that_all_experts_have_are_padding(tmp_path: Path) -> None:
    model = model_of(tmp_path / "a.gguf", stack("up_exps", dict.fromkeys(range(4), 5)))
    assert zeros(model) == []
    [line] = zeros(model_of(tmp_path / "b.gguf", stack("up_exps", {0: 5, 1: 5, 2: 9, 3: 5})))
    assert line.message.startswith("blk.0.ffn_up_exps.weight: zeros: the last 9 rows of 16 of expert 2;")
    # down has its padding in columns
    [line] = zeros(model_of(tmp_path / "c.gguf", stack("down_exps", dict.fromkeys(range(4), 5))))
    assert "of expert 0, the last 5 rows of 16 of expert 1, the last 5 rows of 16 of expert 2" in line.message
    assert "and 1 more" not in line.message
    assert "the ends of 1 more" in line.message
    # all of everything
    [line] = zeros(model_of(tmp_path / "d.gguf", stack("up_exps", dict.fromkeys(range(4), 300), n_out=300)))
    assert "all of expert 0, 1, 2, 3;" in line.message


def test_padding_that_the_plan_knows(tmp_path: Path) -> None:
    padding = ExpertPadding("olmoe.feed_forward_length", 10, 16)
    model = model_of(tmp_path / "a.gguf", stack("up_exps", {0: 6, 1: 6, 2: 6, 3: 2}))
    assert zeros(model, padding) == []
    [line] = zeros(model_of(tmp_path / "b.gguf", stack("up_exps", dict.fromkeys(range(4), 7))), padding)
    assert "the last 7 rows of 16" in line.message


def test_rows_that_no_token_has(tmp_path: Path) -> None:
    rows = np.ones((10, 4), "<f4")
    rows[7:] = 0
    tensor = ("token_embd.weight", (4, 10), F32, rows.tobytes())
    [line] = zeros(model_of(tmp_path / "a.gguf", tensor))
    assert line.message.startswith("token_embd.weight: zeros: the last 3 rows of 10;")
    types = KV(ValueType.ARRAY, [1] * 7 + [5] * 3, ValueType.INT32)
    assert zeros(model_of(tmp_path / "b.gguf", tensor, kvs={**OLMOE, "tokenizer.ggml.token_type": types})) == []


def test_what_may_be_zeros(tmp_path: Path) -> None:
    nothing = bytes(4 * 8)
    bias, norm = ("blk.0.attn_q.bias", (8,), F32, nothing), ("blk.0.attn_norm.weight", (8,), F32, nothing)
    half = ("blk.0.ffn_norm.weight", (8,), F32, np.array([1, 1, 0, 0, 0, 0, 0, 0], "<f4").tobytes())
    [line] = zeros(model_of(tmp_path / "a.gguf", bias, norm, half))
    assert line.message.startswith("blk.0.attn_norm.weight: zeros: all of it;")


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    """16 MiB of weights, pieces of 4 MiB of which two are in flight."""
    raw = np.full(1 << 24, 7, np.uint8)
    model = model_of(tmp_path / "m.gguf", ("blk.0.attn_q.weight", (1024, 4096), F32, raw.tobytes()))
    scan(model, 1, SilentProgress())
    tracemalloc.start()
    found: tuple[Scanned, ...] = scan(model, 1, SilentProgress())
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(found) == 1
    assert peak < 14 * 2**20
