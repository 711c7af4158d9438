"""A score corrected by measured maps: a factor for each layer, and how well it predicts a map that it has not seen.

A score may be right about a layer's experts and wrong about the layer: errors meet in later layers. The factors are
fitted by ridge regression to one common factor, so that a few maps do.
"""

from __future__ import annotations

import numpy as np

from mopeq_edge.sensitivity.scores import Doubles

RIDGE = 0.01
"""Weight of the distance from the common factor, over the mean square of a layer's damage."""
FEWEST_MAPS = 12


def layer_factors(damage: Doubles, measured: Doubles) -> Doubles:
    """[n_layers] of ``damage`` [n_maps, n_layers] to explain ``measured`` [n_maps] up to a constant; none below 0."""
    x, y = damage - damage.mean(axis=0), measured - measured.mean()
    whole = x.sum(axis=1)
    common = max(0.0, float(whole @ y) / float(whole @ whole)) if whole.any() else 0.0
    gram = x.T @ x
    ridge = RIDGE * np.trace(gram) / len(gram) * np.eye(len(gram))
    if not gram.any():
        return np.full(len(gram), common)
    return np.asarray(np.maximum(common + np.linalg.solve(gram + ridge, x.T @ (y - common * whole)), 0.0))


def left_out(damage: Doubles, measured: Doubles) -> Doubles:
    """[n_maps]: each map predicted by factors that were fitted to the others."""
    found = np.empty(len(measured))
    for i in range(len(measured)):
        others = np.arange(len(measured)) != i
        factors = layer_factors(damage[others], measured[others])
        found[i] = measured[others].mean() + (damage[i] - damage[others].mean(axis=0)) @ factors
    return found
