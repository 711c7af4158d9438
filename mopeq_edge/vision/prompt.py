"""A question with pictures as what the model reads: runs of tokens, and embeddings in the place of picture tokens."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mopeq_edge.binding import Floats, LlamaModel, Tokens
from mopeq_edge.errors import PlanError
from mopeq_edge.vision.description import Description, Prompt


def lay_out(
    model: LlamaModel, description: Description, question: str, pictures: Sequence[Floats]
) -> list[Tokens | Floats]:
    """Parts in order: tokens [n], or embeddings [n, n_embd]. The first is the token that begins a text.

    Each text between two pictures is tokenized by itself, as in the released processors. Raises :class:`PlanError`
    where a question has marks for another number of pictures.
    """
    begin = model.bos if model.bos >= 0 else model.eos
    parts: list[Tokens | Floats] = [np.array([begin], np.int32)] if begin >= 0 else []
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
