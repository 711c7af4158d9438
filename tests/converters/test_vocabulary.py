"""Tokens and their types: what only a tokenizer with odd tokens shows. llama.cpp's own answer is compared elsewhere."""

import shutil
from pathlib import Path

import gguf
import pytest
from tokenizers import AddedToken

from converters.vocabulary import add_bpe_vocabulary, load_tokenizer, tokens_and_types
from mopeq_edge.errors import SourceError

from ..builders import edit_json


@pytest.fixture
def directory(tiny_model: Path, tmp_path: Path) -> Path:
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        shutil.copy(tiny_model / name, tmp_path / name)
    return tmp_path


def added(directory: Path) -> gguf.GGUFWriter:
    writer = gguf.GGUFWriter(path=None, arch="olmoe")
    add_bpe_vocabulary(writer, directory, 4096, "gpt-2")
    return writer


def test_types(directory: Path) -> None:
    tokenizer = load_tokenizer(directory)
    tokenizer.add_tokens([AddedToken("<|end of turn|>", normalized=False), AddedToken("two▁words", normalized=False)])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<special>"]})
    tokens, types = tokens_and_types(tokenizer, 4101)
    assert tokens[:2] == ["<|endoftext|>", "!"]
    assert types[:2] == [gguf.TokenType.CONTROL, gguf.TokenType.NORMAL]
    assert tokens[4096:] == ["<|end of turn|>", "two words", "<special>", "[PAD4099]", "[PAD4100]"]
    assert types[4096:] == [
        *(gguf.TokenType.CONTROL, gguf.TokenType.USER_DEFINED, gguf.TokenType.CONTROL),
        *(gguf.TokenType.UNUSED, gguf.TokenType.UNUSED),
    ]
    assert set(types[1:4096]) == {gguf.TokenType.NORMAL}


def test_a_tokenizer_of_another_model(directory: Path) -> None:
    writer = gguf.GGUFWriter(path=None, arch="olmoe")
    with pytest.raises(SourceError, match=r"the tokenizer has a token 4095, but config.json has vocab_size 4000"):
        add_bpe_vocabulary(writer, directory, 4000, "gpt-2")


def test_no_tokenizer(directory: Path) -> None:
    (directory / "tokenizer.json").write_text("{")
    with pytest.raises(SourceError, match="its tokenizer cannot be loaded") as caught:
        added(directory)
    assert "\n" not in str(caught.value)
    (directory / "tokenizer.json").unlink()
    with pytest.raises(SourceError, match="its tokenizer cannot be loaded"):
        added(directory)


def test_tokenizer_json_decides_what_is_added(directory: Path) -> None:
    edit_json(directory / "tokenizer_config.json", add_bos_token=True)
    assert added(directory).kv_data[0]["tokenizer.ggml.add_bos_token"].value is True
    byte_level = {"type": "ByteLevel", "trim_offsets": True, "add_prefix_space": False, "use_regex": True}
    edit_json(directory / "tokenizer.json", post_processor=byte_level)
    kvs = added(directory).kv_data[0]
    assert kvs["tokenizer.ggml.add_bos_token"].value is False
    assert kvs["tokenizer.ggml.add_eos_token"].value is False


def test_a_special_token_that_cannot_be(directory: Path) -> None:
    edit_json(directory / "tokenizer_config.json", bos_token=None)
    edit_json(directory / "config.json", bos_token_id=-1)
    with pytest.raises(SourceError, match="its special tokens cannot be read"):
        added(directory)
