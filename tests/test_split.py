"""Split GGUFs: read as gguf-py writes them, written as llama.cpp loads them, every file within its limit."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

import mopeq_edge.atomic as atomic_module
from converters import CONVERTERS
from mopeq_edge.emit import emit
from mopeq_edge.errors import FormatError, OutputError, PlanError, SourceError
from mopeq_edge.ggml.library import load_ggml
from mopeq_edge.ggml.types import BY_NAME, GgmlType
from mopeq_edge.gguf_file import KV, ValueType, read_header
from mopeq_edge.gguf_layout import layout, uint32
from mopeq_edge.progress import SilentProgress
from mopeq_edge.source.gguf import GGUFSource
from mopeq_edge.source.huggingface import HuggingFaceSource
from mopeq_edge.source.open import open_source
from mopeq_edge.split import check_parts, gguf_parts, parse_size, part_paths, split_kvs, split_layouts

from .builders import EXAMPLE_TEXT, write_gguf, write_raw_gguf
from .commands import run_json

LIMIT = 4_000_000


@pytest.fixture(scope="module")
def theirs(bf16_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model split by gguf-py into files of at most 6 MB of tensors; the first file."""
    reader = gguf.GGUFReader(bf16_gguf)
    writer = gguf.GGUFWriter(None, "olmoe", split_max_size=6_000_000)
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name == "general.architecture":
            continue
        sub = field.types[1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, field.contents(), field.types[0], sub)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    path = tmp_path_factory.mktemp("split") / "model.gguf"
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = sorted(path.parent.iterdir())
    assert len(found) > 3
    return found[0]


def copied(theirs: Path, folder: Path) -> list[Path]:
    shutil.copytree(theirs.parent, folder)
    return sorted(folder.iterdir())


def same_weights(one: GGUFSource, other: GGUFSource) -> None:
    assert one.tensors == other.tensors
    for tensor in one.tensors:
        for matrix in range(tensor.n_matrices):
            assert np.array_equal(one.read_stored(tensor, matrix), other.read_stored(tensor, matrix))


def test_read_like_the_whole_file(theirs: Path, bf16_gguf: Path) -> None:
    split, whole = open_source(theirs, CONVERTERS), GGUFSource(bf16_gguf)
    assert isinstance(split, GGUFSource)
    assert split.files == tuple(sorted(theirs.parent.iterdir()))
    assert dict(split.kvs) == dict(whole.kvs)
    same_weights(split, whole)


def test_the_same_headers_as_gguf_py(theirs: Path) -> None:
    """Tensors, key-values and their types; the number of files, and where they begin, given."""
    headers = [read_header(path) for path in gguf_parts(theirs)]
    n_tensors = sum(len(header.tensors) for header in headers)
    for at, header in enumerate(headers):
        kvs = {key: kv for key, kv in header.kvs.items() if not key.startswith("split.")}
        assert bool(kvs) == (at == 0)
        mine = {**kvs, **split_kvs(at, len(headers), n_tensors)}
        assert mine == header.kvs
        place = layout(mine, [(i.name, i.shape, i.type) for i in header.tensors])
        assert place.tensors == header.tensors
        assert place.file_size == header.file_size


def test_one_file_of_one(tmp_path: Path, bf16_gguf: Path) -> None:
    whole = GGUFSource(bf16_gguf)
    kvs = {**whole.kvs, **split_kvs(0, 1, len(whole.tensors))}
    raws = {t.name: b"".join(whole.read_stored(t, m).tobytes() for m in range(t.n_matrices)) for t in whole.tensors}
    write_raw_gguf(tmp_path / "m.gguf", kvs, [(t.name, t.shape, t.type, raws[t.name]) for t in whole.tensors])
    assert dict(GGUFSource(tmp_path / "m.gguf").kvs) == dict(whole.kvs)


def test_files_that_do_not_belong_together(theirs: Path, tmp_path: Path) -> None:
    parts = copied(theirs, tmp_path / "in")
    with pytest.raises(
        SourceError, match=r"is file 1 \(from 0\) of \d of a split GGUF; give the first, model-00001-of-"
    ):
        GGUFSource(parts[1])
    parts[0].rename(tmp_path / "in" / "first.gguf")
    with pytest.raises(SourceError, match=r"expected a name that ends in -00001-of-"):
        GGUFSource(tmp_path / "in" / "first.gguf")
    (tmp_path / "in" / "first.gguf").rename(parts[0])
    third = parts[2].read_bytes()
    parts[2].write_bytes(parts[1].read_bytes())
    with pytest.raises(FormatError, match=rf"{parts[2].name}: is file 1 of .* by its own word, expected 2 of"):
        GGUFSource(parts[0])
    parts[2].write_bytes(third[:-40])
    with pytest.raises(FormatError, match=rf"{parts[2].name}: truncated"):
        GGUFSource(parts[0])
    parts[2].unlink()
    with pytest.raises(SourceError, match=rf"{parts[2].name} is missing beside it; download it too"):
        GGUFSource(parts[0])


