"""The written file: its size, its bytes whatever the threads, what happens on errors, and llama.cpp's opinion of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import gguf
import numpy as np
import pytest

from mopeq_edge.emit import check_written, emit
from mopeq_edge.errors import FormatError, PlanError, SourceError
from mopeq_edge.ggml.library import Ggml, load_ggml
from mopeq_edge.ggml.types import BY_NAME, F32, QUANTIZABLE, GgmlType
from mopeq_edge.gguf_file import read_header
from mopeq_edge.gguf_layout import TensorSpec, layout
from mopeq_edge.imatrix import Entry, Imatrix, read_imatrix, write_imatrix
from mopeq_edge.output_kvs import FILE_TYPES, Provenance, file_type_of, output_kvs
from mopeq_edge.plan.artifact import tensor_type_lines
from mopeq_edge.progress import SilentProgress, Step
from mopeq_edge.source.huggingface import HuggingFaceSource

from .arrays import KVS, ArraySource
from .builders import write_raw_gguf

TYPES: Mapping[str, GgmlType] = {
    "token_embd.weight": BY_NAME["BF16"],
    "blk.0.attn_norm.weight": F32,
    "blk.0.attn_q.weight": BY_NAME["Q4_K"],
    "blk.0.ffn_up_exps.weight": BY_NAME["Q5_0"],
    "blk.0.ffn_gate_inp.weight": F32,
}


@pytest.fixture
def imatrix() -> Imatrix:
    rng = np.random.default_rng(5)
    entries = {
        "blk.0.attn_q.weight": Entry(rng.random((1, 512), dtype=np.float32) + 0.1, np.full(1, 4, np.float32)),
        "blk.0.ffn_up_exps.weight": Entry(rng.random((9, 96), dtype=np.float32) + 0.1, np.full(9, 4, np.float32)),
        "blk.0.ffn_gate_inp.weight": Entry(rng.random((1, 96), dtype=np.float32) + 0.1, np.full(1, 4, np.float32)),
    }
    return Imatrix(entries, ("text",), 1, 4)


def specs_of(source: ArraySource, types: Mapping[str, GgmlType]) -> list[TensorSpec]:
    return [(t.name, t.shape, types[t.name]) for t in source.tensors]


def write(path: Path, imatrix: Imatrix | None, threads: int = 2, source: ArraySource | None = None) -> int:
    ggml = load_ggml()
    return emit(source or ArraySource(), TYPES, KVS, imatrix, ggml, path, threads=threads, progress=SilentProgress())


@pytest.mark.runtime
def test_size_and_content(tmp_path: Path, imatrix: Imatrix) -> None:
    path, source, ggml = tmp_path / "out.gguf", ArraySource(), load_ggml()
    plan = layout(KVS, specs_of(source, TYPES))
    assert write(path, imatrix) == path.stat().st_size == plan.file_size
    assert [p.name for p in tmp_path.iterdir()] == ["out.gguf"]
    reader = gguf.GGUFReader(path)
    assert reader.get_field("general.name").contents() == "made up"
    assert [t.name for t in reader.tensors] == [t.name for t in source.tensors]
    for tensor, found in zip(source.tensors, reader.tensors, strict=True):
        assert found.tensor_type.name == TYPES[tensor.name].name
        assert tuple(found.shape) == tensor.shape
        if not TYPES[tensor.name].is_quantized:
            stored = [source.read_stored(tensor, m).tobytes() for m in range(tensor.n_matrices)]
            assert found.data.tobytes() == b"".join(stored)
            continue
        # Each expert by its own row of the imatrix, all rows of a matrix at once
        weights = imatrix.entries[tensor.name].mean()
        by_matrix = [ggml.quantize(TYPES[tensor.name], source.read(tensor, m), w) for m, w in enumerate(weights)]
        assert found.data.tobytes() == b"".join(blocks.tobytes() for blocks in by_matrix)
    # The padding is zeros
    data = path.read_bytes()
    ends = [t.data_offset + t.n_bytes for t in reader.tensors]
    assert all(not any(data[end : end + -end % 32]) for end in ends)


@pytest.mark.runtime
def test_the_bytes_do_not_depend_on_threads(tmp_path: Path, imatrix: Imatrix) -> None:
    for threads in (1, 2, 5):
        write(tmp_path / f"{threads}.gguf", imatrix, threads)
    first = (tmp_path / "1.gguf").read_bytes()
    assert all((tmp_path / f"{threads}.gguf").read_bytes() == first for threads in (2, 5))
    # And the imatrix does count
    write(tmp_path / "none.gguf", None)
    assert (tmp_path / "none.gguf").read_bytes() != first


@pytest.mark.runtime
@pytest.mark.parametrize("broken", [("token_embd.weight", 0), ("blk.0.ffn_up_exps.weight", 5)])
@pytest.mark.parametrize("threads", [1, 3])
def test_a_read_that_fails(tmp_path: Path, imatrix: Imatrix, broken: tuple[str, int], threads: int) -> None:
    path = tmp_path / "out.gguf"
    path.write_bytes(b"old")
    with pytest.raises(SourceError, match=f"{broken[0]}, expert {broken[1]}: broken"):
        write(path, imatrix, threads, ArraySource(broken))
    assert [p.name for p in tmp_path.iterdir()] == ["out.gguf"]
    assert path.read_bytes() == b"old"


@pytest.mark.runtime
@pytest.mark.parametrize("kind", ["Q5_0", "IQ4_NL", "F16", "MXFP4"])
def test_a_weight_beyond_the_type(tmp_path: Path, kind: str) -> None:
    """A plan of other weights: refused before libggml makes an infinity of it, or ends the process."""
    source = ArraySource()
    values = source.values["blk.0.ffn_up_exps.weight"].view(np.float32)
    values[6, 2, 5] = -1e30
    types = {**TYPES, "blk.0.ffn_up_exps.weight": BY_NAME[kind]}
    out = tmp_path / "out.gguf"
    with pytest.raises(PlanError) as caught:
        emit(source, types, KVS, None, load_ggml(), out, threads=2, progress=SilentProgress())
    assert str(caught.value) == (
        f"tensor 'blk.0.ffn_up_exps.weight', matrix 6: type {kind} is for weights up to 65504, found one of magnitude "
        "1e+30; make the plan again from a sensitivity table of these weights, which keeps such a tensor in BF16, "
        "or choose BF16 or F32"
    )
    assert list(tmp_path.iterdir()) == []
    types = {**TYPES, "blk.0.ffn_up_exps.weight": F32}
    emit(source, types, KVS, None, load_ggml(), out, threads=2, progress=SilentProgress())


@pytest.mark.runtime
def test_an_imatrix_of_another_model(tmp_path: Path, imatrix: Imatrix) -> None:
    entries = {**imatrix.entries, "blk.0.ffn_up_exps.weight": imatrix.entries["blk.0.attn_q.weight"]}
    other = Imatrix(entries, ("text",), 1, 4)
    with pytest.raises(FormatError, match=r"ffn_up_exps.weight' has shape \[1, 512\], expected \[9, 96\]"):
        write(tmp_path / "out.gguf", other)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.runtime
def test_progress_adds_up(tmp_path: Path, imatrix: Imatrix) -> None:
    class Counter(SilentProgress):
        total = done = 0.0

        @contextmanager
        def step(self, title: str, total: float | None, unit: str = "") -> Iterator[Step]:
            assert title == "emit"
            self.total = total
            yield self

        def advance(self, amount: float = 1.0) -> None:
            self.done += amount

    progress, source = Counter(), ArraySource()
    emit(source, TYPES, KVS, imatrix, load_ggml(), tmp_path / "out.gguf", threads=2, progress=progress)
    assert progress.done == progress.total == sum(t.n_weights for t in source.tensors)


def test_a_file_that_is_not_what_was_planned(tmp_path: Path) -> None:
    path = tmp_path / "out.gguf"
    specs: list[TensorSpec] = [("a.weight", (32, 2), BY_NAME["Q4_0"]), ("b.weight", (8, 4), F32)]
    write_raw_gguf(path, KVS, [(*specs[0], bytes(36)), (*specs[1], bytes(128))])
    check_written(path, layout(KVS, specs))
    iq4_nl = BY_NAME["IQ4_NL"]
    others: list[tuple[list[TensorSpec], str]] = [
        # IQ4_NL has as many bytes as Q4_0
        ([("a.weight", (32, 2), iq4_nl), specs[1]], r"'a.weight' was planned as IQ4_NL \[32, 2\], written .* Q4_0"),
        ([("x.weight", (32, 2), BY_NAME["Q4_0"]), specs[1]], "'x.weight' was planned as .* written as 'a.weight'"),
        ([specs[0], ("b.weight", (4, 8), F32)], r"'b.weight' was planned as F32 \[4, 8\], written as .* \[8, 4\]"),
        ([specs[1], specs[0]], "'b.weight' was planned as"),
        ([specs[0]], "planned 1 tensors and .* written 2 tensors"),
        ([*specs, ("c.weight", (8,), F32)], "planned 3 tensors and .* written 2 tensors"),
    ]
    for wrong, message in others:
        with pytest.raises(FormatError, match=message):
            check_written(path, layout(KVS, wrong))
    path.write_bytes(path.read_bytes() + bytes(32))
    with pytest.raises(FormatError, match=r"planned 2 tensors and .* bytes, written 2 tensors and"):
        check_written(path, layout(KVS, specs))


def test_output_kvs(imatrix: Imatrix) -> None:
    kvs = output_kvs(KVS, 15, imatrix, "imatrix.gguf", Provenance("a" * 64, "b" * 64))
    assert list(kvs)[: len(KVS)] == list(KVS)
    values = {key: kv.value for key, kv in kvs.items()}
    assert values["general.file_type"] == 15
    assert values["general.quantization_version"] == 2
    # The keys that llama-quantize writes
    assert values["quantize.imatrix.file"] == "imatrix.gguf"
    assert values["quantize.imatrix.dataset"] == "text"
    assert values["quantize.imatrix.entries_count"] == 3
    assert values["quantize.imatrix.chunks_count"] == 1
    assert (values["mopeq.source.sha256"], values["mopeq.plan.sha256"]) == ("a" * 64, "b" * 64)
    assert not any(key.startswith("quantize.") for key in output_kvs(KVS, 0, None, "x", Provenance()))
    # A source's own file type is replaced, and the size is known before the hashes are.
    again = output_kvs(kvs, 10, imatrix, "imatrix.gguf", Provenance())
    assert len(layout(again, []).header) == len(layout(kvs, []).header)
    assert again["general.file_type"].value == 10
    assert len(again) == len(kvs)


def test_file_type() -> None:
    big, small = (256, 100), (256, 10)
    assert file_type_of([("a", big, BY_NAME["Q4_K"]), ("b", small, F32)]) == 15
    # By bytes, not by weights
    assert file_type_of([("a", (256, 30), BY_NAME["Q2_K"]), ("b", small, F32)]) == 0
    assert file_type_of([("a", small, BY_NAME["Q4_K"]), ("b", small, BY_NAME["Q4_K"]), ("c", small, F32)]) == 0
    # llama.cpp's names of the numbers, where gguf-py has them
    for name in QUANTIZABLE:
        known = {f"MOSTLY_{name}", f"MOSTLY_{name}_S", f"MOSTLY_{name}_M", f"MOSTLY_{name}_MOE"}
        if name not in ("Q1_0", "Q2_0"):
            assert gguf.LlamaFileType(FILE_TYPES[name]).name in known


@pytest.fixture(scope="module")
def model_imatrix(bf16_gguf: Path, calibration_text: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from mopeq_edge.runtime.tools import run_tool

    folder = tmp_path_factory.mktemp("imatrix")
    (folder / "text.txt").write_text(calibration_text[:8000], encoding="utf-8")
    options: list[str | Path] = ["-c", "128", "--chunks", "4", "--no-ppl", "-o", folder / "theirs.gguf"]
    run_tool("llama-imatrix", ["-m", bf16_gguf, "-f", folder / "text.txt", *options])
    write_imatrix(read_imatrix(folder / "theirs.gguf"), folder / "ours.gguf")
    return folder / "ours.gguf"


@pytest.fixture(scope="module")
def mixed(tiny_source: HuggingFaceSource) -> dict[str, GgmlType]:
    """Types for the bundled model, as mixed as a plan may be."""
    turn = ("Q2_K", "Q3_K", "Q4_K", "Q6_K", "IQ4_XS", "Q8_0", "BF16", "Q5_K", "Q4_0", "TQ2_0", "Q5_1")
    chosen = [t.name for t in tiny_source.tensors if t.quantizable]
    mix = {name: BY_NAME[turn[index % len(turn)]] for index, name in enumerate(chosen)}
    return {t.name: mix.get(t.name, t.type) for t in tiny_source.tensors}


@pytest.fixture(scope="module")
def mixed_gguf(
    tiny_source: HuggingFaceSource,
    mixed: dict[str, GgmlType],
    model_imatrix: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    path = tmp_path_factory.mktemp("mixed") / "out.gguf"
    imatrix, specs = read_imatrix(model_imatrix), [(t.name, t.shape, mixed[t.name]) for t in tiny_source.tensors]
    kvs = output_kvs(tiny_source.kvs, file_type_of(specs), imatrix, "imatrix.gguf", Provenance())
    ggml: Ggml = load_ggml()
    emit(tiny_source, mixed, kvs, imatrix, ggml, path, threads=2, progress=SilentProgress())
    return path


@pytest.mark.runtime
@pytest.mark.parametrize("file_type", ["Q2_K", "IQ4_NL"])
def test_llama_quantize_makes_the_same_of_our_plan(
    bf16_gguf: Path,
    mixed: dict[str, GgmlType],
    mixed_gguf: Path,
    model_imatrix: Path,
    tmp_path: Path,
    file_type: str,
) -> None:
    from mopeq_edge.runtime.tools import run_tool

    (tmp_path / "types.txt").write_text(tensor_type_lines({name: t.name for name, t in mixed.items()}))
    options: list[str | Path] = ["--imatrix", model_imatrix, "--tensor-type-file", tmp_path / "types.txt"]
    run_tool("llama-quantize", [*options, bf16_gguf, tmp_path / "theirs.gguf", file_type])
    theirs = {t.name: t for t in gguf.GGUFReader(tmp_path / "theirs.gguf").tensors}
    ours = {t.name: t for t in gguf.GGUFReader(mixed_gguf).tensors}
    assert theirs.keys() == ours.keys() == mixed.keys()
    for name, kind in mixed.items():
        assert theirs[name].tensor_type.name == ours[name].tensor_type.name == kind.name
        assert theirs[name].data.tobytes() == ours[name].data.tobytes(), f"{name} as {kind.name} differs"
    # Both say the same about the imatrix
    said = [read_header(path) for path in (tmp_path / "theirs.gguf", mixed_gguf)]
    for key in ("dataset", "entries_count", "chunks_count"):
        assert said[0].get(f"quantize.imatrix.{key}") == said[1].get(f"quantize.imatrix.{key}")


@pytest.mark.runtime
def test_llama_cpp_runs_it(mixed_gguf: Path, bf16_gguf: Path, evaluation_text: str) -> None:
    from mopeq_edge.binding import LlamaModel

    with LlamaModel(bf16_gguf, n_ctx=256, n_threads=2) as model:
        prompt = model.tokenize(evaluation_text[:300])
        wanted = model.logits(prompt)
    with LlamaModel(mixed_gguf, n_ctx=256, n_threads=2) as model:
        assert (model.tokenize(evaluation_text[:300]) == prompt).all()
        found = model.logits(prompt)
        generated = model.greedy(prompt, 8)
    assert len(generated) == 8
    assert all(0 <= token < found.shape[1] for token in generated)
    # Quantized, and still the same model
    assert np.isfinite(found).all()
    assert not np.array_equal(found, wanted)
    assert (found.argmax(axis=1) == wanted.argmax(axis=1)).mean() > 0.7


@pytest.mark.runtime
def test_a_type_that_needs_an_imatrix_entry(tmp_path: Path, imatrix: Imatrix) -> None:
    """libggml would end the process."""
    types = {**TYPES, "blk.0.attn_q.weight": BY_NAME["IQ2_XXS"]}
    without = Imatrix({k: v for k, v in imatrix.entries.items() if "attn_q" not in k}, ("text",), 1, 4)
    path, ggml = tmp_path / "out.gguf", load_ggml()
    for incomplete in (None, without):
        with pytest.raises(PlanError, match=r"blk\.0\.attn_q\.weight.*IQ2_XXS needs an imatrix"):
            emit(ArraySource(), types, KVS, incomplete, ggml, path, threads=1, progress=SilentProgress())
    assert list(tmp_path.iterdir()) == []
    emit(ArraySource(), types, KVS, imatrix, ggml, path, threads=1, progress=SilentProgress())
    assert path.is_file()
