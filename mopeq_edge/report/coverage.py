"""What the calibration text reached: tokens of every expert, and experts that got none."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from mopeq_edge.calibrate.statistics import Routing
from mopeq_edge.plan.forecast import routing_skew


@dataclass(frozen=True)
class LayerCoverage:
    """Tokens of the experts of one layer; ``unrouted``: those that no token reached."""

    layer: int
    least: int
    median: float
    most: int
    total: int
    unrouted: tuple[int, ...]


@dataclass(frozen=True)
class Coverage:
    """``n_tokens`` of the text; ``skew``: :func:`mopeq_edge.plan.forecast.routing_skew`."""

    n_tokens: int
    skew: float
    layers: tuple[LayerCoverage, ...]

    @property
    def n_unrouted(self) -> int:
        return sum(len(layer.unrouted) for layer in self.layers)

    def as_dict(self) -> dict[str, Any]:
        layers = [{**vars(layer), "unrouted": list(layer.unrouted)} for layer in self.layers]
        return {"layers": layers, "n_tokens": self.n_tokens, "routing_skew": self.skew, "unrouted": self.n_unrouted}


def coverage(routing: Routing) -> Coverage:
    """Of all layers that have a router."""
    layers = []
    for layer, counts in sorted(routing.counts.items()):
        reached = [int(expert) for expert in np.flatnonzero(counts == 0)]
        least, most, total = (round(float(value)) for value in (counts.min(), counts.max(), counts.sum()))
        layers.append(LayerCoverage(layer, least, float(np.median(counts)), most, total, tuple(reached)))
    return Coverage(routing.n_tokens, routing_skew(routing), tuple(layers))
