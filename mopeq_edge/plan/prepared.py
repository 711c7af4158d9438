"""What planning needs of a source and its sensitivity, worked out once for any number of budgets and both layouts."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property

import numpy as np

from mopeq_edge.artifacts import digest
from mopeq_edge.errors import NoRoomError
from mopeq_edge.ggml.types import BY_NAME
from mopeq_edge.gguf_file import KV
from mopeq_edge.gguf_layout import padded_nbytes
from mopeq_edge.plan.artifact import KNAPSACK, STOCK, Plan, PlannedTensor
from mopeq_edge.plan.budget import Budget, source_header_bytes
from mopeq_edge.plan.candidates import Allowed, candidates
from mopeq_edge.plan.options import PlanOptions
from mopeq_edge.plan.per_expert import PerExpertPlans
from mopeq_edge.plan.solve import Group, largest_cost, smallest_cost, solve
from mopeq_edge.plan.split import types_in_a_file
from mopeq_edge.sensitivity.scores import UNITS
from mopeq_edge.sensitivity.table import SensitivityTable
from mopeq_edge.source.model import Source
from mopeq_edge.source.padded import unpadded
from mopeq_edge.units import format_bytes


class Prepared:
    """The knapsack's decision groups for ``source`` as it is, and its plans; ``options.layout`` has no part in them."""

    def __init__(self, source: Source, table: SensitivityTable, kvs: Mapping[str, KV], options: PlanOptions) -> None:
        self._source, self._table, self._kvs, self._options = source, table, kvs, options
        self._stock: dict[int, Plan] = {}

    def plan(self, budget: Budget, layout: str, proven: bool) -> Plan:
        """The plan of the least predicted damage; see :meth:`Planner.plan`.

        Raises :class:`NoRoomError` for a budget below the minimum.
        """
        limit = budget.limit(self._source, self._kvs)
        require_room(budget, limit, self._smallest)
        if limit not in self._stock:
            self._stock[limit] = self._stock_plan(limit)
        stock = self._stock[limit]
        return stock if layout == STOCK else self._per_expert.plan(stock, proven)

    @cached_property
    def _header(self) -> int:
        return source_header_bytes(self._source, self._kvs)

    @cached_property
    def _allowed(self) -> dict[str, Allowed]:
        """Candidates and damages of every quantizable tensor, by name."""
        options = self._options
        asked_for = {t.name for t in options.types}
        found: dict[str, Allowed] = {}
        for tensor in self._source.tensors:
            if not tensor.quantizable:
                continue
            errors = self._table.require(tensor.name, options.sensitivity)
            damage = errors.damage[options.sensitivity]
            # what was measured decides which types an imatrix and the largest weight allowed
            measured = [
                BY_NAME[name]
                for name, is_number in zip(errors.types, np.asarray(np.isfinite(damage).all(axis=1)), strict=True)
                if name in asked_for and is_number
            ]
            every = candidates(tensor, measured, has_imatrix=True, floors=options.floors)
            types = types_in_a_file(tensor, every, self._kvs, options.split_bytes)
            found[tensor.name] = Allowed(types, damage[[errors.types.index(kind.name) for kind in types]])
        return found

    @cached_property
    def _groups(self) -> dict[str, Group]:
        """The stock layout's decisions: the types of a whole tensor."""
        shapes = {tensor.name: tensor.shape for tensor in self._source.tensors}
        return {
            name: Group(
                name,
                tuple(padded_nbytes(shapes[name], kind) for kind in own.types),
                tuple(own.damage.sum(axis=1).tolist()),
            )
            for name, own in self._allowed.items()
        }

    @cached_property
    def _fixed(self) -> int:
        """Bytes of the header and of all tensors that keep their type."""
        own = (padded_nbytes(t.shape, t.type) for t in self._source.tensors if t.name not in self._allowed)
        return self._header + sum(own)

    @cached_property
    def _smallest(self) -> int:
        return self._fixed + smallest_cost(list(self._groups.values()))

    @cached_property
    def _per_expert(self) -> PerExpertPlans:
        return PerExpertPlans(self._source, self._kvs, self._allowed)

    def _stock_plan(self, limit: int) -> Plan:
        options, groups = self._options, list(self._groups.values())
        solution = solve(groups, limit - self._fixed)
        chosen = {
            group.name: (self._allowed[group.name].types[pick].name, group.costs[pick], group.damages[pick])
            for group, pick in zip(groups, solution.choice, strict=True)
        }
        planned = []
        for t in self._source.tensors:
            kind, nbytes, damage = chosen.get(t.name) or (t.type.name, padded_nbytes(t.shape, t.type), 0.0)
            planned.append(PlannedTensor(t.name, t.role.value, t.shape, kind, nbytes, damage))
        floors = sorted((role.value, bits) for role, bits in options.floors.items())
        return Plan(
            layout=STOCK,
            planner=KNAPSACK,
            sensitivity=options.sensitivity,
            unit=UNITS[options.sensitivity],
            budget_bytes=limit,
            file_bytes=self._fixed + solution.cost,
            header_bytes=self._header,
            smallest_bytes=self._smallest,
            largest_bytes=self._fixed + largest_cost(groups),
            damage=solution.damage,
            gap=solution.gap,
            quantized_with=self._table.quantized_with,
            types=tuple(t.name for t in options.types),
            made_from=digest([self._table.made_from, options.sensitivity, floors]),
            tensors=tuple(planned),
            n_weights=sum(t.n_weights for t in unpadded(self._source).tensors),
        )


def require_room(budget: Budget, limit: int, smallest: int) -> None:
    """Raise :class:`NoRoomError` if ``budget``, of ``limit`` bytes, is below the ``smallest`` file."""
    if limit < smallest:
        raise NoRoomError(
            smallest,
            f"budget of {budget} ({limit} bytes): the smallest file these types and floors allow has {smallest} "
            f"bytes ({format_bytes(smallest)}){budget.whole(smallest)}; raise the budget, add smaller --types or lower "
            "a --floor",
        )
