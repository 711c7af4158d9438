"""The precision assignment map: type, damage, sensitivity and tokens of every expert's matrices."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mopeq_edge.ggml.types import BY_NAME
from mopeq_edge.pictures.type_map import map_of_gguf, map_of_plan
from mopeq_edge.report.artifacts import Artifacts, planned_damage

DIGITS = 4
"""Significant digits of damages in the page and in the JSON."""


@dataclass(frozen=True)
class ExpertStack:
    """One stack. ``types`` [n_expert]; ``damage`` [n_expert] of these types, ``sensitivity`` [n_expert] in
    ``reference``, one type for all of the stack; None where nothing was measured."""

    layer: int
    projection: str
    types: tuple[str, ...]
    damage: tuple[float, ...] | None
    sensitivity: tuple[float, ...] | None
    reference: str | None


@dataclass(frozen=True)
class ExpertMap:
    """All stacks, by layer and projection. ``tokens[layer]`` [n_expert] of the calibration text."""

    layers: tuple[int, ...]
    projections: tuple[str, ...]
    n_expert: int
    stacks: tuple[ExpertStack, ...]
    tokens: dict[int, tuple[int, ...]] | None
    score: str | None
    unit: str | None

    def bits(self) -> dict[str, float]:
        """Bits per weight of the types that there are, rising."""
        names = {name for stack in self.stacks for name in stack.types}
        return {name: BY_NAME[name].bpw for name in sorted(names, key=lambda n: (BY_NAME[n].bpw, n))}

    def counts(self) -> dict[str, int]:
        """Matrices of each type, in the order of :meth:`bits`."""
        return {name: sum(stack.types.count(name) for stack in self.stacks) for name in self.bits()}

    def as_dict(self) -> dict[str, Any]:
        return {
            "bits_per_weight": self.bits(),
            "layers": list(self.layers),
            "matrices_by_type": self.counts(),
            "n_expert": self.n_expert,
            "projections": list(self.projections),
            "score": self.score,
            "stacks": [
                {
                    "damage": _list(stack.damage),
                    "layer": stack.layer,
                    "projection": stack.projection,
                    "reference_type": stack.reference,
                    "sensitivity": _list(stack.sensitivity),
                    "types": list(stack.types),
                }
                for stack in self.stacks
            ],
            "tokens": None if self.tokens is None else {str(n): list(own) for n, own in self.tokens.items()},
            "unit": self.unit,
        }


def expert_map(found: Artifacts) -> ExpertMap:
    """Of the GGUF, or of the plan where there is none. Raises :class:`MopeqError` for a model without experts."""
    plan, table = found.plan, found.table
    if found.path is not None:
        types = map_of_gguf(found.path)
    else:
        assert plan is not None
        types = map_of_plan(plan, found.name)
    planned = {tensor.name: tensor for tensor in plan.tensors} if plan is not None else {}
    stacks = []
    for (layer, projection), kinds in types.types.items():
        name = f"blk.{layer}.ffn_{projection}_exps.weight"
        damage, sensitivity, reference = None, None, None
        if plan is not None and table is not None:
            damage = planned_damage(table, plan.sensitivity, planned[name])
            errors = table.errors[name]
            row = errors.middle_type()
            if row is not None:
                reference, sensitivity = errors.types[row], errors.damage[plan.sensitivity][row]
        stacks.append(
            ExpertStack(
                layer,
                projection,
                tuple(kind.name for kind in kinds),
                None if damage is None else tuple(map(float, damage)),
                None if sensitivity is None else tuple(map(float, sensitivity)),
                reference,
            )
        )
    tokens = None
    if found.routing is not None:
        counts = found.routing.counts
        tokens = {n: tuple(round(float(c)) for c in counts[n]) for n in types.layers if n in counts}
    priced = plan if table is not None else None
    return ExpertMap(
        types.layers,
        types.projections,
        types.n_expert,
        tuple(stacks),
        tokens,
        priced.sensitivity if priced is not None else None,
        priced.unit if priced is not None else None,
    )


def rounded(value: float) -> float:
    """To :data:`DIGITS` significant digits."""
    return float(f"{value:.{DIGITS}g}")


def _list(values: tuple[float, ...] | None) -> list[float] | None:
    return None if values is None else [rounded(value) for value in values]