def test_tensors_that_are_twice_or_missing(tmp_path: Path) -> None:
    first, second = part_paths(tmp_path / "m.gguf", 2)
    kind = BY_NAME["F32"]

    def write(path: Path, number: int, *names: str) -> None:
        write_raw_gguf(path, split_kvs(number, 2, 2), [(name, (2,), kind, bytes(8)) for name in names])

    write(first, 0, "a")
    for names, said in (
        (("a",), "have tensor 'a' twice"),
        (("b", "c"), "have 3 tensors, expected 2"),
        ((), "1 tensors"),
    ):
        write(second, 1, *names)
        with pytest.raises(FormatError, match=said):
            GGUFSource(first)


def test_layouts_by_brute_force(tiny_source: HuggingFaceSource) -> None:
    """No file beyond the limit, none that could have taken the next tensor too, all tensors in their order."""
    kvs: dict[str, KV] = {**tiny_source.kvs, "general.alignment": uint32(64)}
    specs = [(t.name, t.shape, BY_NAME["Q8_0"] if t.quantizable else t.type) for t in tiny_source.tensors]
    whole = layout(kvs, specs).file_size
    for limit in (1_114_368, 1_234_567, LIMIT, whole + 200):
        places = split_layouts(kvs, specs, limit)
        assert [info.name for place in places for info in place.tensors] == [name for name, *_ in specs]
        at = 0
        for number, place in enumerate(places):
            assert place.file_size <= limit
            assert place.alignment == 64
            at += len(place.tensors)
            if at < len(specs):
                head = kvs if number == 0 else {"general.alignment": kvs["general.alignment"]}
                more = [*((i.name, i.shape, i.type) for i in place.tensors), specs[at]]
                assert layout({**head, **split_kvs(number, len(places), len(specs))}, more).file_size > limit
    assert len(split_layouts(kvs, specs, whole + 200)) == 1


def test_limits_that_are_too_small(tiny_source: HuggingFaceSource) -> None:
    specs = [(t.name, t.shape, t.type) for t in tiny_source.tensors]
    with pytest.raises(PlanError, match="the header with the vocabulary alone needs a file of"):
        split_layouts(tiny_source.kvs, specs, 10_000)
    with pytest.raises(PlanError, match=r"tensor '.*' \(BF16\) alone needs a file of \d+ bytes; raise the size"):
        split_layouts(tiny_source.kvs, specs, 300_000)


@pytest.mark.parametrize(
    ("text", "size"), [("1", 1), ("4096", 4096), ("12K", 12_000), ("250M", 250_000_000), ("4g", 4 * 10**9)]
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "0", "M", "-1M", "1.5G", "1T", "1 M", "٣M"])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(PlanError, match="--split-max-size"):
        parse_size(text)


def types_of(source: HuggingFaceSource, name: str = "Q4_K") -> dict[str, GgmlType]:
    return {t.name: BY_NAME[name] if t.quantizable else t.type for t in source.tensors}


def write(source: HuggingFaceSource, path: Path, limit: int | None = LIMIT, **kinds: Any) -> int:
    types = {**types_of(source), **kinds}
    progress = SilentProgress()
    return emit(source, types, source.kvs, None, load_ggml(), path, threads=2, progress=progress, split_bytes=limit)


@pytest.mark.runtime
def test_written_split_is_the_whole_file_in_pieces(tiny_source: HuggingFaceSource, tmp_path: Path) -> None:
    from mopeq_edge.binding import LlamaModel

    whole = tmp_path / "whole.gguf"
    write(tiny_source, whole, None)
    (tmp_path / "parts").mkdir()
    size = write(tiny_source, tmp_path / "parts" / "out.gguf", LIMIT)
    parts = sorted((tmp_path / "parts").iterdir())
    assert parts == part_paths(tmp_path / "parts" / "out.gguf", len(parts))
    assert len(parts) >= 3
    assert sum(part.stat().st_size for part in parts) == size
    assert max(part.stat().st_size for part in parts) <= LIMIT
    merged = tmp_path / "merged.gguf"
    write_gguf(GGUFSource(parts[0]), merged)
    assert merged.read_bytes() == whole.read_bytes()
    tokens = np.arange(40, 90).tolist()
    found = []
    for path in (whole, parts[0]):
        with LlamaModel(path, n_threads=1) as llama:
            found.append(llama.logits(tokens))
    assert np.array_equal(*found)


