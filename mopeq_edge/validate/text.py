"""The tokens that a file is run on."""

from __future__ import annotations

import numpy as np

from mopeq_edge.binding import LlamaModel, Tokens
from mopeq_edge.validate.stored import StoredModel

N_TOKENS = 64

TEXT = """The harbour was quiet before sunrise. A woman in a yellow coat counted 27 crates, wrote the number in her book
and waited. "Is that all?" asked the captain. It was not: the second boat, late again because of the fog, had another
fourteen. They would need more ice, two carts and, she thought, a better plan for Thursday. Nobody had told the cook,
of course; he found out from the gulls, as he always did, and put the kettle on for everyone who came up the steps."""


def tokens_of(model: StoredModel, text: str, n_tokens: int) -> Tokens:
    """The first ``n_tokens`` of ``text`` in the model's vocabulary, int32 [n]; with BOS if the vocabulary asks for it.

    A model without a vocabulary gets ids at random, always the same.
    """
    if model.kvs.get("tokenizer.ggml.tokens") is None:
        n_vocab = model.tensors["token_embd.weight"][0].n_out
        return np.random.default_rng(0).integers(0, n_vocab, n_tokens, dtype=np.int32)
    with LlamaModel(model.path, vocab_only=True) as vocabulary:
        return vocabulary.tokenize(text, add_special=True)[:n_tokens]
