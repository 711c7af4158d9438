"""The types of a plan expert by expert, to be handed out in another way."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from mopeq_edge.expert_groups.layout import Types, groups_of
from mopeq_edge.ggml.types import GgmlType
from mopeq_edge.plan.artifact import Plan
from mopeq_edge.source.model import SourceTensor

ExpertTypes = Mapping[str, Sequence[GgmlType]]
"""The type of every expert [n_expert], by stack."""


def expert_types(plan: Plan, stacks: Iterable[SourceTensor]) -> dict[str, list[GgmlType]]:
    """The type that ``plan`` gives each expert of each of ``stacks``."""
    written = plan.type_of()
    found: dict[str, list[GgmlType]] = {}
    for stack in stacks:
        kind = written[stack.name]
        if isinstance(kind, GgmlType):
            found[stack.name] = [kind] * stack.n_matrices
        else:
            of_expert = {expert: group.type for group in kind for expert in group.experts}
            found[stack.name] = [of_expert[expert] for expert in range(stack.n_matrices)]
    return found


def with_experts(plan: Plan, experts: ExpertTypes) -> Types:
    """The types of ``plan`` with those of ``experts`` in place of its own."""
    return {**plan.type_of(), **{name: groups_of(kinds) for name, kinds in experts.items()}}
