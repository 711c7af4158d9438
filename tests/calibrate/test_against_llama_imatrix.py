"""Our statistics against llama-imatrix's on the same tokens, the weights and the cache in F32 on both sides."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

from mopeq_edge.calibrate.run import calibrate_text
from mopeq_edge.cli import cli
from mopeq_edge.emit import emit
from mopeq_edge.errors import CalibrationError
from mopeq_edge.ggml.library import load_ggml
from mopeq_edge.ggml.types import F32
from mopeq_edge.imatrix import Entry, Imatrix, read_imatrix, write_imatrix
from mopeq_edge.progress import SilentProgress
from mopeq_edge.runtime.tools import run_tool
from mopeq_edge.sensitivity.pricing import Statistics
from mopeq_edge.source.huggingface import HuggingFaceSource

pytestmark = pytest.mark.runtime

N_CTX, N_CHUNKS, N_LAYER, N_USED = 512, 10, 4, 4

TIES = 4
"""Routings out of 81,920 that may differ, because rounding decides between two nearly equal router logits."""


@pytest.fixture(scope="module")
def ours(tiny_source: HuggingFaceSource, calibration_text: str, tmp_path_factory: pytest.TempPathFactory) -> Statistics:
    return calibrate_text(
        *(tiny_source, calibration_text.removesuffix("\n"), "calibration.txt"),
        n_ctx=N_CTX,
        chunks=N_CHUNKS,
        fisher=False,
        seed=1,
        threads=2,
        scratch=tmp_path_factory.mktemp("scratch"),
        progress=SilentProgress(),
    )


@pytest.fixture(scope="module")
def f32_gguf(tiny_source: HuggingFaceSource, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("f32") / "tiny-f32.gguf"
    types = {tensor.name: F32 for tensor in tiny_source.tensors}
    emit(tiny_source, types, tiny_source.kvs, None, load_ggml(), path, threads=2, progress=SilentProgress())
    return path


@pytest.fixture(scope="module")
def text_file(calibration_text: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "calibration.txt"
    path.write_text(calibration_text, encoding="utf-8", newline="")
    return path


@pytest.fixture(scope="module")
def theirs(f32_gguf: Path, text_file: Path) -> Path:
    """The file that llama-imatrix writes."""
    path = f32_gguf.with_name("theirs.gguf")
    exact = ["-ctk", "f32", "-ctv", "f32", "-fa", "off"]
    options = ["-c", str(N_CTX), "--chunks", str(N_CHUNKS), "--no-ppl", "--process-output", "-t", "2"]
    run_tool("llama-imatrix", ["-m", f32_gguf, "-f", text_file, "-o", path, *options, *exact])
    return path


def invoke(*args: object) -> Result:
    return CliRunner().invoke(cli, [str(arg) for arg in args])


def seen_counts(imatrix: Imatrix, name: str) -> np.ndarray:
    """Counts of ``name`` with 0 for an expert that has the prior's count."""
    idle = [f"{name}[{expert}]" in imatrix.unrouted for expert in range(len(imatrix.entries[name].counts))]
    return np.where(idle, 0, imatrix.entries[name].counts)


def assert_same_counts(one: Imatrix, other: Imatrix) -> None:
    """Every routed token is there, and no more than :data:`TIES` of them in another expert's row."""
    assert one.entries.keys() == other.entries.keys()
    moved = 0.0
    for name in one.entries:
        a, b = seen_counts(one, name), seen_counts(other, name)
        experts = "_exps." in name
        assert a.sum() == b.sum() == N_CHUNKS * N_CTX * (N_USED if experts else 1)
        moved += np.abs(a - b).sum() / 2 if "ffn_down_exps" in name else 0
        assert experts or (a == b).all()
    assert moved <= TIES


