"""Build the pricing of every matrix from calibration statistics."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from mopeq_edge.calibrate.statistics import Routing
from mopeq_edge.calibrate.traces import Traces
from mopeq_edge.errors import CalibrationError
from mopeq_edge.imatrix import ACTIVATION, GRADIENT, LOOKUP, PRIOR_COUNT, Imatrix
from mopeq_edge.sensitivity.scores import (
    FISHER,
    FREQUENCY,
    HYBRID,
    IMATRIX,
    MOPEQ,
    NEEDS_GRADIENT,
    NEEDS_ROUTING,
    NEEDS_TRACES,
    SCORES,
    TRACE,
    WEIGHT_MSE,
    Doubles,
    Pricing,
    hybrid_scores,
)
from mopeq_edge.source.model import SourceTensor
from mopeq_edge.source.roles import Role


@dataclass(frozen=True)
class Statistics:
    """What calibration left: any of these may be missing, and then some scores are."""

    activation: Imatrix | None = None
    gradient: Imatrix | None = None
    routing: Routing | None = None
    traces: Traces | None = None

    def imatrix(self, kind: str) -> Imatrix | None:
        """The imatrix of ``kind``: ``activation``, ``gradient``; None for any other."""
        return {ACTIVATION: self.activation, GRADIENT: self.gradient}.get(kind)

    @property
    def richest(self) -> str:
        """The kind that knows most: ``gradient`` where there is one."""
        return GRADIENT if self.gradient is not None else ACTIVATION

    def available(self) -> tuple[str, ...]:
        """Scores that these statistics allow."""
        return tuple(
            score
            for score in SCORES
            if (score not in NEEDS_GRADIENT or self.gradient is not None)
            and (score not in NEEDS_ROUTING or (self.activation is not None and self.routing is not None))
            and (score not in NEEDS_TRACES or self.traces is not None)
        )


def require_scores(scores: Sequence[str], statistics: Statistics) -> None:
    """Raise :class:`CalibrationError` for a score that lacks its statistics, saying how to get them."""
    for score in scores:
        if score not in statistics.available():
            if score in NEEDS_TRACES and statistics.traces is None:
                raise CalibrationError(
                    f"sensitivity '{score}' needs Hessian traces, and none were measured: run calibrate --trace on the "
                    "Hugging Face directory, or choose --sensitivity fisher"
                )
            if score in NEEDS_GRADIENT:
                raise CalibrationError(
                    f"sensitivity '{score}' needs gradients: calibrate the Hugging Face directory with --fisher "
                    "(a GGUF source or a foreign imatrix has none), or choose --sensitivity imatrix"
                )
            raise CalibrationError(f"sensitivity '{score}' needs an imatrix: run calibrate, or give --imatrix FILE")


def pricings(tensor: SourceTensor, statistics: Statistics, mopeq: Sequence[float]) -> dict[str, list[Pricing]]:
    """For each available score one :class:`Pricing` a matrix of ``tensor``.

    ``mopeq`` has S of each matrix (experts: of the whole expert). A matrix that the statistics do not know
    (the embedding's activations, say) is priced by what is known of it; see the comments.
    """
    n = tensor.n_matrices
    if tensor.role is Role.MTP:
        # no logits of the model depend on it, so its floor decides
        return {score: [Pricing(0.0)] * n for score in statistics.available()}
    made: dict[str, list[Pricing]] = {
        WEIGHT_MSE: [Pricing(1.0)] * n,
        MOPEQ: [Pricing(s) for s in mopeq],
    }
    routing = statistics.routing
    if routing is None or statistics.activation is None:
        return made
    # an embedding that llama-imatrix has an entry for is the output matrix too, which every token multiplies
    tied = tensor.role is Role.EMBEDDING and tensor.name in statistics.activation.entries
    rows = None if tied else _row_weights(tensor, routing)
    frequency = _frequency(tensor, routing)
    made[FREQUENCY] = [Pricing(f, rows=rows) for f in frequency]
    # a matrix that is no expert, one head's included, is its own layer of one: factor 1
    hybrid = hybrid_scores(frequency, mopeq) if tensor.role is Role.EXPERT else np.ones(n)
    made[HYBRID] = [Pricing(float(h), rows=rows) for h in hybrid]
    made[IMATRIX] = _priced(tensor, statistics.activation, 1.0 / routing.n_tokens, rows, routing.n_tokens)
    if statistics.gradient is not None:
        scale = statistics.gradient.scale / (2.0 * routing.n_tokens)
        made[FISHER] = _fisher(tensor, statistics.gradient, scale, rows, routing, tied=tied)
        if statistics.traces is not None:
            of_experts = statistics.traces.mean_diagonal.get(tensor.name)
            made[TRACE] = made[FISHER] if of_experts is None else [Pricing(0.5 * float(h)) for h in of_experts]
    return made


def _fisher(
    tensor: SourceTensor, gradient: Imatrix, scale: float, rows: Doubles | None, routing: Routing, *, tied: bool
) -> list[Pricing]:
    """``tied``: an embedding that is the output matrix too.

    A matrix with rows i and columns j has the diagonal Fisher F_ij; its entry has w_j = sum_i F_ij, which is spread
    over n_out rows. That holds for the transposed matrices of latent attention as well: F_ij is c_ti^2 g_tj^2, with
    the latent c along the rows, and w_j = sum_t |c_t|^2 g_tj^2 (see ``calibrate.latent``).
    """
    if not tied:
        # an embedding row is one output, so its gradient is not spread over n_out rows
        factor = scale if tensor.role is Role.EMBEDDING else scale / tensor.n_out
        return _priced(tensor, gradient, factor, rows, routing.n_tokens)
    entry, lookups = gradient.entries.get(LOOKUP), _row_weights(tensor, routing)
    also = None if entry is None else Pricing(scale, columns=entry.sums[0].astype(np.float64), rows=lookups)
    return [replace(one, also=also) for one in _priced(tensor, gradient, scale / tensor.n_out, None, routing.n_tokens)]


def _priced(
    tensor: SourceTensor, imatrix: Imatrix, factor: float, rows: Doubles | None, n_tokens: int
) -> list[Pricing]:
    entry = imatrix.entries.get(tensor.name)
    if entry is None:
        # llama-imatrix has no entry for the embedding (a lookup) or the output matrix: price the plain
        # error, once a token
        return [Pricing(factor * n_tokens, rows=rows)] * tensor.n_matrices
    return [Pricing(factor, columns=sums.astype(np.float64), rows=rows) for sums in entry.sums]


def _row_weights(tensor: SourceTensor, routing: Routing) -> Doubles | None:
    """An embedding row matters as often as its token occurs; add-one for tokens that calibration missed."""
    if tensor.role is not Role.EMBEDDING:
        return None
    counts = routing.token_counts + 1.0
    return np.asarray(counts / counts.sum())


def _frequency(tensor: SourceTensor, routing: Routing) -> list[float]:
    counts = routing.counts.get(tensor.layer) if tensor.layer is not None else None
    if tensor.role is not Role.EXPERT or counts is None:
        return [1.0] * tensor.n_matrices
    return [max(float(c), PRIOR_COUNT) / routing.n_tokens for c in counts]
