"""The name of the pre-tokenizer: given, from llama.cpp's table, by definition, or an error."""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import pytest

import converters.pre_tokenizer as module
from converters.pre_tokenizer import TABLE, pre_tokenizer_name, read_known_tokenizers, why_not_plain
from mopeq_edge.errors import RuntimeMissingError, SourceError
from mopeq_edge.runtime.locate import Runtime, require_runtime

BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
PLAIN: dict[str, Any] = {"normalizer": None, "pre_tokenizer": BYTE_LEVEL, "model": {"type": "BPE", "vocab": {}}}

# The shape of llama.cpp's function, with a table of our own; running it would raise
SCRIPT = """
raise SystemExit("was run")

class TextModel:
    def get_vocab_base_pre(self, tokenizer) -> str:
        chktxt = "caf\\u00e9 \\U0001f680 'll"
        chktok = tokenizer.encode(chktxt)
        chkhsh = sha256(str(chktok).encode()).hexdigest()
        res = None
        if chkhsh == "HASH":
            # who uses it
            res = "first"
        if chkhsh == "{two}":
            res = "second"
        if res is None:
            raise NotImplementedError("unknown")
        return res

    def other(self):
        if chkhsh == "{three}":
            res = "third"
"""


class Words:
    """Encodes every text as its length."""

    def encode(self, text: str) -> list[int]:
        return [len(text), 7]


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A runtime whose table knows what ``Words`` makes of the text, 9 characters."""
    runtime = Runtime("0", "stock", tmp_path / "runtime")
    table = runtime.convert / TABLE
    table.parent.mkdir(parents=True)
    table.write_text(SCRIPT.replace("HASH", hashlib.sha256(b"[10, 7]").hexdigest()))
    monkeypatch.setattr(module, "find_runtime", lambda: runtime)
    return table


def directory_with(tmp_path: Path, **changes: Any) -> Path:
    (tmp_path / "tokenizer.json").write_text(json.dumps({**PLAIN, **changes}))
    return tmp_path


def test_the_table_is_read_not_run(installed: Path) -> None:
    known = read_known_tokenizers(installed)
    assert known.text == "caf\u00e9 \U0001f680 'll"
    assert list(known.name_of.values()) == ["first", "second"]
    assert known.name_of["{two}"] == "second"


def test_known_to_llama_cpp(installed: Path, tmp_path: Path) -> None:
    assert pre_tokenizer_name(directory_with(tmp_path), Words()) == "first"


def test_given_by_the_user(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(module, "find_runtime", lambda: None)
    assert pre_tokenizer_name(tmp_path, Words(), "olmo") == "olmo"


def test_plain_byte_level(installed: Path, tmp_path: Path) -> None:
    installed.write_text(SCRIPT)
    assert pre_tokenizer_name(directory_with(tmp_path), Words()) == "gpt-2"


def test_unknown(installed: Path, tmp_path: Path) -> None:
    installed.write_text(SCRIPT)
    digest = hashlib.sha256(b"[10, 7]").hexdigest()
    directory = directory_with(tmp_path, normalizer={"type": "NFC"})
    with pytest.raises(SourceError, match=rf"hash {digest}, .* \(normalizer NFC\); .* --pre NAME"):
        pre_tokenizer_name(directory, Words())


def test_no_runtime(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without the table a plain byte-level tokenizer could be one that llama.cpp calls otherwise."""
    monkeypatch.setattr(module, "find_runtime", lambda: None)
    with pytest.raises(RuntimeMissingError, match=r"run: mopeq-edge runtime install, or give the name with --pre NAME"):
        pre_tokenizer_name(directory_with(tmp_path), Words())


@pytest.mark.parametrize("text", ["", "def get_vocab_base_pre(): pass", "def", "\0"])
def test_no_table(installed: Path, text: str, tmp_path: Path) -> None:
    installed.write_text(text)
    with pytest.raises(RuntimeMissingError, match=r"base.py: .*mopeq-edge runtime install --force"):
        pre_tokenizer_name(tmp_path, Words())
    installed.unlink()
    with pytest.raises(RuntimeMissingError, match="cannot be read"):
        pre_tokenizer_name(tmp_path, Words())


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False}},
        {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [BYTE_LEVEL]}},
        {"normalizer": {"type": "Sequence", "normalizers": []}},
    ],
)
def test_plain(tmp_path: Path, changes: dict[str, Any]) -> None:
    assert why_not_plain(directory_with(tmp_path, **changes)) is None


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"normalizer": {"type": "Sequence", "normalizers": [{"type": "NFKC"}]}}, "normalizer NFKC"),
        ({"pre_tokenizer": None}, "pre-tokenizer none"),
        ({"pre_tokenizer": {**BYTE_LEVEL, "type": "Metaspace"}}, "pre-tokenizer Metaspace"),
        (
            {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "Split"}, BYTE_LEVEL]}},
            "pre-tokenizer Split + ByteLevel",
        ),
        ({"pre_tokenizer": {**BYTE_LEVEL, "use_regex": False}}, "does not split like GPT-2's"),
        ({"pre_tokenizer": {**BYTE_LEVEL, "add_prefix_space": True}}, "does not split like GPT-2's"),
        ({"model": {"type": "Unigram"}}, "model Unigram"),
        ({"model": {"type": "BPE", "ignore_merges": True}}, "ignore_merges True"),
        ({"model": None}, "model None"),
    ],
)
def test_not_plain(tmp_path: Path, changes: dict[str, Any], problem: str) -> None:
    found = why_not_plain(directory_with(tmp_path, **changes))
    assert found is not None
    assert problem in found


def test_no_tokenizer_json(tmp_path: Path) -> None:
    assert why_not_plain(tmp_path) == "it has no tokenizer.json"


@pytest.mark.runtime
def test_the_table_of_the_installed_llama_cpp(tiny_model: Path) -> None:
    """Every comparison in the file is found, and the bundled tokenizer is in none of them."""
    path = require_runtime().convert / TABLE
    known = read_known_tokenizers(path)
    assert len(known.name_of) == len(set(re.findall(r'chkhsh == "([0-9a-f]{64})"', path.read_text(encoding="utf-8"))))
    assert {"olmo", "qwen2", "deepseek-llm", "llama-bpe", "gpt-2"} <= set(known.name_of.values())
    assert "\N{ROCKET} (normal)" in known.text
    from transformers import AutoTokenizer

    assert pre_tokenizer_name(tiny_model, AutoTokenizer.from_pretrained(tiny_model)) == "gpt-2"