@pytest.mark.runtime
@pytest.mark.parametrize("renames", [0, 1, 2])
def test_all_files_or_none(
    tiny_source: HuggingFaceSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, renames: int
) -> None:
    """The disk fails after some files have their names: they go again. The first comes last."""
    done: list[str] = []
    real = atomic_module.os.replace

    def failing(old: Path, new: Path) -> None:
        if len(done) == renames:
            raise OSError(28, "No space left on device", str(new))
        real(old, new)
        done.append(Path(new).name)

    monkeypatch.setattr(atomic_module.os, "replace", failing)
    (tmp_path / "out").mkdir()
    with pytest.raises(OutputError, match="cannot be written"):
        write(tiny_source, tmp_path / "out" / "out.gguf")
    assert list((tmp_path / "out").iterdir()) == []
    assert not any("-00001-of-" in name for name in done)


@pytest.mark.runtime
def test_an_error_leaves_nothing(
    tiny_source: HuggingFaceSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    last = tiny_source.tensors[-2].name
    real = HuggingFaceSource.read

    def read(self: HuggingFaceSource, tensor: Any, *args: Any) -> Any:
        if tensor.name == last:
            raise SourceError("broken")
        return real(self, tensor, *args)

    monkeypatch.setattr(HuggingFaceSource, "read", read)
    (tmp_path / "out").mkdir()
    with pytest.raises(SourceError, match="broken"):
        write(tiny_source, tmp_path / "out" / "out.gguf", **{last: BY_NAME["Q4_0"]})
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.runtime
def test_from_split_to_split(theirs: Path, tmp_path: Path) -> None:
    """The commands: a split GGUF in, a split one out, evaluated in llama.cpp; plan and emit make the same files."""

    out, work = tmp_path / "out.gguf", ("--work-dir", tmp_path / "work", "--threads", 2, "--json")
    asked = ("--target-gb", 0.008, "--types", "Q3_K,Q5_K")
    options = ("--text", EXAMPLE_TEXT, "--window", 64, "--chunks", 2, "--sample-rows", 4)
    found = run_json("convert", theirs, out, "--no-report", *asked, "--split-max-size", "3M", *options, *work)
    parts = part_paths(out, found["output_files"])
    assert len(parts) >= 3
    assert found["output"] == parts[0].name
    sizes = [part.stat().st_size for part in parts]
    assert max(sizes) <= 3_000_000
    assert sum(sizes) == found["file_bytes"] == found["predicted_file_bytes"] == found["evaluation"]["target_bytes"]
    assert sum(sizes) <= 8_000_000
    assert run_json("validate", parts[0], "--json")["file_bytes"] == sum(sizes)
    again = tmp_path / "again.gguf"
    assert run_json("plan", theirs, *asked, "--split-max-size", "3000K", *work)["file_bytes"] == sum(sizes)
    emitted = run_json("emit", theirs, again, "--split-max-size", "3M", *work)
    assert (emitted["file_bytes"], emitted["output_files"]) == (sum(sizes), len(parts))
    assert [part.read_bytes() for part in parts] == [part.read_bytes() for part in part_paths(again, len(parts))]
    with pytest.raises(OutputError, match=r"again-00001-of-0000\d.gguf: exists already"):
        run_json("emit", theirs, again, "--split-max-size", "4M", *work)
    # a plan that fills its budget as one file does not fit it as several
    whole = run_json("plan", theirs, *asked, *work)
    exact = whole["file_bytes"] / 1e9
    assert (
        run_json("plan", theirs, "--target-gb", f"{exact:.9f}", *asked[2:], *work)["file_bytes"] == whole["file_bytes"]
    )
    with pytest.raises(PlanError, match="plan again with the same --split-max-size"):
        run_json("emit", theirs, tmp_path / "third.gguf", "--split-max-size", "3M", *work)
    assert not list(tmp_path.glob("third*"))


def test_what_is_there_is_not_written_over(tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    check_parts(out, [], force=False)
    for name in ("out-00001-of-00003.txt", "other-00001-of-00002.gguf", "out.gguf"):
        (tmp_path / name).touch()
    check_parts(out, [], force=False)
    there = tmp_path / "out-00002-of-00007.gguf"
    there.touch()
    with pytest.raises(OutputError, match=r"out-00002-of-00007.gguf: exists already"):
        check_parts(out, [], force=False)
    check_parts(out, [], force=True)
    with pytest.raises(OutputError, match=r"out-00002-of-00007.gguf: is the input"):
        check_parts(out, [there], force=True)


def test_keys_have_the_types_of_llama_cpp() -> None:
    kinds = {key: kv.type for key, kv in split_kvs(1, 2, 3).items()}
    assert kinds == {
        gguf.Keys.Split.LLM_KV_SPLIT_NO: ValueType.UINT16,
        gguf.Keys.Split.LLM_KV_SPLIT_COUNT: ValueType.UINT16,
        gguf.Keys.Split.LLM_KV_SPLIT_TENSORS_COUNT: ValueType.INT32,
    }
