"""A question with pictures as what the model reads: runs of tokens, and embeddings in the place of picture tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mopeq_edge.binding import Floats, LlamaModel, Tokens
from mopeq_edge.errors import PlanError
from mopeq_edge.gguf_file import read_header
from mopeq_edge.vision.description import TILES, Description, Prompt

CHATS = (TILES,)
"""Kinds of models with a place for what the system says, before the first question, and the token that ends a text
behind every answer. Others were trained on questions and answers alone: there the first question begins with it."""


@dataclass(frozen=True)
class Turn:
    """What the user says, with a mark for each of ``n_pictures`` or none, and the answer; None: this is asked."""

    question: str
    n_pictures: int = 0
    answer: str | None = None


def lay_out(
    model: LlamaModel, description: Description, question: str, pictures: Sequence[Floats]
) -> list[Tokens | Floats]:
    """Parts in order: tokens [n], or embeddings [n, n_embd]. The first is the token that begins a text.

    Each text between two pictures is tokenized by itself, as in the released processors. Raises :class:`PlanError`
    where a question has marks for another number of pictures.
    """
    return lay_out_turns(model, description, [Turn(question, len(pictures))], pictures)


def lay_out_turns(
    model: LlamaModel, description: Description, turns: Sequence[Turn], pictures: Sequence[Floats], system: str = ""
) -> list[Tokens | Floats]:
    """The same of a conversation; ``pictures`` are those of all turns, ``system`` comes before the first question."""
    prompt = description.prompt
    end = read_header(model.path).get("tokenizer.ggml.eos_token_id") if description.kind in CHATS else None
    texts = [f"{system}\n\n" if system and description.kind in CHATS else ""]
    ends: list[int] = []
    """Texts that a token ends instead of a picture."""
    for i, turn in enumerate(turns):
        asked = marked(prompt, turn.question, turn.n_pictures) if prompt.mark else turn.question
        if system and not i and description.kind not in CHATS:
            asked = f"{system}\n\n{asked}"
        first, *others = asked.split(prompt.mark) if prompt.mark else [asked]
        texts[-1] += prompt.before + first
        texts += others
        texts[-1] += prompt.after
        if turn.answer is not None:
            texts[-1] += f" {turn.answer.strip()}"
            if isinstance(end, int):
                ends.append(len(texts) - 1)
                texts.append("")
    begin = first_token(model.path)
    parts: list[Tokens | Floats] = [] if begin is None else [np.array([begin], np.int32)]
    left = iter(pictures)
    if not prompt.mark:
        parts += left
    for i, text in enumerate(texts):
        if len(tokens := model.tokenize(text, parse_special=True)):
            parts.append(tokens)
        if i in ends:
            parts.append(np.array([end], np.int32))
        elif i + 1 < len(texts):
            parts.append(next(left))
    return parts


def first_token(gguf: Path) -> int | None:
    """The token that begins a text, or, as in the released processors, the one that ends it if there is none.

    From the file's own keys: llama.cpp assumes a number where they say nothing.
    """
    header = read_header(gguf)
    for name in ("bos", "eos"):
        if isinstance(token := header.get(f"tokenizer.ggml.{name}_token_id"), int):
            return token
    return None


def marked(prompt: Prompt, question: str, n_pictures: int) -> str:
    """``question`` with a mark for each picture; without any they come before it."""
    found = question.count(prompt.mark)
    if found == 0:
        question, found = prompt.own * n_pictures + question, n_pictures
    if found != n_pictures:
        raise PlanError(
            f"the question has {found} times {prompt.mark} for {n_pictures} pictures; expected one for each, or none"
        )
    return question.strip()
