"""Plans of the per-expert layout: every expert of a stack may have a type of its own."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from mopeq_edge.expert_groups.layout import (
    MAX_GROUPS,
    VERSION,
    VERSION_KEY,
    Grouping,
    file_layout,
    group_name,
    groups_of,
    map_name,
)
from mopeq_edge.ggml.types import BY_NAME, I32, GgmlType
from mopeq_edge.gguf_file import KV, TensorInfo, pad
from mopeq_edge.gguf_layout import encode_kv, tensor_header_bytes, uint32
from mopeq_edge.plan.artifact import MIXED, PER_EXPERT, Plan, PlannedGroup, PlannedTensor, id_runs
from mopeq_edge.plan.candidates import Allowed
from mopeq_edge.plan.menu_problem import Problem
from mopeq_edge.plan.menus import solve_menus
from mopeq_edge.plan.path import NEVER
from mopeq_edge.source.model import Source, SourceTensor


def per_expert_plan(source: Source, kvs: Mapping[str, KV], allowed: Mapping[str, Allowed], stock: Plan) -> Plan:
    """The best per-expert plan within ``stock``'s budget; the stock plan itself if that is no worse.

    ``allowed`` has the candidate types and their damages [n_types, n_matrices] of each quantizable tensor. The
    predicted size is the written size, to the byte.
    """
    assert stock.budget_bytes is not None, "the knapsack has a budget"
    tensors = [t for t in source.tensors if t.name in allowed]
    kinds = sorted({kind for a in allowed.values() for kind in a.types}, key=lambda kind: (kind.bpw, kind.name))
    as_stored = file_layout(kvs, source.tensors, {t.name: t.type for t in source.tensors})
    version = len(encode_kv(VERSION_KEY, uint32(VERSION)))
    fixed = as_stored.header_end + version
    fixed += sum(pad(t.nbytes, as_stored.alignment) for t in source.tensors if t.name not in allowed)
    # All data is padded, so the header may fill the last whole piece of the budget
    room = stock.budget_bytes // as_stored.alignment * as_stored.alignment - fixed
    problem = _problem(tensors, kinds, allowed, as_stored.alignment, kvs)
    found, bound = solve_menus(problem, room, spare=version)
    if found is None or found.damage >= stock.damage:
        return replace(stock, layout=PER_EXPERT, gap=_gap(stock.damage, bound))
    types: dict[str, GgmlType | Grouping] = {t.name: t.type for t in source.tensors}
    damage_of: dict[str, float] = {}
    starts = np.searchsorted(problem.stack, np.arange(len(tensors) + 1))
    for index, tensor in enumerate(tensors):
        rows = range(starts[index], starts[index + 1])
        types[tensor.name] = groups_of([kinds[found.choice[row]] for row in rows])
        damage_of[tensor.name] = math.fsum(float(problem.damages[row, found.choice[row]]) for row in rows)
    place = file_layout(kvs, source.tensors, types)
    nbytes = {info.name: pad(info.nbytes, place.alignment) for info in place.tensors}
    assert place.file_size <= stock.budget_bytes, "the estimate of the overhead is an upper bound"
    return replace(
        stock,
        layout=PER_EXPERT,
        file_bytes=place.file_size,
        header_bytes=len(place.header),
        damage=found.damage,
        gap=_gap(found.damage, bound),
        tensors=tuple(planned_tensor(t, types[t.name], nbytes, damage_of.get(t.name, 0.0)) for t in source.tensors),
    )


def _gap(damage: float, bound: float) -> float:
    return (damage - min(bound, damage)) / damage if damage > 0 else 0.0


def _problem(
    tensors: Sequence[SourceTensor],
    kinds: Sequence[GgmlType],
    allowed: Mapping[str, Allowed],
    alignment: int,
    kvs: Mapping[str, KV],
) -> Problem:
    column = {kind: index for index, kind in enumerate(kinds)}
    units = [_units(t) for t in tensors]
    n_rows, n_types = sum(units), len(kinds)
    costs = np.full((n_rows, n_types), NEVER, dtype=np.int64)
    damages = np.full((n_rows, n_types), np.inf)
    padding = np.zeros((len(tensors), n_types), dtype=np.int64)
    group_padding, grouped = padding.copy(), np.array([is_stack(t) for t in tensors], dtype=bool)
    first = 0
    for index, tensor in enumerate(tensors):
        rows = slice(first, first + units[index])
        first = rows.stop
        for kind, damage in zip(allowed[tensor.name].types, allowed[tensor.name].damage, strict=True):
            own, at = kind.nbytes(tensor.n_in * tensor.n_out), column[kind]
            whole = own * tensor.n_matrices
            spare = -whole % alignment
            costs[rows, at] = own if grouped[index] else whole + spare
            damages[rows, at] = damage if grouped[index] else damage.sum()
            if grouped[index]:
                padding[index, at] = spare
                group_padding[index, at] = alignment - math.gcd(own, alignment)
    overhead = np.array([_overhead(t, alignment, kvs) if is_stack(t) else [0] * (MAX_GROUPS + 1) for t in tensors])
    stack = np.repeat(np.arange(len(tensors)), units)
    shape = (len(tensors), MAX_GROUPS + 1)
    return Problem(costs, damages, stack, overhead.reshape(shape).astype(np.int64), padding, group_padding, grouped)


def is_stack(tensor: SourceTensor) -> bool:
    """Whether the experts of ``tensor`` may have types of their own."""
    return tensor.projection is not None and len(tensor.shape) == 3


def expert_stacks(source: Source) -> tuple[SourceTensor, ...]:
    """The stacks that a plan chooses types for, in writing order."""
    return tuple(tensor for tensor in source.tensors if is_stack(tensor) and tensor.quantizable)


def _units(tensor: SourceTensor) -> int:
    """Types to choose: one an expert; a stack of another kind (a matrix a head) has one type."""
    return tensor.n_matrices if is_stack(tensor) else 1


def _overhead(stack: SourceTensor, alignment: int, kvs: Mapping[str, KV]) -> list[int]:
    """Bytes that 0 to MAX_GROUPS groups of ``stack`` add to a file of the stack in one tensor, beyond weights."""
    kind = BY_NAME["F32"]
    whole = tensor_header_bytes(TensorInfo(stack.name, stack.shape, kind, 0), kvs)
    group = tensor_header_bytes(TensorInfo(group_name(stack.name, 0), stack.shape, kind, 0), kvs)
    extra = [0, 0]
    for n in range(2, MAX_GROUPS + 1):
        table = TensorInfo(map_name(stack.name), (n, stack.n_matrices), I32, 0)
        extra.append(n * group + tensor_header_bytes(table, kvs) + pad(table.nbytes, alignment) - whole)
    return extra


def planned_tensor(
    tensor: SourceTensor, kind: GgmlType | Grouping, nbytes: Mapping[str, int], damage: float
) -> PlannedTensor:
    """``tensor`` in its type or groups; ``nbytes`` are the padded bytes of the file's tensors by name."""
    if isinstance(kind, GgmlType):
        return PlannedTensor(tensor.name, tensor.role.value, tensor.shape, kind.name, nbytes[tensor.name], damage)
    groups = tuple(
        PlannedGroup(group.type.name, id_runs(group.experts), nbytes[group_name(tensor.name, g)])
        for g, group in enumerate(kind)
    )
    total = sum(group.nbytes for group in groups) + nbytes[map_name(tensor.name)]
    return PlannedTensor(tensor.name, tensor.role.value, tensor.shape, MIXED, total, damage, groups)
