"""llama-server: answers, ends, chats, serves four at once, and says what the library says."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from mopeq_edge.evaluate.divergence import log_softmax
from mopeq_edge.gguf_file import GGUFHeader
from mopeq_edge.runtime.server import Server
from runtime_tests.engines import Engines, Setup
from runtime_tests.prompts import LENGTHS, N_PREDICT, NON_ASCII, SLOTS
from runtime_tests.vocabulary import ServerVocabulary, Vocabulary

NEAR_TIE = 0.1
"""Nats between two tokens of which one alone and four at once may choose either: sums are in another order."""

MOST_LOGPROB = 0.1
"""Nats that a log-probability may differ by between llama-server and the library, of tokens above :data:`LEAST`."""

LEAST = -5.0
N_PROBS = 8

Tokens = npt.NDArray[np.int32]
Record = Callable[..., None]


def test_llama_server_starts(engines: Engines, setup: Setup) -> None:
    if setup.build.tool("llama-server") is None:
        pytest.skip("this llama.cpp has no llama-server")
    assert engines.server().complete([0], 1)["tokens_evaluated"] == 1


@pytest.mark.parametrize("length", LENGTHS)
def test_greedy_completion_is_the_same_twice(
    server: Server, tokens: Tokens, setup: Setup, length: int, record: Record
) -> None:
    if length + N_PREDICT > setup.n_ctx:
        pytest.skip(f"{length} tokens and {N_PREDICT} more do not fit: the model was trained on {setup.n_ctx}")
    prompt = tokens[:length].tolist()
    first, second = (server.complete(prompt, N_PREDICT, return_tokens=True) for _ in range(2))
    record(greedy_text=first["content"], greedy_tokens=" ".join(map(str, first["tokens"])))
    assert first["tokens_evaluated"] == length
    assert first["tokens"] == second["tokens"]


@pytest.mark.parametrize("n_predict", [1, 5])
def test_it_ends_at_n_predict(server: Server, tokens: Tokens, n_predict: int) -> None:
    answer = server.complete(tokens[:7].tolist(), n_predict, ignore_eos=True, return_tokens=True)
    assert (answer["stop_type"], answer["tokens_predicted"], len(answer["tokens"])) == ("limit", n_predict, n_predict)


def test_it_ends_at_eos(server: Server, tokens: Tokens, header: GGUFHeader) -> None:
    """Which is made the likeliest token."""
    eos = header.get("tokenizer.ggml.eos_token_id")
    if eos is None:
        pytest.skip("the vocabulary has no EOS")
    answer = server.complete(tokens[:7].tolist(), N_PREDICT, logit_bias=[[int(eos), 1000]])
    assert (answer["stop_type"], answer["content"]) == ("eos", "")


def test_letters_beyond_ascii(server: Server, record: Record) -> None:
    answer = server.complete(NON_ASCII, 8)
    record(non_ascii_text=answer["content"])
    assert answer["prompt"].endswith(NON_ASCII)


def test_it_tokenizes_as_the_library(
    server: Server, engines: Engines, vocabulary: Vocabulary, binding_problem: str | None
) -> None:
    if binding_problem is not None:
        pytest.skip(f"not from Python: {binding_problem}")
    theirs = ServerVocabulary(engines).tokenize(NON_ASCII, add_special=True)
    assert theirs.tolist() == vocabulary.tokenize(NON_ASCII, add_special=True).tolist()


def test_it_chats(server: Server, header: GGUFHeader, record: Record) -> None:
    if header.get("tokenizer.chat_template") is None:
        pytest.skip("the file has no chat template")
    body = {"messages": [{"role": "user", "content": "Say hello."}], "max_tokens": 16, "temperature": 0}
    answer = server.post("/v1/chat/completions", body)
    choice = answer["choices"][0]
    said = "".join(choice["message"].get(name) or "" for name in ("reasoning_content", "content"))
    record(chat_text=said)
    assert choice["message"]["role"] == "assistant"
    assert choice["finish_reason"] in ("stop", "length")
    assert answer["usage"]["completion_tokens"] >= 1


def test_four_at_once_say_what_each_says_alone(server: Server, tokens: Tokens, record: Record) -> None:
    """Up to a near tie, behind which texts go apart."""
    prompts = [tokens[9 * i : 9 * i + 16 + 3 * i].tolist() for i in range(SLOTS)]
    options: dict[str, Any] = {"n_probs": N_PROBS, "ignore_eos": True, "return_tokens": True}
    alone = [server.complete(prompt, N_PREDICT, **options) for prompt in prompts]
    together = server.complete_all(prompts, N_PREDICT, **options)
    margins = [_margin(a, b) for a, b in zip(alone, together, strict=True)]
    ties = [margin for margin in margins if margin is not None]
    record(near_ties_count=len(ties), largest_near_tie_nats=max(ties, default=None))
    assert all(margin <= NEAR_TIE for margin in ties), f"tokens {max(ties):.3g} nats apart were exchanged"


def _margin(alone: dict[str, Any], together: dict[str, Any]) -> float | None:
    """How far apart ``alone`` rates the tokens in which both differ first; None if they never do."""
    pairs = zip(alone["tokens"], together["tokens"], strict=True)
    at = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
    if at is None:
        return None
    rated = {top["id"]: float(top["logprob"]) for top in alone["completion_probabilities"][at]["top_logprobs"]}
    return rated[alone["tokens"][at]] - rated.get(together["tokens"][at], -np.inf)


def test_its_probabilities_are_the_library_s(library: Engines, server: Server, tokens: Tokens, record: Record) -> None:
    """Of the first token behind a prompt and of seven generated ones. What is asked for last is open: the server."""
    prompt = tokens[:64].tolist()
    answer = server.complete(prompt, 8, n_probs=N_PROBS, ignore_eos=True, return_tokens=True)
    # the library closes the server
    logits = library.library().logits_after(prompt, answer["tokens"][:-1])
    differences = _differences(log_softmax(logits), answer["completion_probabilities"])
    record(largest_difference_nats=max(differences), compared_count=len(differences))
    assert max(differences) <= MOST_LOGPROB


def _differences(ours: npt.NDArray[np.float64], theirs: Sequence[dict[str, Any]]) -> list[float]:
    return [
        abs(float(row[top["id"]]) - float(top["logprob"]))
        for row, one in zip(ours, theirs, strict=True)
        for top in one["top_logprobs"]
        if top["logprob"] >= LEAST or row[top["id"]] >= LEAST
    ]
