"""Plans for a GGUF in several files: no type that a tensor has no room for, and a budget that all files share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

from mopeq_edge.errors import PlanError
from mopeq_edge.expert_groups.layout import MAX_GROUPS, file_kvs, file_specs, group_name, map_name
from mopeq_edge.ggml.types import I32, GgmlType
from mopeq_edge.gguf_file import KV
from mopeq_edge.gguf_layout import TensorSpec
from mopeq_edge.plan.artifact import Plan
from mopeq_edge.plan.budget import Budget
from mopeq_edge.plan.per_expert import is_stack
from mopeq_edge.source.model import Source, SourceTensor
from mopeq_edge.split import bytes_alone, split_layouts


def types_in_a_file(
    tensor: SourceTensor, types: Sequence[GgmlType], kvs: Mapping[str, KV], split_bytes: int | None
) -> tuple[GgmlType, ...]:
    """Those of ``types`` in which ``tensor`` alone makes a file of at most ``split_bytes``.

    A stack has to fit whole, though it may come to be in smaller groups: which is known only when a plan is made.
    Raises :class:`PlanError` if there is none.
    """
    if split_bytes is None:
        return tuple(types)
    sizes = {kind: _largest_file(tensor, kind, kvs) for kind in types}
    fitting = tuple(kind for kind, size in sizes.items() if size <= split_bytes)
    if not fitting:
        least = min(sizes, key=lambda kind: sizes[kind])
        raise PlanError(
            f"--split-max-size {split_bytes}: tensor '{tensor.name}' alone needs a file of {sizes[least]} bytes in "
            f"{least.name}, its smallest type here; raise the size, add smaller --types or lower a --floor"
        )
    return fitting


def require_all_types(tensor: SourceTensor, types: Iterable[GgmlType], kvs: Mapping[str, KV], split_bytes: int) -> None:
    """Raise :class:`PlanError` if ``tensor`` fits no file in one of ``types``, which a planner cannot do without."""
    for kind in types:
        size = _largest_file(tensor, kind, kvs)
        if size > split_bytes:
            raise PlanError(
                f"--split-max-size {split_bytes}: tensor '{tensor.name}' alone needs a file of {size} bytes in "
                f"{kind.name}, which the map may give it; raise the size, or give smaller --bits"
            )


def _largest_file(tensor: SourceTensor, kind: GgmlType, kvs: Mapping[str, KV]) -> int:
    """Bytes of the largest file with nothing but ``tensor`` as ``kind``, or with a group or the map of its experts."""
    specs: list[TensorSpec] = [(tensor.name, tensor.shape, kind)]
    if is_stack(tensor) and tensor.n_matrices > 1:
        n_in, n_out, n_expert = tensor.shape
        # a group's name is longer than the stack's
        specs.append((group_name(tensor.name, 0), (n_in, n_out, n_expert - 1), kind))
        specs.append((map_name(tensor.name), (min(MAX_GROUPS, n_expert), n_expert), I32))
    return max(bytes_alone(kvs, spec) for spec in specs)


def plan_in_files(
    make: Callable[[Budget | None], Plan],
    source: Source,
    kvs: Mapping[str, KV],
    budget: Budget | None,
    split_bytes: int,
) -> Plan:
    """The plan that ``make`` finds, with the bytes of all its files: at most the budget, where there is one.

    How many files there are depends on the plan, and each has a header; so the budget is cut by what the last plan's
    headers were over, until they are not.
    """
    reserve = 0
    while True:
        plan = make(None if budget is None else replace(budget, reserve=reserve))
        types = plan.type_of()
        places = split_layouts(file_kvs(kvs, types), file_specs(source.tensors, types), split_bytes)
        extra = sum(place.file_size for place in places) - plan.file_bytes
        on_top = budget is None or budget.bpw is not None
        if on_top or extra <= reserve:
            kept = extra if on_top else reserve
            return replace(
                plan,
                budget_bytes=None if plan.budget_bytes is None else plan.budget_bytes + kept,
                file_bytes=plan.file_bytes + extra,
                header_bytes=plan.header_bytes + extra,
            )
        reserve = extra
