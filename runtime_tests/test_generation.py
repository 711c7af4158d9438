"""Does this llama.cpp run this file, and does it say the same for many tokens as for one at a time?"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from mopeq_edge.binding import LlamaModel
from mopeq_edge.errors import MopeqError
from mopeq_edge.evaluate.divergence import compare

TEXT = (
    "The library opens the file, reads the header and checks every length before it is used. If the header "
    "names a version that the library does not know, it returns an error and leaves the file as it was. "
    "Otherwise it maps the tensors one after the other, so that a large file does not need more memory than "
    "a small one. A program that only wants the names can stop there. The order of the tensors is the order "
    "in which they were written, and two programs that read the same file see the same names."
)
LENGTHS = (1, 7, 64)

MOST_KLD = 1e-3
"""Nats. Rounding alone, with routers that nearly tie, gives less than 1e-4; one wrong expert gives far more."""

Tokens = npt.NDArray[np.int32]


@pytest.fixture(scope="module")
def tokens(model: LlamaModel) -> Tokens:
    found = model.tokenize(TEXT, add_special=True)
    # A vocabulary of whole sentences would leave too few: begin again.
    return np.resize(found, max(LENGTHS))


@pytest.mark.parametrize("length", LENGTHS)
def test_every_logit_is_finite(model: LlamaModel, tokens: Tokens, length: int) -> None:
    for logits in (model.logits(tokens[:length]), model.step_logits(tokens[:length])):
        assert logits.shape == (length, model.n_vocab)
        assert np.isfinite(logits).all()


@pytest.mark.parametrize("length", LENGTHS)
def test_the_logits_tell_tokens_apart(model: LlamaModel, tokens: Tokens, length: int) -> None:
    assert (model.logits(tokens[:length]).std(axis=1) > 1e-3).all()


@pytest.mark.parametrize("length", LENGTHS)
def test_batch_and_token_by_token_agree(plain_model: LlamaModel, tokens: Tokens, length: int) -> None:
    prompt = tokens[:length]
    batch, steps = plain_model.logits(prompt), plain_model.step_logits(prompt)
    scores = compare(batch, steps, prompt)
    assert scores.kld.mean() < MOST_KLD, f"largest difference of a logit: {np.abs(batch - steps).max():.3g}"
    # A batch of one is the same work twice.
    if length == 1:
        assert np.abs(batch - steps).max() < 1e-3


@pytest.mark.parametrize("length", LENGTHS)
def test_the_split_into_batches_does_not_matter(
    model_path: Path, n_gpu_layers: int, plain_model: LlamaModel, tokens: Tokens, length: int
) -> None:
    prompt = tokens[:length]
    with LlamaModel(model_path, n_ctx=64, n_batch=5, n_gpu_layers=n_gpu_layers, plain=True) as split:
        assert compare(plain_model.logits(prompt), split.logits(prompt), prompt).kld.mean() < MOST_KLD


@pytest.mark.parametrize("length", LENGTHS)
def test_greedy_text_is_the_same_twice(model: LlamaModel, tokens: Tokens, length: int) -> None:
    prompt = tokens[:length]
    first = model.greedy(prompt, 32)
    assert first == model.greedy(prompt, 32)
    assert all(0 <= token < model.n_vocab for token in first)


def test_a_prompt_that_is_too_long_is_an_error(model: LlamaModel) -> None:
    with pytest.raises(MopeqError, match="do not fit into its context"):
        model.logits(np.zeros(model.n_ctx + 1, np.int32))
