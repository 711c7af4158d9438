"""The vocabularies of families that llama.cpp's converter derives from Llama: which of three it is, the files tell.

A ``tokenizer.model`` is SentencePiece's. Without one, a ``tokenizer.json`` may be a SentencePiece model in the words of
the ``tokenizers`` package: byte pairs with a token for every byte to fall back to. Everything else is byte-level BPE.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf

from converters.sentencepiece_model import FILE, Piece, SentencePieceModel, read_model
from converters.vocabulary import (
    NO_VOCABULARY,
    add_bpe_vocabulary,
    add_special_tokens,
    check_fits,
    is_byte_fallback,
    load_tokenizer,
    looks_special,
    special_tokens,
)
from mopeq_edge.errors import SourceError
from mopeq_edge.source.checkpoint import read_json_object

_GRANITE_SMALL, _CODE_LLAMA = 49152, 32016
"""Sizes of vocabularies for which llama.cpp's converter of the Llama kind has rules: never BOS; an end of turn."""
_CODE_LLAMA_EOT = 32010

_ADDED_SCORE, _UNUSED_SCORE = -1000.0, -10000.0
_BYTE = re.compile("<0x[0-9A-Fa-f]{2}>")
_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"
_USER_DEFINED, _CONTROL, _NORMAL = (
    int(kind) for kind in (gguf.TokenType.USER_DEFINED, gguf.TokenType.CONTROL, gguf.TokenType.NORMAL)
)


def add_llama_vocabulary(writer: Any, directory: Path, vocab_size: int, pre: str | None) -> None:
    """Add the vocabulary in ``directory``, filled up to ``vocab_size`` tokens, to a ``gguf.GGUFWriter``.

    Nothing with :data:`NO_VOCABULARY` for ``pre``. Raises :class:`SourceError` if there is none, it is damaged, does
    not fit the model, or llama.cpp would make other tokens of a text.
    """
    if pre == NO_VOCABULARY:
        return
    if (directory / "tekken.json").is_file() and not (directory / "tokenizer.json").is_file():
        raise SourceError(
            f"{directory}: its tokenizer is a tekken.json, expected tokenizer.model or tokenizer.json; "
            "add the tokenizer.json that transformers saves of it"
        )
    settings = _settings(directory)
    prefix = settings.get("add_prefix_space")
    add_bos = False if vocab_size == _GRANITE_SMALL else None
    model = read_model(directory / FILE) if (directory / FILE).is_file() else None
    if prefix is None and model is not None and not model.adds_prefix:
        # llama.cpp's converter does not look, and llama.cpp puts one there where a file says nothing
        prefix = False
    if prefix is not None:
        writer.add_add_space_prefix(prefix)
    if model is not None:
        _add_pieces(writer, directory, _sentencepiece(model, directory, settings, vocab_size), pre, add_bos)
    elif is_byte_fallback(directory):
        _add_pieces(writer, directory, _byte_fallback(directory, vocab_size), pre, add_bos)
    else:
        add_bpe_vocabulary(writer, directory, vocab_size, pre, add_bos=add_bos)
    if vocab_size == _CODE_LLAMA:
        writer.add_eot_token_id(_CODE_LLAMA_EOT)


def _add_pieces(writer: Any, directory: Path, pieces: list[Piece], pre: str | None, add_bos: bool | None) -> None:
    if pre is not None:
        raise SourceError(f"{directory}: its SentencePiece vocabulary has no pre-tokenizer; leave out the name '{pre}'")
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([piece.text for piece in pieces])
    writer.add_token_scores([piece.score for piece in pieces])
    writer.add_token_types([piece.type for piece in pieces])
    add_special_tokens(writer, special_tokens(directory, n_vocab=len(pieces)), add_bos)


def _sentencepiece(
    model: SentencePieceModel, directory: Path, settings: Mapping[str, Any], vocab_size: int
) -> list[Piece]:
    """The pieces of tokenizer.model, then what two other files add or replace; ids beyond the model's are dropped."""
    found = [*model.pieces[:vocab_size], *_unused(len(model.pieces), vocab_size)]
    path = directory / "added_tokens.json"
    for name, number in (read_json_object(path) if path.is_file() else {}).items():
        if _is_id(path, number) < vocab_size:
            found[number] = Piece(name, _ADDED_SCORE, _USER_DEFINED)
    path = directory / "tokenizer_config.json"
    added = settings.get("added_tokens_decoder", {})
    if not isinstance(added, dict):
        raise SourceError(f"{path}: its added_tokens_decoder is no object; download it again")
    for key, entry in added.items():
        number = _is_id(path, int(key) if key.isdecimal() else key)
        if not isinstance(entry, dict) or not isinstance(entry.get("content"), str):
            raise SourceError(f"{path}: added token {number} has no text; download it again")
        text = entry["content"]
        if number < vocab_size:
            control = bool(entry.get("special")) or looks_special(text)
            kind = _CONTROL if control else _USER_DEFINED
            found[number] = Piece(text if control else text.replace(_SPACE, " "), _ADDED_SCORE, kind)
    return found


def _byte_fallback(directory: Path, vocab_size: int) -> list[Piece]:
    """The tokens of tokenizer.json, as transformers loads it.

    llama.cpp merges by the scores of what comes out. Its converter gives all tokens one score, so the leftmost pair
    would go first; here a token's score is the rank of its first merge, as in the SentencePiece model behind it. It
    does not fill up the vocabulary either, and llama.cpp does not load a file whose embedding has further rows.
    """
    tokenizer = load_tokenizer(directory)
    check_fits(directory, tokenizer, vocab_size)
    scores = _merge_scores(directory)
    n_own, special = tokenizer.vocab_size, set(tokenizer.all_special_ids)
    found = _unused(0, vocab_size)
    for text, number in tokenizer.get_vocab().items():
        kind, score = _NORMAL, scores.get(text, _ADDED_SCORE)
        if number < n_own and _BYTE.fullmatch(text):
            kind = int(gguf.TokenType.BYTE)
        elif number in special:
            kind = _CONTROL
        elif number >= n_own:
            kind = _USER_DEFINED
        found[number] = Piece(text, score, kind)
    return found


def _merge_scores(directory: Path) -> dict[str, float]:
    """Score of every token that merges make."""
    path = directory / "tokenizer.json"
    scores: dict[str, float] = {}
    for merge in read_json_object(path)["model"].get("merges") or ():
        pair = merge.split(" ") if isinstance(merge, str) else merge
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(part, str) for part in pair):
            raise SourceError(f"{path}: has merge {str(merge)[:40]!r}, expected two tokens; download it again")
        scores.setdefault("".join(pair), -float(len(scores)))
    return scores


def _unused(first: int, vocab_size: int) -> list[Piece]:
    return [Piece(f"[PAD{n}]", _UNUSED_SCORE, int(gguf.TokenType.UNUSED)) for n in range(first, vocab_size)]


def _is_id(path: Path, found: object) -> int:
    if type(found) is not int or found < 0:
        raise SourceError(f"{path}: has token id {str(found)[:40]!r}, expected a whole number; download it again")
    return found


def _settings(directory: Path) -> Mapping[str, Any]:
    path = directory / "tokenizer_config.json"
    return read_json_object(path) if path.is_file() else {}
