"""Which source a path is, what is refused, and the digest that names a source by its content."""

from pathlib import Path

import pytest

from converters import CONVERTERS
from mopeq_edge.errors import FormatError, SourceError
from mopeq_edge.ggml.types import F32
from mopeq_edge.gguf_layout import string, uint32
from mopeq_edge.source.open import open_source

from ..builders import write_raw_gguf


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
