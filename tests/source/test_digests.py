"""The digest that names a source by its content, and the cache that remembers it."""

import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest

import mopeq_edge.source.digests as digests_module
from converters import CONVERTERS
from mopeq_edge.artifacts import file_digest
from mopeq_edge.source.digests import Digests
from mopeq_edge.source.huggingface import HuggingFaceSource

from ..builders import build_olmoe


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
    assert Digests().of_source(checkpoint) == expected


def test_digest_is_of_the_content(checkpoint: HuggingFaceSource, tmp_path: Path) -> None:
    before = Digests().of_source(checkpoint)
    other = Path(shutil.copytree(checkpoint.path, tmp_path / "other"))
    assert Digests().of_source(HuggingFaceSource(other, CONVERTERS["OlmoeForCausalLM"], "gpt-2")) == before
    with (other / "tokenizer.json").open("a") as file:
        file.write("\n")
    assert Digests().of_source(HuggingFaceSource(other, CONVERTERS["OlmoeForCausalLM"], "gpt-2")) != before


def test_digest_is_remembered(checkpoint: HuggingFaceSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[str] = []
    real = file_digest

    def counting(path: Path) -> str:
        hashed.append(path.name)
        return real(path)

    monkeypatch.setattr(digests_module, "file_digest", counting)
    cache = tmp_path / "cache" / "digests.json"
    plain = Digests().of_source(checkpoint)
    assert Digests(cache).of_source(checkpoint) == plain
    hashed.clear()
    assert Digests(cache).of_source(checkpoint) == plain
    assert hashed == []
    config = checkpoint.path / "config.json"
    config.write_text(config.read_text() + " ")
    changed = Digests(cache).of_source(checkpoint)
    assert changed == Digests().of_source(checkpoint) != plain
    assert hashed[0] == "config.json"
    assert len(json.loads(cache.read_text())["files"]) == 6
    # Same size and time, another file
    text = config.read_text()
    times = config.stat()
    (checkpoint.path / "new").write_text(text.replace("true", "TRUE", 1))
    os.utime(checkpoint.path / "new", ns=(times.st_atime_ns, times.st_mtime_ns))
    (checkpoint.path / "new").replace(config)
    assert Digests(cache).of_source(checkpoint) != changed


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": 2, "files": {}}', '{"format": 1, "files": {"a": 1}}'])
def test_a_bad_cache_is_ignored(checkpoint: HuggingFaceSource, tmp_path: Path, text: str) -> None:
    cache = tmp_path / "digests.json"
    cache.write_text(text)
    assert Digests(cache).of_source(checkpoint) == Digests().of_source(checkpoint)
    assert json.loads(cache.read_text())["format"] == 1


def test_a_cache_that_cannot_be_written(checkpoint: HuggingFaceSource, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert Digests(tmp_path / "file" / "cache.json").of_source(checkpoint) == Digests().of_source(checkpoint)
