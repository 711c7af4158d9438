"""How sure a measurement is, by drawing its windows of text anew (the bootstrap), paired where two are compared.

Windows and not tokens are drawn: the tokens of one window hang together.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.stats import rankdata, spearmanr

from mopeq_edge.sensitivity.scores import Doubles

RESAMPLES = 4000
CONFIDENCE = 0.95
SEED = 1


@dataclass(frozen=True)
class Estimate:
    """A ``value`` with its interval of 95 % by percentiles; NaN throughout where there is none."""

    value: float
    low: float
    high: float


def mean_estimate(windows: Sequence[float] | Doubles) -> Estimate:
    """The mean of ``windows`` [n_windows]; for a difference of two files give their paired differences."""
    values = np.asarray(windows, dtype=np.float64)
    return _estimate(float(values.mean()), _draws(len(values)) @ values)


def ratio_estimate(windows: Sequence[float] | Doubles, base: Sequence[float] | Doubles) -> Estimate:
    """The mean of ``windows`` [n_windows] over that of ``base``, whose windows are the same: drawn together."""
    values, others = np.asarray(windows, dtype=np.float64), np.asarray(base, dtype=np.float64)
    draws = _draws(len(values))
    return _estimate(float(values.mean() / others.mean()), (draws @ values) / (draws @ others))


def rank_correlation(predicted: npt.ArrayLike, measured: npt.ArrayLike) -> float:
    """Spearman's rho of two series [n]; NaN if one of them is constant or n < 3."""
    x, y = np.asarray(predicted, dtype=np.float64), np.asarray(measured, dtype=np.float64)
    if len(x) < 3 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return float("nan")
    return float(spearmanr(x, y).statistic)


def rank_estimate(predicted: npt.ArrayLike, by_window: Doubles) -> Estimate:
    """Spearman's rho of ``predicted`` [n] with the means over windows of ``by_window`` [n, n_windows].

    The interval says how sure the measurement is: the text varies, the n files do not.
    """
    value = rank_correlation(predicted, by_window.mean(axis=1))
    if np.isnan(value):
        return Estimate(value, value, value)
    return _estimate(value, _rho(np.asarray(predicted, dtype=np.float64), _draws(by_window.shape[1]) @ by_window.T))


def mean_rank_estimate(groups: Sequence[tuple[Doubles, Doubles]]) -> Estimate:
    """The mean of rho over ``groups`` of (predicted, by_window), whose windows are the same; groups without are left
    out."""
    known = [(x, y) for x, y in groups if not np.isnan(rank_correlation(x, y.mean(axis=1)))]
    if not known:
        return Estimate(float("nan"), float("nan"), float("nan"))
    value = float(np.mean([rank_correlation(x, y.mean(axis=1)) for x, y in known]))
    draws = _draws(known[0][1].shape[1])
    return _estimate(value, np.mean([_rho(x, draws @ y.T) for x, y in known], axis=0))


@functools.lru_cache(maxsize=4)
def _draws(n_windows: int) -> Doubles:
    """[RESAMPLES, n_windows]: how often each window is drawn, over their number. The same for every measurement."""
    rng = np.random.default_rng(SEED)
    return np.asarray(rng.multinomial(n_windows, np.full(n_windows, 1 / n_windows), RESAMPLES) / n_windows)


def _rho(predicted: Doubles, measured: Doubles) -> Doubles:
    """[n_draws] of ``measured`` [n_draws, n]."""
    x = rankdata(predicted)
    y = rankdata(measured, axis=1)
    x = x - x.mean()
    y = y - y.mean(axis=1, keepdims=True)
    with np.errstate(invalid="ignore"):
        return np.asarray((y @ x) / np.sqrt((x @ x) * (y * y).sum(axis=1)))


def _estimate(value: float, draws: Doubles) -> Estimate:
    low, high = np.nanpercentile(draws, [50 * (1 - CONFIDENCE), 50 * (1 + CONFIDENCE)])
    return Estimate(value, float(low), float(high))
