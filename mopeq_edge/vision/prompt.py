"""A question with pictures as what the model reads: runs of tokens, and embeddings in the place of picture tokens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mopeq_edge.binding import Floats, LlamaModel, Tokens
from mopeq_edge.errors import PlanError
from mopeq_edge.gguf_file import read_header
from mopeq_edge.vision.description import Description, Prompt


def lay_out(
    model: LlamaModel, description: Description, question: str, pictures: Sequence[Floats]
) -> list[Tokens | Floats]:
    """Parts in order: tokens [n], or embeddings [n, n_embd]. The first is the token that begins a text.

    Each text between two pictures is tokenized by itself, as in the released processors. Raises :class:`PlanError`
    where a question has marks for another number of pictures.
    """
    begin = first_token(model.path)
    parts: list[Tokens | Floats] = [] if begin is None else [np.array([begin], np.int32)]
    prompt = description.prompt
    if not prompt.mark:
        parts += pictures
        texts = [prompt.before + question + prompt.after]
        pictures = []
    else:
        texts = (prompt.before + marked(prompt, question, len(pictures)) + prompt.after).split(prompt.mark)
    for i, text in enumerate(texts):
        if len(tokens := model.tokenize(text, parse_special=True)):
            parts.append(tokens)
        if i < len(pictures):
            parts.append(pictures[i])
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