def test_sums_and_counts(ours: Statistics, theirs: Path) -> None:
    imatrix, expected = ours.activation, read_imatrix(theirs)
    assert imatrix is not None
    assert len(imatrix.entries) == N_LAYER * 8 + 1
    assert (imatrix.chunk_count, imatrix.chunk_size) == (expected.chunk_count, expected.chunk_size) == (10, 512)
    assert_same_counts(imatrix, expected)
    compared = 0
    for name, entry in expected.entries.items():
        same = seen_counts(imatrix, name) == seen_counts(expected, name)
        found, want = imatrix.entries[name].sums[same], entry.sums[same]
        # float32 products in another order: 1e-4 of an entry that matters, and of the mean for the smallest ones
        np.testing.assert_allclose(found, want, rtol=1e-4, atol=1e-6 * want.mean(), err_msg=name)
        compared += found.size
    assert compared > 0.9 * sum(entry.sums.size for entry in expected.entries.values())


def test_calibrating_the_gguf(f32_gguf: Path, text_file: Path, ours: Statistics, tmp_path: Path) -> None:
    work = tmp_path / "work"
    options = ("--chunks", N_CHUNKS, "--window", N_CTX, "--threads", 2, "--json")
    done = invoke("calibrate", f32_gguf, "--text", text_file, "--work-dir", work, *options)
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["gradient_imatrix"] is False
    found = read_imatrix(work / "imatrix.gguf")
    assert found.datasets == ("calibration.txt",)
    assert ours.activation is not None
    assert_same_counts(ours.activation, found)
    for name, entry in found.entries.items():
        # llama.cpp's default cache is F16
        expected = ours.activation.entries[name].sums.sum(axis=0)
        np.testing.assert_allclose(entry.sums.sum(axis=0), expected, rtol=0.02, err_msg=name)


def test_an_imatrix_of_llama_imatrix_is_taken(tiny_model: Path, theirs: Path, tmp_path: Path) -> None:
    work = tmp_path / "work"
    done = invoke("calibrate", tiny_model, "--imatrix", theirs, "--work-dir", work, "--pre", "gpt-2", "--json")
    assert done.exit_code == 0, done.output
    expected = read_imatrix(theirs)
    summary = json.loads(done.stdout)
    assert (summary["tokens"], summary["entries"], summary["gradient_imatrix"]) == (5120, 33, False)
    assert summary["never_routed"] == list(expected.unrouted)
    kept = read_imatrix(work / "imatrix.gguf")
    for name, entry in expected.entries.items():
        np.testing.assert_array_equal(kept.entries[name].sums, entry.sums)
        np.testing.assert_array_equal(kept.entries[name].counts, entry.counts)


def test_an_imatrix_of_another_model_is_refused(tiny_model: Path, theirs: Path, tmp_path: Path) -> None:
    real = read_imatrix(theirs)
    up, query = "blk.2.ffn_up_exps.weight", "blk.0.attn_q.weight"
    more = Entry(np.ones((17, 256), dtype=np.float32), np.ones(17, dtype=np.float32))
    narrow = Entry(np.ones((1, 128), dtype=np.float32), np.ones(1, dtype=np.float32))
    without = {name: entry for name, entry in real.entries.items() if name != up}
    cases = (
        ({**real.entries, up: more}, f"entry '{up}' has shape [17, 256], expected [16, 256]"),
        ({**real.entries, query: narrow}, f"entry '{query}' has shape [1, 128], expected [1, 256]"),
        (without, f"has no entry for '{up}'"),
    )
    for number, (entries, said) in enumerate(cases):
        path = tmp_path / f"{number}.gguf"
        write_imatrix(dataclasses.replace(real, entries=entries), path)
        refused = invoke("calibrate", tiny_model, "--imatrix", path, "--work-dir", tmp_path / "work", "--pre", "gpt-2")
        assert isinstance(refused.exception, CalibrationError)
        assert said in str(refused.exception)
        assert "it was made for another model" in str(refused.exception)
        assert not (tmp_path / "work" / "stages.json").exists()
