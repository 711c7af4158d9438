"""``tokenizer.model``: the pieces of a SentencePiece model, and how it cuts text, as far as llama.cpp can do the same.

Pieces come from the ``sentencepiece`` package. It does not tell how a model was trained and normalizes text, so that is
read from the file: a protocol buffer, of which only the few fields below matter (``sentencepiece_model.proto``).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf

from mopeq_edge.errors import SourceError

FILE = "tokenizer.model"

_TRAINER, _NORMALIZER = 2, 3
_KIND, _AS_SUFFIX = 3, 24
_CHARACTER_MAP, _PREFIX, _REMOVES_SPACES = 2, 3, 4
_KINDS: Mapping[int, str] = {1: "unigram", 2: "BPE", 3: "word", 4: "character"}
_BPE = 2
_N_BYTES = 256


@dataclass(frozen=True)
class Piece:
    """Text, score (higher ones are merged first) and ``gguf.TokenType`` of one token."""

    text: str
    score: float
    type: int


@dataclass(frozen=True)
class SentencePieceModel:
    """Pieces by their ids, and whether a space is put before a text."""

    pieces: tuple[Piece, ...]
    adds_prefix: bool


def read_model(path: Path) -> SentencePieceModel:
    """Read ``path``. Raises :class:`SourceError` if it is damaged, or cuts text in a way that llama.cpp cannot."""
    try:
        from sentencepiece import SentencePieceProcessor
    except ImportError:
        raise SourceError(f"{path}: reading it needs sentencepiece; run: pip install 'mopeq-edge[calibrate]'") from None
    try:
        data = path.read_bytes()
        if not data:
            raise ValueError("it is empty")
        processor = SentencePieceProcessor(model_proto=data)
        pieces = tuple(_piece(processor, number) for number in range(processor.get_piece_size()))
        found = dict(_fields(data))
        trainer, normalizer = dict(_fields(found.get(_TRAINER, b""))), dict(_fields(found.get(_NORMALIZER, b"")))
    except (OSError, RuntimeError, ValueError, TypeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise SourceError(f"{path}: is no SentencePiece model ({reason}); download it again") from None
    n_bytes = sum(piece.type == gguf.TokenType.BYTE for piece in pieces)
    kind = trainer.get(_KIND, 1)
    problem = None
    if kind != _BPE:
        problem = f"is of type {_KINDS.get(kind, kind)}, expected BPE"
    elif normalizer.get(_CHARACTER_MAP):
        problem = "replaces characters before it cuts text, expected none of that"
    elif normalizer.get(_REMOVES_SPACES, 1):
        problem = "removes repeated spaces, expected that it keeps them"
    elif trainer.get(_AS_SUFFIX, 0):
        problem = "has spaces at the ends of words, expected them before words"
    elif n_bytes != _N_BYTES:
        problem = f"has {n_bytes} byte tokens, expected {_N_BYTES}"
    if problem is not None:
        raise SourceError(f"{path}: {problem}: llama.cpp would make other tokens of a text; not supported")
    return SentencePieceModel(pieces, bool(normalizer.get(_PREFIX, 1)))


def _piece(processor: Any, number: int) -> Piece:
    """Pieces of the user's own are normal ones here: llama.cpp would put a space behind each if it knew them."""
    kinds = (
        (processor.is_unknown, gguf.TokenType.UNKNOWN),
        (processor.is_control, gguf.TokenType.CONTROL),
        (processor.is_unused, gguf.TokenType.UNUSED),
        (processor.is_byte, gguf.TokenType.BYTE),
    )
    kind = next((kind for asked, kind in kinds if asked(number)), gguf.TokenType.NORMAL)
    return Piece(processor.id_to_piece(number), processor.get_score(number), int(kind))


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """Numbers and values of a message's fields: whole numbers and bytes; four or eight bytes as they are."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        wire = key & 7
        if wire == 0:
            value: int | bytes
            value, at = _varint(data, at)
        else:
            length = {1: 8, 5: 4}.get(wire)
            if wire == 2:
                length, at = _varint(data, at)
            if length is None or at + length > len(data):
                raise ValueError("a field is cut off")
            value, at = data[at : at + length], at + length
        yield key >> 3, value


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """The number at ``at``, seven bits a byte, and where it ends."""
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(data):
            break
        byte, at = data[at], at + 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
    raise ValueError("a number is cut off")
