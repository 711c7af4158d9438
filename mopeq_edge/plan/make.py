"""The plan stage: least predicted damage, exact bytes within the budget. Here the stock layout, one type a tensor.

The paper's planner, which asks for no budget, is in :mod:`mopeq_edge.plan.mopeq`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from mopeq_edge.artifacts import digest
from mopeq_edge.errors import NoRoomError, PlanError
from mopeq_edge.expert_groups.layout import VERSION, VERSION_KEY
from mopeq_edge.ggml.types import BY_NAME
from mopeq_edge.gguf_file import KV
from mopeq_edge.gguf_layout import padded_nbytes, uint32
from mopeq_edge.plan.artifact import KNAPSACK, PER_EXPERT, STOCK, Plan, PlannedTensor
from mopeq_edge.plan.budget import Budget, source_header_bytes
from mopeq_edge.plan.candidates import Allowed, candidates
from mopeq_edge.plan.mopeq import map_size_range, mopeq_plan, require_map_room
from mopeq_edge.plan.options import ALWAYS, NEVER, PlanOptions
from mopeq_edge.plan.per_expert import per_expert_plan
from mopeq_edge.plan.solve import Group, largest_cost, smallest_cost, solve
from mopeq_edge.plan.split import plan_in_files, types_in_a_file
from mopeq_edge.sensitivity.scores import UNITS
from mopeq_edge.sensitivity.table import SensitivityTable
from mopeq_edge.source.model import Source, SourceTensor
from mopeq_edge.source.padded import BLOCK, PaddedSource, expert_padding, unpadded
from mopeq_edge.split import split_layouts
from mopeq_edge.units import format_bytes


@dataclass(frozen=True)
class _Choices:
    """The decision groups of a source: for each quantizable tensor its types and the solver's group."""

    tensors: Sequence[SourceTensor]
    types: Sequence[tuple[str, ...]]
    groups: Sequence[Group]
    fixed_bytes: int
    """Header and all tensors that keep their type."""


def make_plan(
    source: Source, table: SensitivityTable, kvs: Mapping[str, KV], budget: Budget | None, options: PlanOptions
) -> Plan:
    """Plan the file that ``kvs`` and ``source`` make. The predicted size is the written size, to the byte.

    The smallest and the largest file are the same in both layouts, and so are the bytes that a budget in bits per
    weight means. Where experts may be padded, both ways are planned and the one of less damage is taken, without a
    budget the smaller one. Raises :class:`PlanError` for a budget below the exact minimum, which the message states,
    and without a budget unless the paper's map is asked for.
    """
    plans: list[Plan] = []
    refused: list[PlanError] = []
    for own, own_kvs in padding_choices(source, kvs, options.pad_experts):
        try:
            plan = _plan_of(own, table, own_kvs, budget, options)
        except PlanError as error:
            refused.append(error)
        else:
            padding = own.padding if isinstance(own, PaddedSource) else None
            plans.append(replace(plan, expert_padding=padding))
    if not plans:
        raise min(refused, key=lambda error: error.smallest if isinstance(error, NoRoomError) else -1)
    best = min(plans, key=lambda plan: (0.0 if budget is None else plan.damage, plan.file_bytes))
    smallest = [plan.smallest_bytes for plan in plans] + [e.smallest for e in refused if isinstance(e, NoRoomError)]
    largest = plans[0].largest_bytes if len(plans) > 1 else size_range(source, kvs, options, has_imatrix=True)[1]
    return replace(best, smallest_bytes=min(smallest), largest_bytes=largest)


def _plan_of(
    source: Source, table: SensitivityTable, kvs: Mapping[str, KV], budget: Budget | None, options: PlanOptions
) -> Plan:
    """:func:`make_plan` of ``source`` as it is."""
    if options.precision_map is not None:
        if options.split_bytes is None:
            return mopeq_plan(source, table, kvs, budget, options)
        mapped = partial(mopeq_plan, source, table, kvs, options=options)
        return plan_in_files(mapped, source, kvs, budget, options.split_bytes)
    if budget is None:
        raise PlanError("--planner knapsack: expected a budget, found none; give one, or use --planner mopeq")
    allowed = _allowed(source, table, kvs, options)

    def planned(part: Budget | None) -> Plan:
        assert part is not None
        stock = _stock_plan(source, table, kvs, part, options, allowed)
        return stock if options.layout == STOCK else per_expert_plan(source, kvs, allowed, stock)

    if options.split_bytes is None:
        return planned(budget)
    return plan_in_files(planned, source, kvs, budget, options.split_bytes)


def _stock_plan(
    source: Source,
    table: SensitivityTable,
    kvs: Mapping[str, KV],
    budget: Budget,
    options: PlanOptions,
    allowed: Mapping[str, Allowed],
) -> Plan:
    header = source_header_bytes(source, kvs)
    choices = _choices(source, allowed, header)
    smallest = choices.fixed_bytes + smallest_cost(choices.groups)
    largest = choices.fixed_bytes + largest_cost(choices.groups)
    limit = budget.limit(source, kvs)
    _require_room(budget, limit, smallest)
    solution = solve(choices.groups, limit - choices.fixed_bytes)
    chosen = {
        tensor.name: (types[pick], group.costs[pick], group.damages[pick])
        for tensor, types, group, pick in zip(
            choices.tensors, choices.types, choices.groups, solution.choice, strict=True
        )
    }
    planned = []
    for t in source.tensors:
        kind, nbytes, damage = chosen.get(t.name, (t.type.name, padded_nbytes(t.shape, t.type), 0.0))
        planned.append(PlannedTensor(t.name, t.role.value, t.shape, kind, nbytes, damage))
    return Plan(
        layout=STOCK,
        planner=KNAPSACK,
        sensitivity=options.sensitivity,
        unit=UNITS[options.sensitivity],
        budget_bytes=limit,
        file_bytes=choices.fixed_bytes + solution.cost,
        header_bytes=header,
        smallest_bytes=smallest,
        largest_bytes=largest,
        damage=solution.damage,
        gap=solution.gap,
        quantized_with=table.quantized_with,
        types=tuple(t.name for t in options.types),
        made_from=digest(
            [table.made_from, options.sensitivity, sorted((r.value, b) for r, b in options.floors.items())]
        ),
        tensors=tuple(planned),
        n_weights=sum(t.n_weights for t in unpadded(source).tensors),
    )


