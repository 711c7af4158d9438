"""Tiny SentencePiece models, trained on the bundled text, and checkpoints that have one as their tokenizer."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from ..builders import EXAMPLE_TEXT, edit_json
from .families import build_granite_moe, build_mixtral

SIZE, VOCAB = 800, 810
"""Pieces of a model; rows of the embedding of a checkpoint."""

LLAMA: Mapping[str, Any] = {
    **{"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
    **{"legacy": True, "clean_up_tokenization_spaces": False},
}
"""tokenizer_config.json without what varies."""


@cache
def trained(**options: Any) -> bytes:
    """A model trained as Llama's: BPE, byte fallback, text as it is."""
    import sentencepiece

    lines = [line for line in EXAMPLE_TEXT.read_text(encoding="utf-8").split("\n") if line][:1200]
    settings: dict[str, Any] = {
        **{"vocab_size": SIZE, "model_type": "bpe", "byte_fallback": True, "character_coverage": 0.999},
        **{"normalization_rule_name": "identity", "remove_extra_whitespaces": False, "split_digits": True},
        **{"allow_whitespace_only_pieces": True, "num_threads": 1, "minloglevel": 2},
    }
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=written, **{**settings, **options}
    )
    return written.getvalue()


def encoded(model: bytes, text: str) -> list[int]:
    """What the ``sentencepiece`` package makes of ``text``."""
    import sentencepiece

    return list(sentencepiece.SentencePieceProcessor(model_proto=model).encode(text))


def build(directory: Path, *, family: str = "mixtral", vocab: int = VOCAB) -> Path:
    """A checkpoint in BF16 without a tokenizer."""
    make = {"mixtral": build_mixtral, "granite": build_granite_moe}[family]
    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None}
    make(directory, "bfloat16", **{**special, "vocab_size": vocab, "num_hidden_layers": 1})
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (directory / name).unlink()
    return directory


def add_model(directory: Path, model: bytes, **settings: Any) -> Path:
    """``tokenizer.model`` and the settings of a Llama."""
    (directory / "tokenizer.model").write_bytes(model)
    edit_json(directory / "tokenizer_config.json", **{**LLAMA, **settings})
    return directory


def add_json(directory: Path, model: bytes, added: Mapping[str, bool] | None = None, **settings: Any) -> Path:
    """``tokenizer.json`` as released for models of the Llama kind, and the settings of a Llama.

    Every pair that makes a piece is a merge, in the order of the pieces. ``added`` are further tokens behind the
    pieces, and whether they are special.
    """
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    ids = {processor.id_to_piece(number): number for number in range(processor.get_piece_size())}
    pieces = [text for text, n in ids.items() if not (processor.is_byte(n) or processor.is_control(n)) and n]
    merges = [[text[:at], text[at:]] for text in pieces for at in range(1, len(text))]
    entry = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    tokens = [("<unk>", 0, True), ("<s>", 1, True), ("</s>", 2, True)]
    tokens += [(text, len(ids) + at, special) for at, (text, special) in enumerate((added or {}).items())]
    bos, text_a = {"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    pair = [bos, text_a, {"SpecialToken": {"id": "<s>", "type_id": 1}}, {"Sequence": {"id": "B", "type_id": 1}}]
    tokenizer = {
        "version": "1.0",
        **{"truncation": None, "padding": None, "pre_tokenizer": None},
        "added_tokens": [{"id": n, "content": text, **entry, "special": special} for text, n, special in tokens],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": "▁"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
            ],
        },
        "post_processor": {
            "type": "TemplateProcessing",
            **{"single": [bos, text_a], "pair": pair},
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        "model": {
            **{"type": "BPE", "dropout": None, "unk_token": "<unk>", "continuing_subword_prefix": None},
            **{"end_of_word_suffix": None, "fuse_unk": True, "byte_fallback": True, "vocab": ids},
            "merges": [merge for merge in merges if merge[0] in ids and merge[1] in ids],
        },
    }
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    edit_json(directory / "tokenizer_config.json", **{**LLAMA, **settings})
    return directory
