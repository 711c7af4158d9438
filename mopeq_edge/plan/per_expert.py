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
from mopeq_edge.plan.hull import NEVER
from mopeq_edge.plan.menu_problem import Problem
from mopeq_edge.plan.menus import MenuKnapsack
from mopeq_edge.source.model import Source, SourceTensor


class PerExpertPlans:
    """Per-expert plans of one source for any number of budgets.

    ``allowed`` has the candidate types and their damages [n_types, n_matrices] of each quantizable tensor.
    """

    def __init__(self, source: Source, kvs: Mapping[str, KV], allowed: Mapping[str, Allowed]) -> None:
        self._source, self._kvs = source, kvs
        self._tensors = [t for t in source.tensors if t.name in allowed]
        self._kinds = sorted(
            {kind for a in allowed.values() for kind in a.types}, key=lambda kind: (kind.bpw, kind.name)
        )
        as_stored = file_layout(kvs, source.tensors, {t.name: t.type for t in source.tensors})
        self._alignment = as_stored.alignment
        self._version = len(encode_kv(VERSION_KEY, uint32(VERSION)))
        self._fixed = as_stored.header_end + self._version
        self._fixed += sum(pad(t.nbytes, self._alignment) for t in source.tensors if t.name not in allowed)
        self._problem = _problem(self._tensors, self._kinds, allowed, self._alignment, kvs)
        self._knapsack = MenuKnapsack(self._problem)

    def plan(self, stock: Plan, proven: bool) -> Plan:
        """The best per-expert plan within ``stock``'s budget; the stock plan itself if that is no worse.

        The predicted size is the written size, to the byte. Unless it is to be ``proven``, there is no gap.
        """
        assert stock.budget_bytes is not None, "the knapsack has a budget"
        # All data is padded, so the header may fill the last whole piece of the budget
        room = stock.budget_bytes // self._alignment * self._alignment - self._fixed
        found, bound = self._knapsack.solve(room, spare=self._version, proven=proven)
        if found is None or found.damage >= stock.damage:
            return replace(stock, layout=PER_EXPERT, gap=_gap(stock.damage, bound))
        tensors, problem = self._source.tensors, self._problem
        types: dict[str, GgmlType | Grouping] = {t.name: t.type for t in tensors}
        damage_of: dict[str, float] = {}
        starts = np.searchsorted(problem.stack, np.arange(len(self._tensors) + 1))
        damages = problem.damages[np.arange(len(found.choice)), found.choice]
        for tensor, first, stop in zip(self._tensors, starts, starts[1:], strict=False):
            types[tensor.name] = groups_of([self._kinds[pick] for pick in found.choice[first:stop].tolist()])
            damage_of[tensor.name] = math.fsum(damages[first:stop].tolist())
        place = file_layout(self._kvs, tensors, types)
        nbytes = {info.name: pad(info.nbytes, place.alignment) for info in place.tensors}
        assert place.file_size <= stock.budget_bytes, "the estimate of the overhead is an upper bound"
        return replace(
            stock,
            layout=PER_EXPERT,
            file_bytes=place.file_size,
            header_bytes=len(place.header),
            damage=found.damage,
            gap=_gap(found.damage, bound),
            tensors=tuple(planned_tensor(t, types[t.name], nbytes, damage_of.get(t.name, 0.0)) for t in tensors),
        )


def _gap(damage: float, bound: float | None) -> float | None:
    if bound is None:
        return None
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
    # a type's numbers side by side: that is how they are looked at
    costs = np.full((n_types, n_rows), NEVER, dtype=np.int64).T
    damages = np.full((n_types, n_rows), np.inf).T
    padding = np.zeros((len(tensors), n_types), dtype=np.int64)
    group_padding, grouped = padding.copy(), np.array([is_stack(t) for t in tensors], dtype=bool)
    first = 0
    for index, tensor in enumerate(tensors):
        own, rows = allowed[tensor.name], slice(first, first + units[index])
        first = rows.stop
        at = [column[kind] for kind in own.types]
        single = np.array([kind.nbytes(tensor.n_in * tensor.n_out) for kind in own.types])
        whole = single * tensor.n_matrices
        spare = -whole % alignment
        if grouped[index]:
            costs[rows, at], damages[rows, at] = single, own.damage.T
            padding[index, at] = spare
            group_padding[index, at] = alignment - np.gcd(single, alignment)
        else:
            costs[rows, at], damages[rows, at] = whole + spare, own.damage.sum(axis=1)
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
