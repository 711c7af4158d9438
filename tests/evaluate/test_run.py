"""Evaluations of the bundled model, and every way to ask for one that cannot be made."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from mopeq_edge.errors import MopeqError
from mopeq_edge.evaluate import run
from mopeq_edge.evaluate.reference import ReferenceLogits, write_reference
from mopeq_edge.evaluate.run import evaluate, gguf_sha256, make_reference
from mopeq_edge.gguf_file import read_header
from mopeq_edge.progress import Step
from mopeq_edge.split import gguf_parts

N_CTX, N_CHUNKS = 64, 6


class Recorder:
    """A progress that remembers: per title, the total and what was done; and the notes."""

    def __init__(self) -> None:
        self.steps: dict[str, list[float]] = {}
        self.notes: list[str] = []

    @contextmanager
    def step(self, title: str, total: float | None, unit: str = "") -> Iterator[Step]:
        self.steps[title] = [total, 0.0]
        yield _RecordedStep(self.steps[title])

    def note(self, message: str) -> None:
        self.notes.append(message)


class _RecordedStep:
    def __init__(self, values: list[float]) -> None:
        self._values = values

    def advance(self, amount: float = 1.0) -> None:
        self._values[1] += amount


@pytest.fixture(scope="module")
def make(bf16_gguf: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., ReferenceLogits]:
    """Makes references of the bundled model that share one work directory."""
    work = tmp_path_factory.mktemp("work")

    def make(**options: object) -> ReferenceLogits:
        return make_reference(bf16_gguf, text_file, work, **{"n_ctx": N_CTX, "n_chunks": N_CHUNKS, **options})

    return make


@pytest.fixture(scope="module")
def everything(make: Callable[..., ReferenceLogits]) -> ReferenceLogits:
    return make(positions="all")


@pytest.mark.runtime
@pytest.mark.parametrize("positions", ["second-half", "all"])
def test_the_source_against_itself_is_exactly_zero(
    make: Callable[..., ReferenceLogits], bf16_gguf: Path, positions: str
) -> None:
    got = evaluate(bf16_gguf, make(positions=positions), positions=positions).divergence
    assert (got.kld_mean, got.kld_max, got.ln_ppl_ratio, got.same_top) == (0, 0, 0, 1)
    assert got.n_positions == N_CHUNKS * {"second-half": 31, "all": 63}[positions]


@pytest.mark.runtime
def test_more_bits_are_nearer_to_the_source(everything: ReferenceLogits, q2_k: Path, q4_k_m: Path) -> None:
    two = evaluate(q2_k, everything, positions="all").divergence
    four = evaluate(q4_k_m, everything, positions="all").divergence
    assert 0 < 3 * four.kld_mean < two.kld_mean
    assert two.same_top < four.same_top < 1


@pytest.mark.runtime
def test_a_reference_of_all_positions_serves_the_second_half_too(
    make: Callable[..., ReferenceLogits], everything: ReferenceLogits, q2_k: Path
) -> None:
    half = make(positions="second-half")
    ours = dataclasses.asdict(evaluate(q2_k, everything).divergence)
    expected = dataclasses.asdict(evaluate(q2_k, half).divergence)
    # Rows that nobody asked for are left out of the last layer's work, so sums may round apart.
    assert ours == pytest.approx(expected, rel=1e-3, abs=1e-4)
    with pytest.raises(MopeqError, match="holds the positions 'second-half', 'all' were asked for"):
        evaluate(q2_k, half, positions="all")


@pytest.mark.runtime
def test_the_source_runs_once(make: Callable[..., ReferenceLogits], monkeypatch: pytest.MonkeyPatch) -> None:
    first = make(positions="all")
    monkeypatch.setattr(run, "LlamaModel", None)
    again = make(positions="all")
    assert again.folder == first.folder
    np.testing.assert_array_equal(again.logits, first.logits)


@pytest.mark.runtime
def test_the_result_as_a_dictionary(everything: ReferenceLogits, q2_k: Path, bf16_gguf: Path, text_file: Path) -> None:
    first, second = (evaluate(q2_k, everything, positions="all").as_dict() for _ in range(2))
    assert json.dumps(first) == json.dumps(second)
    assert list(first) == sorted(first)
    assert first["source_sha256"] == hashlib.sha256(bf16_gguf.read_bytes()).hexdigest()
    assert first["text_sha256"] == hashlib.sha256(text_file.read_bytes().removesuffix(b"\n")).hexdigest()
    assert first["target_bytes"] == q2_k.stat().st_size
    assert (first["window_count"], first["window_tokens"], first["positions_count"]) == (N_CHUNKS, N_CTX, 378)
    assert str(q2_k.parent) not in json.dumps(first)


@pytest.mark.runtime
def test_progress_and_notes(bf16_gguf: Path, q2_k: Path, text_file: Path, tmp_path: Path) -> None:
    progress = Recorder()
    short = tmp_path / "short.txt"
    short.write_text(text_file.read_text(encoding="utf-8")[:16000], encoding="utf-8")
    reference = make_reference(bf16_gguf, short, tmp_path, n_ctx=1500, n_chunks=9, progress=progress)
    evaluate(q2_k, reference, progress=progress)
    assert reference.n_windows < 9
    assert len(progress.steps) == 3
    assert all(total == done > 0 for total, done in progress.steps.values())
    assert "windows of 1500 tokens, 9 were asked for" in progress.notes[0]
    assert [note.split(": ")[1] for note in progress.notes[1:]] == [
        "was trained on 1024 tokens of context, the windows have 1500"
    ] * 2


@pytest.mark.runtime
def test_a_target_with_another_vocabulary(everything: ReferenceLogits, q2_k: Path, tmp_path: Path) -> None:
    rows = np.zeros((1, 31, 77), np.float32)
    key = dataclasses.replace(everything.key, positions="second-half")
    other = write_reference(tmp_path, key, "other.gguf", everything.tokens[:1], 77, rows)
    with pytest.raises(MopeqError, match=r"has 4096 tokens in its vocabulary, expected 77 as in other.gguf"):
        evaluate(q2_k, other)


@pytest.mark.runtime
def test_a_text_that_is_too_short(bf16_gguf: Path, tmp_path: Path) -> None:
    text = tmp_path / "short.txt"
    text.write_text("hello world")
    with pytest.raises(MopeqError, match=r"short.txt: the text has \d tokens, too few for one window of 64"):
        make_reference(bf16_gguf, text, tmp_path / "work", n_ctx=64)
    assert not (tmp_path / "work").exists()


@pytest.mark.runtime
def test_a_truncated_target(everything: ReferenceLogits, q2_k: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(q2_k.read_bytes()[:-100000])
    with pytest.raises(MopeqError, match=r"broken.gguf: llama.cpp cannot load it: tensor .* not within the file"):
        evaluate(broken, everything)


@pytest.mark.runtime
def test_weights_that_are_no_numbers(
    everything: ReferenceLogits, bf16_gguf: Path, text_file: Path, tmp_path: Path
) -> None:
    header = read_header(bf16_gguf)
    norm = next(tensor for tensor in header.tensors if tensor.name == "output_norm.weight")
    data = bytearray(bf16_gguf.read_bytes())
    start = header.data_start + norm.offset
    data[start : start + norm.nbytes] = np.full(norm.n_weights, np.nan, np.float32).tobytes()
    broken = tmp_path / "nan.gguf"
    broken.write_bytes(data)
    expected = r"nan.gguf: gives logits that are no numbers in window 0"
    with pytest.raises(MopeqError, match=expected):
        evaluate(broken, everything)
    with pytest.raises(MopeqError, match=expected):
        make_reference(broken, text_file, tmp_path / "work", n_ctx=N_CTX, n_chunks=1)


def test_a_source_that_is_not_there(text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "library_version", lambda: "llama.cpp 1")
    with pytest.raises(MopeqError, match=r"none.gguf: cannot be read \(No such file or directory\); give a GGUF"):
        make_reference(tmp_path / "none.gguf", text_file, tmp_path)


def test_the_parts_of_a_split_file(tmp_path: Path) -> None:
    assert gguf_parts(Path("a/model.gguf")) == [Path("a/model.gguf")]
    names = ["model-00001-of-00003.gguf", "model-00002-of-00003.gguf", "model-00003-of-00003.gguf"]
    assert [path.name for path in gguf_parts(Path("a") / names[0])] == names
    for index, name in enumerate(names):
        (tmp_path / name).write_bytes(bytes([index]) * (index + 1))
    expected = hashlib.sha256(b"\0\1\1\2\2\2").hexdigest()
    assert gguf_sha256(tmp_path / names[0]) == expected
    (tmp_path / names[1]).unlink()
    with pytest.raises(MopeqError, match=r"model-00002-of-00003.gguf: cannot be read"):
        gguf_sha256(tmp_path / names[0])
