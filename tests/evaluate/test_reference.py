"""Stored references: whole or not there, and only for the key they were made with."""

from __future__ import annotations

import dataclasses
import json
import shutil
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from mopeq_edge.errors import FormatError, OutputError
from mopeq_edge.evaluate.chunks import Positions
from mopeq_edge.evaluate.reference import ReferenceKey, ReferenceLogits, n_rows, open_reference, write_reference

N_CTX, N_VOCAB, N_WINDOWS = 8, 5, 3
KEY = ReferenceKey("5" * 64, "7" * 64, N_CTX, None, "second-half", "llama.cpp 1")
TOKENS = np.arange(N_WINDOWS * N_CTX, dtype=np.int32).reshape(N_WINDOWS, N_CTX)


def rows(positions: Positions = "second-half") -> Iterator[np.ndarray]:
    for index in range(N_WINDOWS):
        yield np.random.default_rng(index).normal(size=(n_rows(N_CTX, positions), N_VOCAB)).astype(np.float32)


def write(work_dir: Path, key: ReferenceKey = KEY) -> ReferenceLogits:
    return write_reference(work_dir, key, "source.gguf", TOKENS, N_VOCAB, rows(key.positions))


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    write(tmp_path)
    got = open_reference(tmp_path, KEY)
    assert got is not None
    np.testing.assert_array_equal(got.tokens, TOKENS)
    np.testing.assert_array_equal(got.logits, np.stack(list(rows())))
    assert (got.n_windows, got.n_vocab, got.first, got.source_name) == (N_WINDOWS, N_VOCAB, 4, "source.gguf")
    assert isinstance(got.logits, np.memmap)
    assert sorted(path.name for path in got.folder.iterdir()) == ["logits.npy", "reference.json", "tokens.npy"]


def test_the_same_input_gives_the_same_bytes(tmp_path: Path) -> None:
    folders = [write(tmp_path / name).folder for name in ("a", "b")]
    for name in ("logits.npy", "tokens.npy", "reference.json"):
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes()


@pytest.mark.parametrize(("positions", "expected"), [("second-half", 3), ("all", 7)])
def test_counted_rows(positions: Positions, expected: int) -> None:
    assert n_rows(N_CTX, positions) == expected


@pytest.mark.parametrize(
    "change",
    [
        {"source_sha256": "6" * 64},
        {"text_sha256": "8" * 64},
        {"n_ctx": 16},
        {"n_chunks": 3},
        {"positions": "all"},
        {"library": "llama.cpp 2"},
    ],
)
def test_every_part_of_the_key_counts(tmp_path: Path, change: dict[str, object]) -> None:
    write(tmp_path)
    assert open_reference(tmp_path, dataclasses.replace(KEY, **change)) is None


def test_an_interrupted_write_leaves_no_reference(tmp_path: Path) -> None:
    def interrupted() -> Iterator[np.ndarray]:
        yield next(rows())
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_reference(tmp_path, KEY, "source.gguf", TOKENS, N_VOCAB, interrupted())
    assert open_reference(tmp_path, KEY) is None
    assert not (KEY.folder(tmp_path) / "logits.npy").exists()
    assert write(tmp_path).n_windows == N_WINDOWS


@pytest.mark.parametrize("n", [N_WINDOWS - 1, N_WINDOWS + 1])
def test_a_wrong_number_of_windows_is_not_stored(tmp_path: Path, n: int) -> None:
    window = next(rows())
    with pytest.raises(ValueError, match=f"expected {N_WINDOWS} windows, got {n}"):
        write_reference(tmp_path, KEY, "source.gguf", TOKENS, N_VOCAB, [window] * n)
    assert open_reference(tmp_path, KEY) is None


def test_rows_of_a_wrong_shape_are_not_stored(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"window 0: expected rows of shape \(3, 5\), got \(2, 5\)"):
        write_reference(tmp_path, KEY, "source.gguf", TOKENS, N_VOCAB, (row[:2] for row in rows()))


def test_too_little_space_is_said_before_anything_is_computed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never() -> Iterator[np.ndarray]:
        pytest.fail("a row was computed")
        yield

    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=20 << 20))
    tokens = np.zeros((1000, N_CTX), np.int32)
    with pytest.raises(OutputError, match=r"logits need 12.000 MB, 20.972 MB are free; evaluate fewer windows"):
        write_reference(tmp_path / "new", KEY, "source.gguf", tokens, 1000, never())
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("name", ["logits.npy", "tokens.npy", "reference.json"])
@pytest.mark.parametrize("keep", [0.0, 0.7])
def test_a_cut_file_is_refused(tmp_path: Path, name: str, keep: float) -> None:
    path = write(tmp_path).folder / name
    data = path.read_bytes()
    path.write_bytes(data[: int(keep * len(data))])
    with pytest.raises(FormatError, match="delete the folder and evaluate again"):
        open_reference(tmp_path, KEY)


def test_a_missing_array_is_refused(tmp_path: Path) -> None:
    (write(tmp_path).folder / "logits.npy").unlink()
    with pytest.raises(FormatError, match="delete the folder"):
        open_reference(tmp_path, KEY)


@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        ("logits.npy", np.zeros((N_WINDOWS, 3, N_VOCAB + 1), np.float32), "shape of the logits"),
        ("logits.npy", np.zeros((N_WINDOWS, 3, N_VOCAB), np.float64), "type of the logits"),
        ("tokens.npy", np.zeros((N_WINDOWS, N_CTX + 1), np.int32), "shape of the tokens"),
        ("tokens.npy", np.zeros((N_WINDOWS, N_CTX), np.int64), "type of the tokens"),
        ("tokens.npy", np.zeros((N_WINDOWS + 1, N_CTX), np.int32), "shape of the logits"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(tmp_path: Path, name: str, array: np.ndarray, message: str) -> None:
    np.save(write(tmp_path).folder / name, array)
    with pytest.raises(FormatError, match=message):
        open_reference(tmp_path, KEY)


@pytest.mark.parametrize("change", [{"format": 2}, {"source_sha256": "0" * 64}, {"extra": 1}])
def test_another_format_or_key_is_refused(tmp_path: Path, change: dict[str, object]) -> None:
    path = write(tmp_path).folder / "reference.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(FormatError, match="format and key"):
        open_reference(tmp_path, KEY)


def test_a_missing_size_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path).folder / "reference.json"
    meta = json.loads(path.read_text())
    del meta["n_vocab"]
    path.write_text(json.dumps(meta))
    with pytest.raises(FormatError, match="shape of the logits"):
        open_reference(tmp_path, KEY)


@pytest.mark.parametrize("text", ["[" * 100_000, "[1]", '"x"', "{}", "NaN"])
def test_a_description_of_another_form_is_refused(tmp_path: Path, text: str) -> None:
    (write(tmp_path).folder / "reference.json").write_text(text)
    with pytest.raises(FormatError, match="delete the folder"):
        open_reference(tmp_path, KEY)


@pytest.mark.parametrize("name", ["tokens.npy", "logits.npy"])
@pytest.mark.parametrize("shape", ["(10**15,)", "(1000000000000, 1000)", "()", "(-1, 4)", "(3.5,)"])
def test_an_array_that_claims_a_size_is_not_made(tmp_path: Path, name: str, shape: str) -> None:
    header = f"{{'descr': '<i4', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    raw = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + bytes(64)
    (write(tmp_path).folder / name).write_bytes(raw)
    tracemalloc.start()
    try:
        with pytest.raises(FormatError, match="delete the folder"):
            open_reference(tmp_path, KEY)
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()
