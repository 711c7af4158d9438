"""The planner of the paper (MoPEQ, arXiv 2509.02512): every expert gets 2, 3 or 4 bit by its score alone.

The map knows no budget: its size comes out. With a budget its boundaries move, expert by expert, to the map that
just fits. Everything that is no expert gets the type of 4 bit, or what its floor asks for.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from mopeq_edge.artifacts import digest
from mopeq_edge.errors import NoRoomError, PlanError
from mopeq_edge.expert_groups.layout import Grouping, file_layout, groups_of
from mopeq_edge.ggml.types import BY_NAME, NEEDS_IMATRIX, GgmlType
from mopeq_edge.gguf_file import KV
from mopeq_edge.plan.artifact import MOPEQ, PER_EXPERT, Plan, PrecisionMap
from mopeq_edge.plan.budget import Budget
from mopeq_edge.plan.candidates import candidates
from mopeq_edge.plan.expert_scores import expert_scores
from mopeq_edge.plan.file_bytes import FileBytes
from mopeq_edge.plan.fixed import fixed_plan
from mopeq_edge.plan.options import MapOptions, PlanOptions
from mopeq_edge.plan.per_expert import is_stack
from mopeq_edge.plan.precision_map import N_CLASSES, Expert, classes_of, steps
from mopeq_edge.plan.split import require_all_types
from mopeq_edge.sensitivity.table import SensitivityTable
from mopeq_edge.source.model import Source, SourceTensor
from mopeq_edge.units import format_bytes

NO_IMATRIX = "none"

Types = dict[str, GgmlType | Grouping]


@dataclass(frozen=True)
class _Choices:
    """The type of each tensor: ``fixed`` by name, or for the experts of a stack one a class, lowest first."""

    fixed: Mapping[str, GgmlType]
    by_class: Mapping[str, tuple[GgmlType, ...]]

    def stack(self, stack: SourceTensor, classes: Mapping[Expert, int]) -> GgmlType | Grouping:
        """The type or the groups of ``stack``."""
        assert stack.layer is not None
        kinds = self.by_class[stack.name]
        return groups_of([kinds[classes[stack.layer, expert]] for expert in range(stack.n_matrices)])

    def of_map(self, stacks: Sequence[SourceTensor], classes: Mapping[Expert, int]) -> Types:
        """Of all tensors."""
        return {**self.fixed, **{stack.name: self.stack(stack, classes) for stack in stacks}}

    def uniform(self, number: int) -> Types:
        """Every expert in class ``number``."""
        return {**self.fixed, **{name: kinds[number] for name, kinds in self.by_class.items()}}


def mopeq_plan(
    source: Source, table: SensitivityTable, kvs: Mapping[str, KV], budget: Budget | None, options: PlanOptions
) -> Plan:
    """The paper's map, or with a ``budget`` the largest of the maps it grows or shrinks to that fits.

    The predicted size is the written size, to the byte. Raises :class:`PlanError` for a budget that the experts in
    their lowest type do not fit, with those exact bytes.
    """
    asked = options.precision_map
    assert asked is not None
    stacks = [t for t in source.tensors if _in_map(t)]
    choices = _choices(source, options, asked, _measured(source, table, options, asked))
    _require_files(source, kvs, options, choices)
    scores = expert_scores(stacks, table, options.sensitivity, lambda stack: choices.by_class[stack.name][1])
    classes = classes_of(scores, asked.scope)
    size = FileBytes(kvs, source.tensors, choices.of_map(stacks, classes))
    unscaled, taken, limit = size.total, 0, None
    smallest, largest = (file_layout(kvs, source.tensors, choices.uniform(n)).file_size for n in (0, N_CLASSES - 1))
    if budget is not None:
        limit = budget.limit(source, kvs)
        require_map_room(budget, limit, smallest)
        up = unscaled <= limit
        classes, taken = _scaled(classes, steps(scores, asked.scope, classes, up=up), up, limit, size, choices, stacks)
    counts = Counter(classes.values())
    record = PrecisionMap(
        scope=asked.scope,
        types=tuple(kind.name for kind in asked.types),
        experts=tuple(counts[n] for n in range(N_CLASSES)),
        unscaled_bytes=unscaled,
        steps=taken,
    )
    types = choices.of_map(stacks, classes)
    return _plan(source, table, kvs, options, types, record, limit=limit, possible=(smallest, largest))


def _scaled(
    classes: Mapping[Expert, int],
    order: Sequence[Expert],
    up: bool,
    limit: int,
    size: FileBytes,
    choices: _Choices,
    stacks: Sequence[SourceTensor],
) -> tuple[dict[Expert, int], int]:
    """(classes, steps taken): down until the file fits, or up as long as it does. ``size`` is of ``classes``."""
    scaled, step, taken = dict(classes), 1 if up else -1, 0
    of_layer: dict[int | None, list[SourceTensor]] = {}
    for stack in stacks:
        of_layer.setdefault(stack.layer, []).append(stack)
    for expert in order:
        if not up and size.total <= limit:
            break
        scaled[expert] += step
        for stack in of_layer[expert[0]]:
            size.change(stack.name, choices.stack(stack, scaled))
        if up and size.total > limit:
            scaled[expert] -= step
            break
        taken += step
    return scaled, taken


def map_size_range(source: Source, kvs: Mapping[str, KV], options: PlanOptions) -> tuple[int, int]:
    """(smallest, largest) bytes that a map can have; needs no sensitivity.

    Raises :class:`PlanError` for a tensor that fits no file in a type that the map may give it.
    """
    choices = _possible(source, options)
    _require_files(source, kvs, options, choices)
    low, high = (file_layout(kvs, source.tensors, choices.uniform(n)).file_size for n in (0, N_CLASSES - 1))
    return low, high


def _require_files(source: Source, kvs: Mapping[str, KV], options: PlanOptions, choices: _Choices) -> None:
    """Raise :class:`PlanError` for a tensor that fits no file in a type that the map may give it."""
    if options.split_bytes is None:
        return
    for tensor in source.tensors:
        types = choices.by_class.get(tensor.name) or (choices.fixed[tensor.name],)
        require_all_types(tensor, types, kvs, options.split_bytes)


def fitting_type(tensor: SourceTensor, wanted: GgmlType, types: Sequence[GgmlType], options: PlanOptions) -> GgmlType:
    """``wanted``, or where its blocks, the floor or the imatrix do not allow it the next larger of ``types``.

    A tensor keeps its own type where none of them is large enough, and never gets a larger one than that.
    """
    allowed = candidates(tensor, types, has_imatrix=True, floors=options.floors)
    if wanted in allowed:
        return wanted
    return next((kind for kind in allowed if kind.bpw >= wanted.bpw), allowed[-1])


def _in_map(tensor: SourceTensor) -> bool:
    return is_stack(tensor) and tensor.quantizable and tensor.layer is not None


def _possible(source: Source, options: PlanOptions) -> _Choices:
    """The choices of a map where every type could be measured."""
    assert options.precision_map is not None
    every = {t.name: (*options.types, *options.precision_map.types) for t in source.tensors}
    return _choices(source, options, options.precision_map, every)


def _choices(
    source: Source, options: PlanOptions, asked: MapOptions, types: Mapping[str, Sequence[GgmlType]]
) -> _Choices:
    fixed: dict[str, GgmlType] = {}
    by_class: dict[str, tuple[GgmlType, ...]] = {}
    for tensor in source.tensors:
        if not tensor.quantizable:
            fixed[tensor.name] = tensor.type
        elif _in_map(tensor):
            by_class[tensor.name] = tuple(
                fitting_type(tensor, kind, types[tensor.name], options) for kind in asked.types
            )
        else:
            fixed[tensor.name] = fitting_type(tensor, asked.types[-1], types[tensor.name], options)
    return _Choices(fixed, by_class)


def _measured(
    source: Source, table: SensitivityTable, options: PlanOptions, asked: MapOptions
) -> dict[str, list[GgmlType]]:
    """The measured types of each tensor. Raises :class:`PlanError` where one of the map is missing."""
    wanted = {kind.name for kind in (*options.types, *asked.types)}
    # a type that another tensor was measured with was asked for: one that lacks it has weights beyond the type
    measured = {name for errors in table.errors.values() for name in errors.types[:-1]}
    found: dict[str, list[GgmlType]] = {}
    for tensor in source.tensors:
        if not tensor.quantizable:
            continue
        errors = table.require(tensor.name, options.sensitivity)
        found[tensor.name] = [BY_NAME[name] for name in errors.types if name in wanted]
        for kind in asked.types if _in_map(tensor) else asked.types[-1:]:
            # an imatrix has an entry for every stack, and perhaps none for others
            no_imatrix = kind.name in NEEDS_IMATRIX and (not _in_map(tensor) or table.quantized_with == NO_IMATRIX)
            could_be = kind.fits(tensor.n_in) and kind.bpw < tensor.type.bpw and not no_imatrix
            if could_be and kind.name not in measured:
                raise PlanError(
                    f"tensor '{tensor.name}': type {kind.name} of the map was not measured, found "
                    f"{', '.join(errors.types)}; run sensitivity again with it in --types"
                )
    return found


def require_map_room(budget: Budget, limit: int, smallest: int) -> None:
    """Raise :class:`NoRoomError` for a limit that the smallest map does not meet."""
    if limit < smallest:
        raise NoRoomError(
            smallest,
            f"budget of {budget} ({limit} bytes): the file with every expert in the lowest type of the map has "
            f"{smallest} bytes ({format_bytes(smallest)}){budget.whole(smallest)}; raise the budget, give a smaller "
            "--bits 2=TYPE or lower a "
            "--floor",
        )


def _plan(
    source: Source,
    table: SensitivityTable,
    kvs: Mapping[str, KV],
    options: PlanOptions,
    types: Types,
    record: PrecisionMap,
    *,
    limit: int | None,
    possible: tuple[int, int],
) -> Plan:
    plan = fixed_plan(source, table, kvs, types, planner=MOPEQ, sensitivity=options.sensitivity, budget_bytes=limit)
    assert limit is None or plan.file_bytes <= limit, "the last map that fits"
    return replace(
        plan,
        layout=PER_EXPERT,
        smallest_bytes=possible[0],
        largest_bytes=possible[1],
        types=tuple(kind.name for kind in options.types),
        made_from=digest(
            [
                *(table.made_from, options.sensitivity, sorted((r.value, b) for r, b in options.floors.items())),
                *(MOPEQ, record.scope, list(record.types)),
            ]
        ),
        precision_map=record,
    )
