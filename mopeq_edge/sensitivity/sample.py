"""Which rows of a matrix are quantized for its damage, and what they say of all rows.

Every row is read for its norm, so what a score makes of its weights themselves, x_i = sum_j columns_j w_ij^2, is known
of all. A row's damage d_i is nearly a fixed share of it, so the estimate is X sum_s d_i / sum_s x_i with X the sum over
all rows (the ratio estimator), and its error is that of the residuals d_i - (D/X) x_i, not that of the damages
(Cochran, Sampling Techniques, 6.3). It is biased by a share of its variance, which is small beside the standard error.
Of a checkpoint that takes too long to read, the drawn rows alone can be read: the estimate is then their mean times the
number of rows, with the larger error of that.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from mopeq_edge.sensitivity.scores import Doubles
from mopeq_edge.source.model import SourceTensor

SampleRows = int | Literal["auto"] | None
"""Rows that are measured of each matrix of a stack: so many, by their error, or all (None)."""

AUTO: Literal["auto"] = "auto"
FIRST_ROWS = 16
"""Rows that ``auto`` begins with."""
MOST_ROWS = 128
"""Rows that it ends with, at the most."""
ERROR = 0.05
"""Standard error of a matrix's damage, as a share of it, for which it adds rows."""
CLEARLY = 3.0
"""Standard errors of their difference from which one type is worse than another: it gets no further rows."""
WHOLE = 2**20
"""Weights up to which it measures all rows of a tensor: the time is short and the error none."""

SINGLE_MATRIX = 8
"""Times as many rows are measured of a tensor of one matrix: a stack averages over its experts or heads."""


@dataclass(frozen=True)
class Rows:
    """Rows of a matrix that are measured: ``first``, and up to ``most`` until the relative error is ``error``.

    ``only``: no others are read, so that nothing is known of these.
    """

    first: int
    most: int
    error: float = 0.0
    only: bool = False


def rows_to_measure(tensor: SourceTensor, sample: SampleRows, *, only: bool = False) -> Rows:
    """Of every matrix of ``tensor``."""
    every = tensor.n_out
    if sample is None or (sample == AUTO and tensor.n_weights <= WHOLE):
        return Rows(every, every)
    times = SINGLE_MATRIX if tensor.n_matrices == 1 else 1
    if sample == AUTO:
        return Rows(min(times * FIRST_ROWS, every), min(times * MOST_ROWS, every), ERROR, only)
    return Rows(min(times * sample, every), min(times * sample, every), only=only)


def share_read(tensors: Iterable[SourceTensor], sample: SampleRows) -> float:
    """Weights in the rows that are read where no others are, over all weights of ``tensors``."""
    read = total = 0
    for tensor in tensors:
        read += tensor.n_in * tensor.n_matrices * rows_to_measure(tensor, sample, only=True).most
        total += tensor.n_weights
    return read / total if total else 1.0


def drawn_rows(n_out: int, n: int, seed: int) -> npt.NDArray[np.int64]:
    """``n`` different row numbers, in the order in which they are measured: any first of them are a sample as well."""
    if n >= n_out:
        return np.arange(n_out)
    return np.random.default_rng(seed).permutation(n_out)[:n]


def estimate(d: Doubles, x: Doubles, total_x: float, n_out: int) -> tuple[float, float]:
    """(damage of all ``n_out`` rows, its sampling variance) from ``d`` and ``x`` [n] of the rows drawn."""
    n = len(d)
    if n >= n_out:
        return float(d.sum()), 0.0
    seen = x.sum()
    if not 0 < seen <= total_x < np.inf:
        # rows of zeros, as far as is known, or weights whose squares float32 does not hold
        mean = d.mean()
        residuals, whole = d - mean, n_out * mean
    else:
        share = d.sum() / seen
        residuals, whole = d - share * x, share * total_x
    variance = n_out * n_out / n * (1 - n / n_out) * (residuals @ residuals) / max(n - 1, 1)
    return float(whole), float(variance)


def with_pooled(damage: Doubles, variance: Doubles) -> Doubles:
    """``variance`` [..., n_matrices], half of it the stack's mean relative variance.

    A few rows seldom have one that is far from the others in them, so that a matrix's own variance is mostly too small
    and sometimes far too large.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        relative = np.where(damage > 0, variance / damage**2, 0.0)
    return np.asarray(0.5 * (relative + relative.mean(axis=-1, keepdims=True)) * damage**2)


def rows_needed(damage: Doubles, variance: Doubles, n: int, wanted: Rows) -> npt.NDArray[np.int64]:
    """Rows [n_types] for the wanted error of types with ``damage`` and ``variance`` [n_types] from ``n`` rows."""
    with np.errstate(divide="ignore", invalid="ignore"):
        times = np.where(damage > 0, variance / (damage * wanted.error) ** 2, 0.0)
    needed = np.minimum(np.ceil(n * np.maximum(times, 1.0)), wanted.most)
    return np.asarray(needed, dtype=np.int64)


def dominated(bits: Doubles, damage: Doubles, variance: Doubles) -> npt.NDArray[np.bool_]:
    """Types [n_types] that another of no more ``bits`` is clearly better than, with the sampling errors known.

    Both are measured on the same rows, so that their errors are not independent, but mostly the same: to see them as
    independent keeps more types.
    """
    apart = damage[:, None] - damage[None, :] > CLEARLY * np.sqrt(variance[:, None] + variance[None, :])
    return np.asarray((apart & (bits[None, :] <= bits[:, None])).any(axis=1))
