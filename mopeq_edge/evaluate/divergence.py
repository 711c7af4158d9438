"""How two models' next-token distributions differ, with the definitions of ``llama-perplexity``.

It stores the source's log-probabilities in 16 bits and leaves out tokens below e^-16; here nothing is
rounded or left out, and all sums are float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mopeq_edge.binding import Floats, Tokens

Doubles = npt.NDArray[np.float64]

_BLOCK = 1 << 21
"""Logits that are widened to float64 at once, so that memory does not grow with the vocabulary."""


@dataclass(frozen=True)
class PositionScores:
    """Scalars of n positions, all [n].

    ``kld``: KL(base || target) in nats. ``nll_base``, ``nll_target``: -ln p(next token) in nats.
    ``same_top``: whether both rate the same token highest (of equals, the first).
    """

    kld: Doubles
    nll_base: Doubles
    nll_target: Doubles
    same_top: npt.NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.kld)


@dataclass(frozen=True)
class Divergence:
    """Summary over ``n_positions`` positions; KLD and NLL in nats, ``*_se`` are standard errors.

    ``kld_p99`` and ``kld_p99_9`` are percentiles with linear interpolation, ``same_top`` is a fraction,
    ``ppl_*`` are perplexities per token, ``ln_ppl_ratio`` is the mean of ln(PPL(target) / PPL(base)), whose
    error is that of the paired differences.
    """

    n_positions: int
    kld_mean: float
    kld_mean_se: float
    kld_median: float
    kld_p99: float
    kld_p99_9: float
    kld_max: float
    same_top: float
    same_top_se: float
    ppl_base: float
    ppl_base_se: float
    ppl_target: float
    ppl_target_se: float
    ln_ppl_ratio: float
    ln_ppl_ratio_se: float


def compare(base: Floats, target: Floats, next_tokens: Tokens) -> PositionScores:
    """Scores of each row of two logit arrays [n, n_vocab]; ``next_tokens`` [n] follow the positions.

    A logit of -inf is a probability of 0. Rows with NaN or +inf score NaN.
    """
    n, n_vocab = base.shape
    if target.shape != base.shape or next_tokens.shape != (n,):
        raise ValueError(f"shapes {base.shape}, {target.shape} and {next_tokens.shape} do not belong together")
    kld, nll_base, nll_target = (np.empty(n) for _ in range(3))
    rows = max(1, _BLOCK // n_vocab)
    for start in range(0, n, rows):
        part = slice(start, min(start + rows, n))
        log_p = log_softmax(base[part])
        log_q = log_softmax(target[part])
        token = (np.arange(len(log_p)), next_tokens[part])
        nll_base[part] = -log_p[token]
        nll_target[part] = -log_q[token]
        p = np.exp(log_p)
        # A token that the base rules out adds 0 to the sum, whatever the target says.
        np.subtract(log_p, log_q, out=log_p, where=p != 0)
        np.copyto(log_p, 0, where=p == 0)
        # Below 0 it can only be by rounding.
        kld[part] = np.maximum((p * log_p).sum(axis=1), 0)
    return PositionScores(kld, nll_base, nll_target, base.argmax(axis=1) == target.argmax(axis=1))


def summarise(scores: Sequence[PositionScores]) -> Divergence:
    """Summary of all positions of ``scores``, which must hold at least one."""
    kld = np.concatenate([part.kld for part in scores])
    nll_base = np.concatenate([part.nll_base for part in scores])
    nll_target = np.concatenate([part.nll_target for part in scores])
    same_top = np.concatenate([part.same_top for part in scores]).astype(np.float64)
    ppl_base, ppl_target = np.exp(nll_base.mean()), np.exp(nll_target.mean())
    ratio = nll_target - nll_base
    return Divergence(
        n_positions=len(kld),
        kld_mean=float(kld.mean()),
        kld_mean_se=_standard_error(kld),
        kld_median=float(np.median(kld)),
        kld_p99=float(np.percentile(kld, 99)),
        kld_p99_9=float(np.percentile(kld, 99.9)),
        kld_max=float(kld.max()),
        same_top=float(same_top.mean()),
        same_top_se=_standard_error(same_top),
        ppl_base=float(ppl_base),
        ppl_base_se=float(ppl_base * _standard_error(nll_base)),
        ppl_target=float(ppl_target),
        ppl_target_se=float(ppl_target * _standard_error(nll_target)),
        ln_ppl_ratio=float(ratio.mean()),
        ln_ppl_ratio_se=_standard_error(ratio),
    )


def log_softmax(logits: Floats) -> Doubles:
    """Log-probabilities of each row of ``logits`` [n, n_vocab], in nats."""
    wide = logits.astype(np.float64)
    with np.errstate(invalid="ignore"):
        wide -= wide.max(axis=1, keepdims=True)
        wide -= np.log(np.exp(wide).sum(axis=1, keepdims=True))
    return wide


def _standard_error(values: Doubles) -> float:
    """Of the mean of ``values``; 0 for a single one."""
    return float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else 0.0
