"""How far the file is from the model that it was made from, in this llama.cpp: with --reference SOURCE.gguf."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from mopeq_edge.binding import LlamaModel
from mopeq_edge.evaluate.divergence import compare, summarise
from runtime_tests.engines import Engines, Setup

N_TOKENS = 128

MOST_KLD = 2.0
"""Nats: more than types of two bits leave of a model. Another model is farther away."""


def test_it_is_near_its_source(
    request: pytest.FixtureRequest,
    library: Engines,
    setup: Setup,
    tokens: npt.NDArray[np.int32],
    record: Callable[..., None],
) -> None:
    source: Path | None = request.config.getoption("--reference")
    if source is None:
        pytest.skip("no source was given; add --reference SOURCE.gguf")
    prompt = tokens[: min(N_TOKENS, setup.n_ctx)]
    target = library.library().logits(prompt)
    library.close()
    with LlamaModel(source, n_ctx=setup.n_ctx, n_threads=setup.n_threads, n_gpu_layers=setup.n_gpu_layers) as opened:
        assert opened.n_vocab == target.shape[1], f"{source} has {opened.n_vocab} tokens, the file {target.shape[1]}"
        base = opened.logits(prompt)
    # what follows the last token is not known
    found = summarise([compare(base[:-1], target[:-1], prompt[1:])])
    record(
        kld_mean_nats=found.kld_mean,
        kld_p99_nats=found.kld_p99,
        same_top_fraction=found.same_top,
        ppl_source_per_token=found.ppl_base,
        ppl_target_per_token=found.ppl_target,
        positions_count=found.n_positions,
    )
    assert found.kld_mean < MOST_KLD
