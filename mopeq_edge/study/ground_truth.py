"""What one expert, or one projection of one layer, hurts when it alone is quantized: what a sensitivity predicts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mopeq_edge.errors import PlanError
from mopeq_edge.expert_groups.layout import Types, groups_of
from mopeq_edge.ggml.types import GgmlType
from mopeq_edge.plan.expert_scores import expert_scores
from mopeq_edge.plan.fixed import fixed_plan
from mopeq_edge.sensitivity.scores import FREQUENCY, HYBRID, MOPEQ, Doubles
from mopeq_edge.source.model import SourceTensor
from mopeq_edge.study.bootstrap import Estimate, mean_rank_estimate, rank_estimate
from mopeq_edge.study.cases import Case
from mopeq_edge.study.rows import Row
from mopeq_edge.study.setup import Setup

EXPERT, PROJECTION = "expert", "projection"
UNITS = (EXPERT, PROJECTION)
ALONE = " alone"
"""Suffix of a score that ranks experts by itself, without their errors."""


@dataclass(frozen=True)
class Unit:
    """What is quantized at once: one expert of all ``stacks`` of a layer, or all experts of one stack."""

    layer: int
    stacks: tuple[SourceTensor, ...]
    expert: int | None


@dataclass(frozen=True)
class Correlation:
    """Spearman's rho of ``score`` with the measured KLD over ``n`` units; ``scope`` is all, a layer, or their mean."""

    score: str
    scope: str
    n: int
    rho: Estimate


def units_of(setup: Setup, kind: str) -> list[Unit]:
    """All units of ``kind``, layer by layer."""
    layers: dict[int, list[SourceTensor]] = {}
    for stack in setup.stacks:
        if stack.layer is not None:
            layers.setdefault(stack.layer, []).append(stack)
    found: list[Unit] = []
    for layer, stacks in sorted(layers.items()):
        if kind == EXPERT:
            found.extend(Unit(layer, tuple(stacks), expert) for expert in range(stacks[0].n_matrices))
        else:
            found.extend(Unit(layer, (stack,), None) for stack in stacks)
    return found


def unit_cases(setup: Setup, units: Sequence[Unit], kind: GgmlType) -> list[Case]:
    """A file for each unit: the source with that unit in ``kind``. Raises :class:`PlanError` if it cannot be so."""
    source = setup.context.source
    stored: Types = {t.name: t.type for t in source.tensors}
    cases = []
    for unit in units:
        own: dict[str, object] = {}
        for stack in unit.stacks:
            if kind.name not in setup.table.errors[stack.name].types or kind is stack.type:
                raise PlanError(
                    f"--type {kind.name}: was not measured for '{stack.name}', found "
                    f"{', '.join(setup.table.errors[stack.name].types)}; choose one of these or add it to --types"
                )
            experts = range(stack.n_matrices) if unit.expert is None else (unit.expert,)
            own[stack.name] = groups_of([kind if e in experts else stack.type for e in range(stack.n_matrices)])
        types: Types = {**stored, **own}  # type: ignore[dict-item]
        label = EXPERT if unit.expert is not None else PROJECTION
        what = unit.expert if unit.expert is not None else unit.stacks[0].projection
        sensitivity = setup.table.scores[0]
        plan = fixed_plan(
            source, setup.table, setup.kvs, types, planner=label, sensitivity=sensitivity, budget_bytes=None
        )
        name = f"{label}-{kind.name}-{unit.layer}-{what}"
        cases.append(Case(name, label, label, sensitivity, plan.layout, None, plan))
    return cases


def predictions(setup: Setup, units: Sequence[Unit], kind: GgmlType) -> dict[str, Doubles]:
    """What each score says of the units [n_units]: its damage in ``kind``, and of experts the rank alone."""
    found: dict[str, Doubles] = {}
    for score in setup.table.scores:
        values = []
        for unit in units:
            rows = [setup.table.errors[s.name].damage[score][_row(setup, s, kind)] for s in unit.stacks]
            values.append(sum(float(row.sum() if unit.expert is None else row[unit.expert]) for row in rows))
        found[score] = np.array(values)
    if all(unit.expert is not None for unit in units):
        for score in (MOPEQ, FREQUENCY, HYBRID):
            if score in setup.table.scores:
                scores = expert_scores(setup.stacks, setup.table, score, lambda _: kind)
                found[score + ALONE] = np.array([scores[unit.layer][unit.expert or 0] for unit in units])
    return found


def correlations(
    units: Sequence[Unit], predicted: Mapping[str, Doubles], rows: Sequence[Row], *, per_layer: bool
) -> list[Correlation]:
    """Of every score over all units, and with ``per_layer`` of each layer and their mean; best score first."""
    by_window = np.array([row.kld_by_window for row in rows])
    layer_of = np.array([unit.layer for unit in units])
    found: list[tuple[float, list[Correlation]]] = []
    for score, values in predicted.items():
        overall = rank_estimate(values, by_window)
        own = [Correlation(score, "all", len(units), overall)]
        if per_layer:
            parts = [(values[layer_of == n], by_window[layer_of == n]) for n in sorted(set(layer_of.tolist()))]
            own.append(Correlation(score, "mean of layers", len(units), mean_rank_estimate(parts)))
            own += [
                Correlation(score, f"layer {n}", len(x), rank_estimate(x, y))
                for n, (x, y) in zip(sorted(set(layer_of.tolist())), parts, strict=True)
            ]
        found.append((overall.value if np.isfinite(overall.value) else -2.0, own))
    return [item for _, own in sorted(found, key=lambda pair: -pair[0]) for item in own]


def _row(setup: Setup, stack: SourceTensor, kind: GgmlType) -> int:
    return setup.table.errors[stack.name].types.index(kind.name)
