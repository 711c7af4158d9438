"""Text in and out: special tokens, letters beyond ASCII."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from mopeq_edge.gguf_file import GGUFHeader
from runtime_tests.prompts import NON_ASCII, TEXT
from runtime_tests.vocabulary import Vocabulary

CONTROL = 3
"""``tokenizer.ggml.token_type`` of a token that is no text."""

MOST_SPECIAL = 64


def test_text_comes_back(vocabulary: Vocabulary, record: Callable[..., None]) -> None:
    for text in (TEXT, NON_ASCII):
        found = vocabulary.tokenize(text)
        # some vocabularies begin every text with a space
        assert vocabulary.detokenize(found).lstrip(" ") == text
    record(non_ascii_tokens_count=len(found))


def test_special_tokens_are_one_token(vocabulary: Vocabulary, header: GGUFHeader) -> None:
    """Where they are asked for; written by a user they are text."""
    names, kinds = header.get("tokenizer.ggml.tokens"), header.get("tokenizer.ggml.token_type")
    if names is None or kinds is None:
        pytest.skip("the file has no vocabulary, or does not say which tokens are special")
    special = [number for number, kind in enumerate(kinds) if kind == CONTROL]
    if not special:
        pytest.skip("the vocabulary has no special tokens")
    for number in special[:MOST_SPECIAL]:
        assert number in vocabulary.tokenize(names[number], parse_special=True).tolist(), names[number]
        assert number not in vocabulary.tokenize(names[number], parse_special=False).tolist(), names[number]


def test_a_text_begins_as_the_file_says(vocabulary: Vocabulary, header: GGUFHeader) -> None:
    adds, bos = header.get("tokenizer.ggml.add_bos_token"), header.get("tokenizer.ggml.bos_token_id")
    if adds is None or bos is None:
        pytest.skip("the file does not say whether texts begin with a BOS token")
    begins = vocabulary.tokenize(TEXT, add_special=True).tolist()[0] == bos
    assert begins == bool(adds)
