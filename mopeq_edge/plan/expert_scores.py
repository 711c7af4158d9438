"""One number an expert, for planners that rank experts: by every sensitivity there is."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from mopeq_edge.errors import PlanError
from mopeq_edge.ggml.types import GgmlType
from mopeq_edge.sensitivity.scores import FREQUENCY, HYBRID, MOPEQ, WEIGHT_MSE, Doubles
from mopeq_edge.sensitivity.table import SensitivityTable
from mopeq_edge.source.model import SourceTensor

RANKS_EXPERTS: frozenset[str] = frozenset({FREQUENCY, HYBRID})
"""Sensitivities whose damage is one number of the expert times its squared error."""

DIGITS = 12
"""Significant digits of a score that is recovered as a quotient, so that equal experts stay equal."""


def expert_scores(
    stacks: Sequence[SourceTensor],
    table: SensitivityTable,
    sensitivity: str,
    type_of: Callable[[SourceTensor], GgmlType],
) -> Mapping[int, Doubles]:
    """[n_expert] by layer, for the layers of ``stacks``.

    ``mopeq`` is S(e) of the paper. ``frequency`` and ``hybrid`` have a number of their own for every expert, which is
    recovered from the table. Of the others it is the expert's damage with each of its matrices in ``type_of``,
    summed. Raises :class:`PlanError` for a table that lacks the score.
    """
    layers: dict[int, list[SourceTensor]] = {}
    for stack in stacks:
        if stack.layer is not None:
            layers.setdefault(stack.layer, []).append(stack)
    scores: dict[int, Doubles] = {}
    for layer, own in sorted(layers.items()):
        if sensitivity == MOPEQ:
            found = table.mopeq.get(layer)
        else:
            found = _damage(own, table, sensitivity, type_of)
            if sensitivity in RANKS_EXPERTS:
                found = _quotient(found, _damage(own, table, WEIGHT_MSE, type_of))
        n_expert = own[0].n_matrices
        if found is None or len(found) != n_expert or not np.isfinite(found).all():
            raise PlanError(
                f"layer {layer}: the sensitivity table has no '{sensitivity}' score for each of its {n_expert} "
                "experts; run sensitivity again on this source"
            )
        scores[layer] = found
    return scores


def _damage(
    stacks: Sequence[SourceTensor],
    table: SensitivityTable,
    sensitivity: str,
    type_of: Callable[[SourceTensor], GgmlType],
) -> Doubles:
    total = np.zeros(stacks[0].n_matrices)
    for stack in stacks:
        errors = table.errors[stack.name]
        total += errors.damage[sensitivity][errors.types.index(type_of(stack).name)]
    return total


def _quotient(damage: Doubles, squared_error: Doubles) -> Doubles:
    """The factor of each expert; 0 for one without error (all zeros): it needs no bits."""
    found = np.divide(damage, squared_error, out=np.zeros_like(damage), where=squared_error > 0)
    return np.array([float(f"{value:.{DIGITS}g}") for value in found])
