"""Words of the tiny-sight model: its tokenizer, and questions with answers as tokens.

Byte-level BPE like GPT-2's, so that any text has tokens; every word of the questions and answers is one of them. What
is special in DeepSeek-VL2's tokenizer is special here.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from tools.sight_pictures import COUNTS, PAIRS, Asked, Thing, ask

SPECIAL = ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<|User|>", "<|Assistant|>", "<image>")
BEGIN, END = 0, 1
BEFORE, AFTER = "<|User|>: ", "\n\n<|Assistant|>:"
"""Before a picture, and behind a question about it."""


@dataclass(frozen=True)
class Encoded:
    """What follows a picture: tokens of question and answer, of which the last ``n_answer`` are to be predicted."""

    asked: Asked
    tokens: tuple[int, ...]
    n_answer: int


def make_tokenizer() -> Tokenizer:
    """Trained on every question and answer."""
    words = []
    for seed, (colour, kind) in enumerate(PAIRS):
        things = (Thing(colour, kind, 0.2, 0.2, 0.2), Thing(*PAIRS[seed - 1], 0.8, 0.8, 0.2))
        words += [f"\n{asked.question}{AFTER} {asked.answer}" for asked in ask(seed, things)]
    words += [f" {count}" for count in COUNTS for _ in PAIRS]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = [AddedToken(token, normalized=False, special=True) for token in SPECIAL]
    trainer = trainers.BpeTrainer(
        vocab_size=1024, min_frequency=4, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(words, trainer)
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, out: Path) -> None:
    """tokenizer.json and tokenizer_config.json into the directory ``out``."""
    tokenizer.save(str(out / "tokenizer.json"))
    settings = {
        **{"bos_token": SPECIAL[BEGIN], "eos_token": SPECIAL[END], "pad_token": SPECIAL[END], "unk_token": None},
        **{"add_bos_token": False, "model_max_length": 1024, "tokenizer_class": "PreTrainedTokenizerFast"},
    }
    (out / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def prefix(tokenizer: Tokenizer) -> list[int]:
    """Tokens before a picture."""
    return [BEGIN, *tokenizer.encode(BEFORE).ids]


def encode(tokenizer: Tokenizer, asked: Asked) -> Encoded:
    """Question and answer as the device lays them out."""
    question = tokenizer.encode(f"\n{asked.question}{AFTER}").ids
    answer = [*tokenizer.encode(f" {asked.answer}").ids, END]
    return Encoded(asked, (*question, *answer), len(answer))