def require_budget(source: Source, kvs: Mapping[str, KV], budget: Budget | None, options: PlanOptions) -> None:
    """Raise :class:`PlanError` for a budget that no plan can meet, or files that are too small for any.

    From shapes alone: before hours of work.
    """
    if options.split_bytes is not None:
        version = {VERSION_KEY: uint32(VERSION)} if options.layout == PER_EXPERT else {}
        split_layouts({**kvs, **version}, [], options.split_bytes)
    smallest, _ = size_range(source, kvs, options, has_imatrix=True)
    if budget is not None:
        require = _require_room if options.precision_map is None else require_map_room
        require(budget, budget.limit(source, kvs), smallest)


def _require_room(budget: Budget, limit: int, smallest: int) -> None:
    if limit < smallest:
        raise NoRoomError(
            smallest,
            f"budget of {budget} ({limit} bytes): the smallest file these types and floors allow has {smallest} "
            f"bytes ({format_bytes(smallest)}){budget.whole(smallest)}; raise the budget, add smaller --types or lower "
            "a --floor",
        )


def size_range(source: Source, kvs: Mapping[str, KV], options: PlanOptions, *, has_imatrix: bool) -> tuple[int, int]:
    """(smallest, largest) bytes that a plan can have; needs no sensitivity. Padding has no part in the largest."""
    ranges: list[tuple[int, int]] = []
    refused: list[PlanError] = []
    for own, own_kvs in padding_choices(source, kvs, options.pad_experts):
        try:
            ranges.append(_size_range(own, own_kvs, options, has_imatrix=has_imatrix))
        except PlanError as error:
            refused.append(error)
    if not ranges:
        raise refused[0]
    return min(smallest for smallest, _ in ranges), ranges[0][1]


def padding_choices(source: Source, kvs: Mapping[str, KV], wanted: str) -> list[tuple[Source, Mapping[str, KV]]]:
    """``source`` and ``kvs`` as they are and with the experts padded, as far as ``wanted`` allows and it is possible.

    Raises :class:`PlanError` where padding is wanted and there is none.
    """
    padding = None if wanted == NEVER else expert_padding(source)
    if padding is None and wanted == ALWAYS:
        raise PlanError(
            f"--pad-experts always: expected experts whose width is in the key-values and no multiple of {BLOCK}; "
            f"found none in {source.path} ({source.architecture}); leave it out"
        )
    plain: list[tuple[Source, Mapping[str, KV]]] = [] if wanted == ALWAYS else [(source, kvs)]
    return plain if padding is None else [*plain, (PaddedSource(source, padding), padding.kvs(kvs))]


def _size_range(source: Source, kvs: Mapping[str, KV], options: PlanOptions, *, has_imatrix: bool) -> tuple[int, int]:
    if options.precision_map is not None:
        return map_size_range(source, kvs, options)
    total = [source_header_bytes(source, kvs)] * 2
    for tensor in source.tensors:
        allowed = candidates(tensor, options.types, has_imatrix=has_imatrix, floors=options.floors)
        kinds = types_in_a_file(tensor, allowed, kvs, options.split_bytes)
        sizes = [padded_nbytes(tensor.shape, kind) for kind in kinds]
        total = [total[0] + min(sizes), total[1] + sizes[-1]]
    return total[0], total[1]


def _allowed(
    source: Source, table: SensitivityTable, kvs: Mapping[str, KV], options: PlanOptions
) -> dict[str, Allowed]:
    """Candidates and damages of every quantizable tensor, by name."""
    asked_for = {t.name for t in options.types}
    found: dict[str, Allowed] = {}
    for tensor in source.tensors:
        if not tensor.quantizable:
            continue
        errors = table.require(tensor.name, options.sensitivity)
        damage = errors.damage[options.sensitivity]
        # what was measured decides which types an imatrix and the largest weight allowed
        measured = [
            BY_NAME[name]
            for name, own in zip(errors.types, damage, strict=True)
            if name in asked_for and np.isfinite(own).all()
        ]
        every = candidates(tensor, measured, has_imatrix=True, floors=options.floors)
        types = types_in_a_file(tensor, every, kvs, options.split_bytes)
        found[tensor.name] = Allowed(types, damage[[errors.types.index(kind.name) for kind in types]])
    return found


def _choices(source: Source, allowed: Mapping[str, Allowed], header: int) -> _Choices:
    tensors, types, groups = [], [], []
    fixed = header
    for tensor in source.tensors:
        if tensor.name not in allowed:
            fixed += padded_nbytes(tensor.shape, tensor.type)
            continue
        own = allowed[tensor.name]
        costs = tuple(padded_nbytes(tensor.shape, kind) for kind in own.types)
        damages = tuple(float(total) for total in own.damage.sum(axis=1))
        tensors.append(tensor)
        types.append(tuple(kind.name for kind in own.types))
        groups.append(Group(tensor.name, costs, damages))
    return _Choices(tensors, types, groups, fixed)
