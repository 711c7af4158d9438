"""The paper's precision of every expert (MoPEQ, arXiv 2509.02512), and the order in which it grows or shrinks.

Experts are clustered by their score into three; the cluster of the highest mean gets 4 bit, the middle one 3, the
lowest 2. Here these are the classes 2, 1 and 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction

from mopeq_edge.plan.kmeans import clusters
from mopeq_edge.plan.options import PER_LAYER
from mopeq_edge.sensitivity.scores import Doubles

Expert = tuple[int, int]
"""(layer, expert)"""

Scores = Mapping[int, Doubles]
"""[n_expert] by layer."""

N_CLASSES = 3
CLASS_OF_CLUSTER: Mapping[int, tuple[int, ...]] = {0: (), 1: (1,), 2: (0, 2), 3: (0, 1, 2)}
"""Class of each cluster, by the number of clusters. Two distinct scores are the highest and the lowest; equal
scores, or one expert, are neither and get the middle class."""


def classes_of(scores: Scores, scope: str) -> dict[Expert, int]:
    """The class of every expert, clustered within each layer or over the model."""
    found: dict[Expert, int] = {}
    for unit in _units(scores, scope):
        numbers = clusters([float(scores[layer][expert]) for layer, expert in unit], N_CLASSES)
        of_cluster = CLASS_OF_CLUSTER[max(numbers, default=-1) + 1]
        found.update({expert: of_cluster[number] for expert, number in zip(unit, numbers, strict=True)})
    return found


def steps(scores: Scores, scope: str, classes: Mapping[Expert, int], *, up: bool) -> list[Expert]:
    """All steps from ``classes`` to the highest class for everyone (``up``), or to the lowest, in order.

    Each step moves one expert by one class. Experts go in the order of their score (equal ones: lower layers and
    numbers count as higher), so a lower score never gets more bits than a higher one of its unit. Both boundaries
    of all units arrive together: of the experts beyond a boundary, the k-th of n moves at k/n of the way.
    """
    moves: list[tuple[Fraction, int, int, Expert]] = []
    for number, unit in enumerate(_units(scores, scope)):
        order = sorted(unit, key=lambda expert: (-float(scores[expert[0]][expert[1]]), expert))
        boundaries = (0, 1) if up else (1, 0)
        for turn, boundary in enumerate(boundaries):
            # up: those at or below the boundary's lower class, from the highest score; down: those above, from the
            # lowest
            beyond = [e for e in order if (classes[e] <= boundary) == up]
            moves += [
                (Fraction(k, len(beyond)), number, turn, expert)
                for k, expert in enumerate(beyond if up else reversed(beyond), 1)
            ]
    return [expert for *_, expert in sorted(moves)]


def _units(scores: Scores, scope: str) -> Sequence[list[Expert]]:
    """The experts that are clustered together."""
    layers = [[(layer, expert) for expert in range(len(scores[layer]))] for layer in sorted(scores)]
    return layers if scope == PER_LAYER else [[expert for layer in layers for expert in layer]]
