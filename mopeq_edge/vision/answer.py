"""A question about pictures, answered: the tower and llama.cpp one after the other."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mopeq_edge.binding import UBATCH, LlamaModel
from mopeq_edge.errors import PlanError
from mopeq_edge.vision.image_file import open_image
from mopeq_edge.vision.prompt import lay_out
from mopeq_edge.vision.sample import Sampling, chooser
from mopeq_edge.vision.session import Floats
from mopeq_edge.vision.tower import Tower

DEFAULT_PREDICT = 256
GREEDY = Sampling()


@dataclass(frozen=True)
class Question:
    """What is asked of ``gguf`` with the eyes of ``vision``. ``n_ctx`` 0: as much as question and answer need."""

    gguf: Path
    vision: Path
    images: tuple[Path, ...]
    text: str
    n_predict: int = DEFAULT_PREDICT
    n_ctx: int = 0
    sampling: Sampling = GREEDY
    threads: int = 1
    n_gpu_layers: int = 0


def see(question: Question) -> tuple[Tower, list[Floats]]:
    """The embeddings of every picture; all files are read before the tower is loaded."""
    images = [open_image(path) for path in question.images]
    tower = Tower(question.vision, question.threads)
    return tower, tower.embed(images, [str(path) for path in question.images])


def answer(question: Question) -> Iterator[str]:
    """The answer, piece by piece. The tower is gone from memory before the text model comes.

    Raises :class:`MopeqError` for files that do not fit together, or a context that is too short.
    """
    tower, seen = see(question)
    description = tower.description
    del tower
    # the vocabulary says how long the context has to be
    with LlamaModel(question.gguf, vocab_only=True) as vocabulary:
        parts = lay_out(vocabulary, description, question.text, seen)
    length = sum(len(part) for part in parts)
    n_ctx = question.n_ctx or length + question.n_predict
    if length + 1 > n_ctx:
        raise PlanError(
            f"{question.gguf}: question and pictures are {length} tokens, the context has {n_ctx}; give a larger "
            "--ctx-size or fewer pictures"
        )
    with LlamaModel(
        question.gguf,
        n_ctx=n_ctx,
        n_batch=UBATCH,
        n_threads=question.threads,
        n_gpu_layers=question.n_gpu_layers,
    ) as model:
        if model.n_embd != description.n_embd:
            raise PlanError(
                f"{question.vision}: makes embeddings of {description.n_embd} numbers, {question.gguf} reads "
                f"{model.n_embd}; use the two files of one conversion"
            )
        n = min(question.n_predict, n_ctx - length)
        yield from _text(model, model.continuation(parts, n, chooser(question.sampling)))


def _text(model: LlamaModel, tokens: Iterator[int]) -> Iterator[str]:
    """Text as it becomes whole: a character may be several tokens."""
    found: list[int] = []
    shown = ""
    for token in tokens:
        found.append(token)
        text = model.detokenize(found)
        if not text.endswith("\ufffd"):
            yield text[len(shown) :]
            shown = text
    rest = model.detokenize(found)[len(shown) :] if found else ""
    if rest:
        yield rest
