"""Other types for the experts of a plan, in at most its bytes: what a sensitivity must beat.

A random and an inverse map keep each stack's multiset of types and hand whole multisets from stack to stack, so their
files have the plan's bytes exactly: the groups of a stack cost bytes of their own, and a free draw would pay for more
of them than the plan.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import numpy as np

from mopeq_edge.errors import PlanError
from mopeq_edge.expert_groups.layout import Types, file_layout
from mopeq_edge.ggml.types import BY_NAME, GgmlType
from mopeq_edge.gguf_file import KV
from mopeq_edge.gguf_layout import padded_nbytes
from mopeq_edge.plan.artifact import Plan
from mopeq_edge.plan.solve import Group, solve
from mopeq_edge.sensitivity.scores import Doubles
from mopeq_edge.sensitivity.table import SensitivityTable
from mopeq_edge.source.model import Source, SourceTensor
from mopeq_edge.study.expert_types import ExpertTypes, expert_types

RANDOM, INVERSE, UNIFORM, PRESETS, HAND = "random", "inverse", "uniform", "presets", "hand"
CONTROLS: Mapping[str, str] = {
    RANDOM: "the plan's expert types, at random",
    INVERSE: "the plan's expert types, in the reverse order of its score",
    UNIFORM: "the best one type for each projection",
    PRESETS: "llama-quantize's largest presets that fit",
    HAND: "gate and up low, down one step higher, in the stock layout",
}

HAND_LADDER = tuple(BY_NAME[name] for name in ("IQ2_XS", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q8_0"))
"""Steps of the hand recipe: the K-types, and below them the one that llama-quantize's IQ2 presets mix with Q2_K."""


def random_map(stacks: Sequence[SourceTensor], types: ExpertTypes, seed: int) -> dict[str, list[GgmlType]]:
    """``types`` handed out anew: stacks of one projection exchange theirs, then each stack's experts do.

    Every expert gets each type with its share in the projection.
    """
    rng = np.random.default_rng(seed)
    found: dict[str, list[GgmlType]] = {}
    for alike in _alike(stacks):
        given = rng.permutation(len(alike))
        for stack, other in zip(alike, given, strict=True):
            own = types[alike[other].name]
            found[stack.name] = [own[i] for i in rng.permutation(len(own))]
    return found


def inverse_map(
    stacks: Sequence[SourceTensor], types: ExpertTypes, scores: Mapping[str, Doubles]
) -> dict[str, list[GgmlType]]:
    """``types`` in the reverse order of ``scores`` ([n_expert] by stack): the most sensitive gets the least bits.

    Among the stacks of one projection the one of the highest sum gets the fewest bits, and so do its experts. Of
    equal scores the first counts as higher.
    """
    found: dict[str, list[GgmlType]] = {}
    for alike in _alike(stacks):
        by_score = sorted(alike, key=lambda stack: -float(scores[stack.name].sum()))
        by_bits = sorted((sorted(types[s.name], key=_bits) for s in alike), key=lambda own: sum(k.bpw for k in own))
        for stack, own in zip(by_score, by_bits, strict=True):
            order = np.argsort(-scores[stack.name], kind="stable")
            handed = dict(zip(order.tolist(), own, strict=True))
            found[stack.name] = [handed[expert] for expert in range(len(own))]
    return found


def summed_scores(
    stacks: Sequence[SourceTensor], types: ExpertTypes, table: SensitivityTable, score: str
) -> dict[str, Doubles]:
    """One number an expert [n_expert] by stack: its damage summed over all types that ``types`` has anywhere."""
    used = {kind.name for own in types.values() for kind in own}
    found: dict[str, Doubles] = {}
    for stack in stacks:
        errors = table.errors[stack.name]
        rows = [row for row, name in enumerate(errors.types) if name in used]
        found[stack.name] = errors.damage[score][rows].sum(axis=0)
    return found


def uniform_map(
    source: Source, stacks: Sequence[SourceTensor], plan: Plan, table: SensitivityTable, kvs: Mapping[str, KV]
) -> dict[str, list[GgmlType]]:
    """One type for each projection in all layers, of least damage by ``plan``'s score in at most its bytes.

    Raises :class:`PlanError` if no choice fits.
    """
    asked = {*plan.types, *(kind.name for own in expert_types(plan, stacks).values() for kind in own)}
    projections = sorted({str(stack.projection) for stack in stacks})
    types: list[list[str]] = []
    groups: list[Group] = []
    for projection in projections:
        own = [stack for stack in stacks if stack.projection == projection]
        # the last type of each is its own, without loss
        names = [n for n in table.errors[own[0].name].types[:-1] if n in asked and _measured(own, table, n)]
        damage = [sum(float(_damage(s, table, plan.sensitivity, n).sum()) for s in own) for n in names]
        costs = [sum(padded_nbytes(s.shape, BY_NAME[n]) for s in own) for n in names]
        types.append(names)
        groups.append(Group(projection, tuple(costs), tuple(damage)))
    stored: Types = {**plan.type_of(), **{stack.name: stack.type for stack in stacks}}
    rest = file_layout(kvs, source.tensors, stored).file_size - sum(padded_nbytes(s.shape, s.type) for s in stacks)
    choice = solve(groups, plan.file_bytes - rest).choice
    of = {p: BY_NAME[names[pick]] for p, names, pick in zip(projections, types, choice, strict=True)}
    return {stack.name: [of[str(stack.projection)]] * stack.n_matrices for stack in stacks}


def hand_map(
    source: Source, stacks: Sequence[SourceTensor], plan: Plan, kvs: Mapping[str, KV]
) -> dict[str, list[GgmlType]]:
    """Down one step of :data:`HAND_LADDER` above gate and up, as high as ``plan``'s bytes allow.

    Raises :class:`PlanError` if not even the lowest pair fits.
    """
    for low, high in reversed(list(itertools.pairwise(HAND_LADDER))):
        kinds = {stack.name: high if stack.projection == "down" else low for stack in stacks}
        if not all(kinds[stack.name].fits(stack.n_in) for stack in stacks):
            continue
        if file_layout(kvs, source.tensors, {**plan.type_of(), **kinds}).file_size <= plan.file_bytes:
            return {stack.name: [kinds[stack.name]] * stack.n_matrices for stack in stacks}
    raise PlanError(f"{plan.file_bytes} bytes: no pair of neighbours of {', '.join(k.name for k in HAND_LADDER)} fits")


def _alike(stacks: Sequence[SourceTensor]) -> list[list[SourceTensor]]:
    """Stacks whose types can change places and leave the file's size: same projection, shape and length of name."""
    found: dict[tuple[str | None, tuple[int, ...], int], list[SourceTensor]] = {}
    for stack in stacks:
        found.setdefault((stack.projection, stack.shape, len(stack.name)), []).append(stack)
    return list(found.values())


def _bits(kind: GgmlType) -> tuple[float, str]:
    return kind.bpw, kind.name


def _measured(stacks: Sequence[SourceTensor], table: SensitivityTable, name: str) -> bool:
    return all(name in table.errors[stack.name].types for stack in stacks)


def _damage(stack: SourceTensor, table: SensitivityTable, score: str, name: str) -> Doubles:
    errors = table.errors[stack.name]
    return np.asarray(errors.damage[score][errors.types.index(name)])
