"""The plan stage: least predicted damage, exact bytes within the budget.

The paper's planner, which asks for no budget, is in :mod:`mopeq_edge.plan.mopeq`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

from mopeq_edge.errors import NoRoomError, PlanError
from mopeq_edge.expert_groups.layout import VERSION, VERSION_KEY
from mopeq_edge.gguf_file import KV
from mopeq_edge.gguf_layout import padded_nbytes, uint32
from mopeq_edge.plan.artifact import PER_EXPERT, Plan
from mopeq_edge.plan.budget import Budget, source_header_bytes
from mopeq_edge.plan.candidates import candidates
from mopeq_edge.plan.mopeq import map_size_range, mopeq_plan, require_map_room
from mopeq_edge.plan.options import ALWAYS, NEVER, PlanOptions
from mopeq_edge.plan.prepared import Prepared, require_room
from mopeq_edge.plan.split import plan_in_files, types_in_a_file
from mopeq_edge.sensitivity.table import SensitivityTable
from mopeq_edge.source.model import Source
from mopeq_edge.source.padded import BLOCK, PaddedSource, expert_padding
from mopeq_edge.split import split_layouts


class Planner:
    """Plans of one source by one table and set of options: for a further budget little is left to do.

    Where experts may be padded, both ways are planned and the one of less damage is taken, without a budget the
    smaller one.
    """

    def __init__(self, source: Source, table: SensitivityTable, kvs: Mapping[str, KV], options: PlanOptions) -> None:
        self.source, self.table, self.options = source, table, options
        self._kvs = kvs
        self._ways = [
            _Way(own, own_kvs, Prepared(own, table, own_kvs, options))
            for own, own_kvs in padding_choices(source, kvs, options.pad_experts)
        ]

    def plan(self, budget: Budget | None, layout: str | None = None, *, proven: bool = True) -> Plan:
        """Plan the file that the source and the key-values make. The predicted size is the written size, to the byte.

        ``layout`` is another than that of the options. Unless it is to be ``proven``, a per-expert plan has no gap.
        The smallest and the largest file are the same in both layouts, and so are the bytes that a budget in bits per
        weight means. Raises :class:`PlanError` for a budget below the exact minimum, which the message states, and
        without a budget unless the paper's map is asked for.
        """
        plans: list[Plan] = []
        refused: list[PlanError] = []
        for way in self._ways:
            try:
                plans.append(self._plan_of(way, budget, layout or self.options.layout, proven))
            except PlanError as error:
                refused.append(error)
        if not plans:
            raise min(refused, key=lambda error: error.smallest if isinstance(error, NoRoomError) else -1)
        best = min(plans, key=lambda plan: (0.0 if budget is None else plan.damage, plan.file_bytes))
        smallest = [plan.smallest_bytes for plan in plans] + [e.smallest for e in refused if isinstance(e, NoRoomError)]
        largest = plans[0].largest_bytes if len(plans) > 1 else self._size_range[1]
        return replace(best, smallest_bytes=min(smallest), largest_bytes=largest)

    def _plan_of(self, way: _Way, budget: Budget | None, layout: str, proven: bool) -> Plan:
        options, split_bytes = self.options, self.options.split_bytes
        if options.precision_map is None and budget is None:
            raise PlanError("--planner knapsack: expected a budget, found none; give one, or use --planner mopeq")

        def planned(part: Budget | None) -> Plan:
            if options.precision_map is not None:
                return mopeq_plan(way.source, self.table, way.kvs, part, options)
            assert part is not None
            return way.prepared.plan(part, layout, proven)

        if split_bytes is None:
            plan = planned(budget)
        else:
            plan = plan_in_files(planned, way.source, way.kvs, budget, split_bytes)
        padding = way.source.padding if isinstance(way.source, PaddedSource) else None
        return replace(plan, expert_padding=padding)

    @cached_property
    def _size_range(self) -> tuple[int, int]:
        return size_range(self.source, self._kvs, self.options, has_imatrix=True)


@dataclass(frozen=True)
class _Way:
    """The source as it is, or with its experts padded."""

    source: Source
    kvs: Mapping[str, KV]
    prepared: Prepared


def make_plan(
    source: Source, table: SensitivityTable, kvs: Mapping[str, KV], budget: Budget | None, options: PlanOptions
) -> Plan:
    """A single plan; see :class:`Planner`."""
    return Planner(source, table, kvs, options).plan(budget)


def require_budget(source: Source, kvs: Mapping[str, KV], budget: Budget | None, options: PlanOptions) -> None:
    """Raise :class:`PlanError` for a budget that no plan can meet, or files that are too small for any.

    From shapes alone: before hours of work.
    """
    if options.split_bytes is not None:
        version = {VERSION_KEY: uint32(VERSION)} if options.layout == PER_EXPERT else {}
        split_layouts({**kvs, **version}, [], options.split_bytes)
    smallest, _ = size_range(source, kvs, options, has_imatrix=True)
    if budget is not None:
        require = require_room if options.precision_map is None else require_map_room
        require(budget, budget.limit(source, kvs), smallest)


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
