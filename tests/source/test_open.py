"""Which source a path is, what is refused, and the digest that names a source by its content."""

import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest

import mopeq_edge.source.open as open_module
from converters import CONVERTERS
from mopeq_edge.artifacts import file_digest
from mopeq_edge.errors import FormatError, SourceError
from mopeq_edge.ggml.types import F32
from mopeq_edge.gguf_layout import string, uint32
from mopeq_edge.source.huggingface import HuggingFaceSource
from mopeq_edge.source.open import open_source, source_files_digest

from ..builders import build_olmoe, write_raw_gguf


def test_directory_and_file(tiny_model: Path, bf16_gguf: Path) -> None:
    checkpoint = open_source(tiny_model, CONVERTERS, pre="gpt-2")
    model = open_source(bf16_gguf, CONVERTERS)
    assert (checkpoint.kind, model.kind) == ("huggingface", "gguf")
    assert checkpoint.tensors == model.tensors
    assert list(checkpoint.kvs) == list(model.kvs)


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="nowhere: does not exist; give the directory"):
        open_source(tmp_path / "nowhere", CONVERTERS)
    with pytest.raises(SourceError, match=r"has no config.json"):
        open_source(tmp_path, CONVERTERS)


def test_no_model_file(tmp_path: Path, bf16_gguf: Path) -> None:
    (tmp_path / "text.txt").write_text("hello")
    with pytest.raises(FormatError, match="not a GGUF file"):
        open_source(tmp_path / "text.txt", CONVERTERS)
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(SourceError, match=r"give the directory that has its config.json too"):
        open_source(tmp_path / "model.safetensors", CONVERTERS)
    with pytest.raises(SourceError, match="names its own pre-tokenizer; leave out the name 'olmo'"):
        open_source(bf16_gguf, CONVERTERS, pre="olmo")


def test_dense_gguf(tmp_path: Path) -> None:
    kvs = {"general.architecture": string("llama"), "llama.block_count": uint32(1)}
    write_raw_gguf(tmp_path / "m.gguf", kvs, [("blk.0.ffn_up.weight", (2, 2), F32, bytes(16))])
    with pytest.raises(SourceError, match=r"a dense model \(llama, no experts found\).* use llama-quantize"):
        open_source(tmp_path / "m.gguf", CONVERTERS)


@pytest.fixture
def checkpoint(tmp_path: Path) -> HuggingFaceSource:
    directory = build_olmoe(tmp_path / "model", n_layer=1, n_shards=2)
    (directory / "notes.txt").write_text("not read")
    return HuggingFaceSource(directory, CONVERTERS["OlmoeForCausalLM"], "gpt-2")


def test_files(checkpoint: HuggingFaceSource) -> None:
    assert {path.name for path in checkpoint.files} == {
        *("config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors.index.json"),
        *("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"),
    }


def test_digest_is_that_of_sha256sum(checkpoint: HuggingFaceSource) -> None:
    lines = [
        f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n" for path in sorted(checkpoint.path.iterdir())
    ]
    expected = hashlib.sha256("".join(line for line in lines if "notes.txt" not in line).encode()).hexdigest()
    assert source_files_digest(checkpoint) == expected


def test_digest_is_of_the_content(checkpoint: HuggingFaceSource, tmp_path: Path) -> None:
    before = source_files_digest(checkpoint)
    other = Path(shutil.copytree(checkpoint.path, tmp_path / "other"))
    assert source_files_digest(HuggingFaceSource(other, CONVERTERS["OlmoeForCausalLM"], "gpt-2")) == before
    with (other / "tokenizer.json").open("a") as file:
        file.write("\n")
    assert source_files_digest(HuggingFaceSource(other, CONVERTERS["OlmoeForCausalLM"], "gpt-2")) != before


def test_digest_is_remembered(checkpoint: HuggingFaceSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[str] = []
    real = file_digest

    def counting(path: Path) -> str:
        hashed.append(path.name)
        return real(path)

    monkeypatch.setattr(open_module, "file_digest", counting)
    cache = tmp_path / "cache" / "digests.json"
    plain = source_files_digest(checkpoint)
    assert source_files_digest(checkpoint, cache) == plain
    hashed.clear()
    assert source_files_digest(checkpoint, cache) == plain
    assert hashed == []
    config = checkpoint.path / "config.json"
    config.write_text(config.read_text() + " ")
    changed = source_files_digest(checkpoint, cache)
    assert changed == source_files_digest(checkpoint) != plain
    assert hashed[0] == "config.json"
    assert len(json.loads(cache.read_text())["files"]) == 6
    # Same size and time, another file
    text = config.read_text()
    times = config.stat()
    (checkpoint.path / "new").write_text(text.replace("true", "TRUE", 1))
    os.utime(checkpoint.path / "new", ns=(times.st_atime_ns, times.st_mtime_ns))
    (checkpoint.path / "new").replace(config)
    assert source_files_digest(checkpoint, cache) != changed


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": 2, "files": {}}', '{"format": 1, "files": {"a": 1}}'])
def test_a_bad_cache_is_ignored(checkpoint: HuggingFaceSource, tmp_path: Path, text: str) -> None:
    cache = tmp_path / "digests.json"
    cache.write_text(text)
    assert source_files_digest(checkpoint, cache) == source_files_digest(checkpoint)
    assert json.loads(cache.read_text())["format"] == 1


def test_a_cache_that_cannot_be_written(checkpoint: HuggingFaceSource, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert source_files_digest(checkpoint, tmp_path / "file" / "cache.json") == source_files_digest(checkpoint)
