"""What one unit of quantization error costs, by each score.

Every score prices the error D = Q(W) - W of one matrix as a weighted sum of squares, so one pass over the
quantizer's output serves all of them:

====================  =======================================================  ======================
score                 damage of D                                              unit
====================  =======================================================  ======================
``fisher``            1/2 sum_ij w_j D_ij^2 / (n_out T), w_j = sum_t g_t^2 x_tj^2   nats of KLD per token
``imatrix``           sum_ij x2_j D_ij^2 / T                                   squared output error per token
``weight-mse``        sum_ij D_ij^2                                            squared weight error
``mopeq``             S(e) sum_ij D_ij^2                                       S in 1/|W|, see below
``frequency``         (tokens routed to e / T) sum_ij D_ij^2                   squared weight error per token
``hybrid``            f(e) s(e) sum_ij D_ij^2, see below                       squared weight error
``trace``             1/2 tr(H_e)/n sum_ij D_ij^2, see below                   nats per token
``fisher-trace``      mean of the two, the trace scaled: see ``combine``       nats per token
====================  =======================================================  ======================

T is the number of calibration tokens; the sums over t run over the tokens routed to the expert, so they
carry its frequency. ``mopeq``, ``frequency`` and ``hybrid`` rank experts and know nothing of types; to feed a budgeted
planner they are joined to |D|^2 in the form of HAWQ-V2 (arXiv 1911.03852), trace times squared error.

``mopeq`` (arXiv 2509.02512): S(e) sums over the expert's matrices the Hutchinson estimate of the trace of
the Hessian of L(W) = |W|_F. That Hessian is (I - w w^T) / |W|_F with w = W / |W|_F, so with probe vectors
of unit length the estimate's expectation is (n - 1) / (n |W|_F) for n weights.

``hybrid`` (the same paper's comparison, which does not say how it normalises): tokens and S of an expert, each divided
by its mean over the layer's experts. Dividing by the sums ranks a layer's experts the same; with means the average
expert also costs its plain squared error, as every matrix that is no expert does, however many experts a layer has.

``trace`` (HAWQ-V2): H_e is the Hessian of the calibration text's cross-entropy, mean per token, for the n weights of
one expert matrix; ``calibrate --trace`` estimates its trace. The factor 1/2 makes the damage the second-order rise of
the loss when errors favour no direction. Matrices that are no experts are priced as by ``fisher``, in the same unit.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Doubles = npt.NDArray[np.float64]

FISHER, IMATRIX, WEIGHT_MSE = "fisher", "imatrix", "weight-mse"
MOPEQ, FREQUENCY, HYBRID, TRACE = "mopeq", "frequency", "hybrid", "trace"
FISHER_TRACE = "fisher-trace"

UNITS: Mapping[str, str] = {
    FISHER: "nats of KLD per token",
    IMATRIX: "squared output error per token",
    WEIGHT_MSE: "squared weight error",
    MOPEQ: "squared weight error x 1/|W|",
    FREQUENCY: "squared weight error per token",
    HYBRID: "squared weight error",
    TRACE: "nats per token",
    FISHER_TRACE: "nats per token",
}
SCORES: tuple[str, ...] = tuple(UNITS)

BEST: tuple[str, ...] = (FISHER_TRACE, FISHER, IMATRIX, WEIGHT_MSE)
"""What to plan by: the first of these that the statistics allow (docs/study.md)."""

AUTO = "auto"
"""Asks for the best of the scores that there are."""

NEEDS_GRADIENT: frozenset[str] = frozenset({FISHER, TRACE, FISHER_TRACE})
NEEDS_ROUTING: frozenset[str] = frozenset({FISHER, IMATRIX, FREQUENCY, HYBRID, TRACE, FISHER_TRACE})
NEEDS_TRACES: frozenset[str] = frozenset({TRACE, FISHER_TRACE})
DERIVED: frozenset[str] = frozenset({FISHER_TRACE})
"""Scores that follow from others and are not stored."""
IN_NATS: frozenset[str] = frozenset({FISHER, TRACE, FISHER_TRACE})


@dataclass(frozen=True)
class Pricing:
    """How one score prices the squared errors of one matrix [n_out, n_in].

    damage = factor * sum_ij rows_i columns_j D_ij^2, with ``columns`` [n_in] and ``rows`` [n_out] (None:
    all ones), and that of ``also``: a matrix with two uses is priced for both.
    """

    factor: float
    columns: Doubles | None = None
    rows: Doubles | None = None
    also: Pricing | None = None

    def row_damage(self, squared: npt.NDArray[np.float32], rows: npt.NDArray[np.int64]) -> Doubles:
        """Damage of each row of ``squared`` = D^2 [n_rows, n_in], which are the matrix's ``rows``."""
        # no BLAS: its threads would make the last bits depend on the machine
        weighted = squared if self.columns is None else squared * self.columns
        damage: Doubles = weighted.sum(axis=1, dtype=np.float64)
        if self.rows is not None:
            damage *= self.rows[rows]
        damage *= self.factor
        return damage if self.also is None else damage + self.also.row_damage(squared, rows)

    def row_weights(self, squared: npt.NDArray[np.float32], rows: npt.NDArray[np.int64]) -> Doubles:
        """The same of the weights' squares but for the factor, fast, with the rounding of float32."""
        if self.also is not None:
            return self.row_damage(squared, rows)
        if self.columns is None:
            weights: Doubles = squared.sum(axis=1).astype(np.float64)
        else:
            weights = np.einsum("ij,j->i", squared, self.columns.astype(np.float32)).astype(np.float64)
        return weights if self.rows is None else weights * self.rows[rows]


def best_score(scores: Collection[str], asked: str) -> str:
    """``asked``, or for :data:`AUTO` the first of :data:`BEST` among ``scores``."""
    return next((score for score in BEST if score in scores), WEIGHT_MSE) if asked == AUTO else asked


def mopeq_score(norms: Mapping[str, float], n_weights: Mapping[str, int]) -> float:
    """S of one expert from |W|_F and the number of weights of each of its matrices (by projection).

    A matrix of zeros has no curvature to speak of and counts as 0.
    """
    return math.fsum((n_weights[key] - 1) / (n_weights[key] * norm) for key, norm in sorted(norms.items()) if norm > 0)


def hybrid_scores(frequency: Sequence[float], mopeq: Sequence[float]) -> Doubles:
    """Of each expert of one layer [n_expert]: its tokens times its S, each over the layer's mean.

    A statistic that is zero for all of them tells nothing and counts as 1.
    """

    def normalised(values: Sequence[float]) -> Doubles:
        array = np.asarray(values, dtype=np.float64)
        mean = array.mean()
        return np.asarray(array / mean) if mean > 0 else np.ones_like(array)

    return normalised(frequency) * normalised(mopeq)
