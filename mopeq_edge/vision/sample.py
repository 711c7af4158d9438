"""The next token from its logits: the likeliest, or drawn as llama.cpp's samplers would: top k, top p, temperature."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mopeq_edge.binding import Floats


@dataclass(frozen=True)
class Sampling:
    """``temperature`` 0 is greedy; ``top_k`` 0 is all tokens."""

    temperature: float = 0.0
    top_k: int = 40
    top_p: float = 0.95
    seed: int = 0


def chooser(sampling: Sampling) -> Callable[[Floats], int]:
    """Picks a token from a row of logits; the same seed gives the same tokens."""
    random = np.random.default_rng(sampling.seed)

    def choose(row: Floats) -> int:
        if sampling.temperature <= 0:
            return int(row.argmax())
        tokens, weights = candidates(row, sampling)
        return int(random.choice(tokens, p=weights))

    return choose


def candidates(row: Floats, sampling: Sampling) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """Tokens that may come, the likeliest first, and their chances."""
    order = np.argsort(-row, kind="stable")[: sampling.top_k or None]
    # up to the token with which the sum reaches top_p
    kept = int(np.searchsorted(np.cumsum(_softmax(row[order])), sampling.top_p)) + 1
    order = order[:kept]
    return order, _softmax(row[order] / sampling.temperature)


def _softmax(values: Floats) -> npt.NDArray[np.float64]:
    powers = np.exp(values.astype(np.float64) - float(values.max()))
    chances: npt.NDArray[np.float64] = powers / powers.sum()
    return chances
