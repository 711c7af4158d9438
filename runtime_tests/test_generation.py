"""Does this llama.cpp run this file, and does it say the same for many tokens as for one at a time?"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest

from mopeq_edge.errors import MopeqError
from mopeq_edge.evaluate.divergence import compare
from runtime_tests.engines import Engines, Setup
from runtime_tests.prompts import LENGTHS, LONG_TAIL, N_PREDICT

MOST_KLD = 1e-3
"""Nats. Rounding alone, with routers that nearly tie, gives less than 1e-4; one wrong expert gives far more."""

MOST_SAME_WORK = 1e-3
"""Largest difference of a logit where the same work is done twice."""

SHORT = tuple(length for length in LENGTHS if length <= 64)

Tokens = npt.NDArray[np.int32]
Record = Callable[..., None]


@pytest.fixture
def prompt(request: pytest.FixtureRequest, tokens: Tokens, setup: Setup) -> Tokens:
    """The first ``length`` tokens of the text."""
    length = int(request.node.callspec.params["length"])
    if length + N_PREDICT > setup.n_ctx:
        pytest.skip(f"{length} tokens and {N_PREDICT} more do not fit: the model was trained on {setup.n_ctx}")
    return tokens[:length]


def first_compared(prompt: Tokens) -> int:
    return 0 if len(prompt) <= max(SHORT) else len(prompt) - LONG_TAIL


@pytest.mark.parametrize("length", LENGTHS)
def test_every_logit_is_finite(library: Engines, prompt: Tokens, length: int) -> None:
    model, first = library.library(), first_compared(prompt)
    found = [model.logits(prompt, first)]
    if first == 0:
        found.append(model.step_logits(prompt))
    for logits in found:
        assert logits.shape == (length - first, model.n_vocab)
        assert np.isfinite(logits).all()


@pytest.mark.parametrize("length", LENGTHS)
def test_the_logits_tell_tokens_apart(library: Engines, prompt: Tokens, length: int, record: Record) -> None:
    spread = library.library().logits(prompt, first_compared(prompt)).std(axis=1)
    record(least_spread_of_logits=spread.min())
    assert (spread > 1e-3).all()


@pytest.mark.parametrize("length", LENGTHS)
def test_greedy_text_is_the_same_twice(library: Engines, prompt: Tokens, length: int, record: Record) -> None:
    model = library.library()
    first = model.greedy(prompt, N_PREDICT)
    record(greedy_text=model.detokenize(first, special=True), greedy_tokens=" ".join(map(str, first)))
    assert len(first) <= N_PREDICT
    assert first == model.greedy(prompt, N_PREDICT)
    assert all(0 <= token < model.n_vocab for token in first)


@pytest.mark.parametrize("length", SHORT)
def test_a_shorter_answer_is_the_begin_of_a_longer_one(library: Engines, prompt: Tokens, length: int) -> None:
    model = library.library()
    assert model.greedy(prompt, 4) == model.greedy(prompt, 12)[:4]


@pytest.mark.parametrize("length", [max(LENGTHS)])
def test_a_long_prompt_leaves_nothing_behind(
    library: Engines, prompt: Tokens, tokens: Tokens, length: int, record: Record
) -> None:
    """What comes after it is computed as on a fresh context."""
    model, short = library.library(), tokens[:7]
    before = model.logits(short)
    model.logits(prompt, len(prompt) - 1)
    model.greedy(prompt, 4)
    largest = float(np.abs(model.logits(short) - before).max())
    record(largest_logit_difference=largest)
    assert largest < MOST_SAME_WORK


def test_a_prompt_that_is_too_long_is_an_error(library: Engines) -> None:
    model = library.library()
    with pytest.raises(MopeqError, match="do not fit into its context"):
        model.logits(np.zeros(model.n_ctx + 1, np.int32))


@pytest.mark.parametrize("length", SHORT)
def test_batch_and_token_by_token_agree(library: Engines, prompt: Tokens, length: int, record: Record) -> None:
    model = library.library(plain=True)
    batch, steps = model.logits(prompt), model.step_logits(prompt)
    kld, largest = compare(batch, steps, prompt).kld.mean(), float(np.abs(batch - steps).max())
    record(kld_mean_nats=kld, largest_logit_difference=largest)
    assert kld < MOST_KLD, f"largest difference of a logit: {largest:.3g}"
    # A batch of one is the same work twice.
    if length == 1:
        assert largest < MOST_SAME_WORK


@pytest.mark.parametrize("length", LENGTHS)
def test_the_split_into_batches_does_not_matter(library: Engines, prompt: Tokens, length: int, record: Record) -> None:
    first = first_compared(prompt)
    whole = library.library(plain=True).logits(prompt, first)
    split = library.library(plain=True, n_batch=5 if first == 0 else 61).logits(prompt, first)
    kld = compare(whole, split, prompt[first:]).kld.mean()
    record(kld_mean_nats=kld)
    assert kld < MOST_KLD
