"""Plans for a GGUF in several files: no type that a tensor has no room for, and a budget that all files share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from mopeq_edge.errors import PlanError
from mopeq_edge.expert_groups.layout import file_specs
from mopeq_edge.ggml.types import GgmlType
from mopeq_edge.gguf_file import KV
from mopeq_edge.plan.artifact import Plan
from mopeq_edge.plan.budget import Budget
from mopeq_edge.source.model import Source, SourceTensor
from mopeq_edge.split import bytes_alone, split_layouts


def types_in_a_file(
    tensor: SourceTensor, types: Sequence[GgmlType], kvs: Mapping[str, KV], split_bytes: int | None
) -> tuple[GgmlType, ...]:
    """Those of ``types`` in which ``tensor`` alone makes a file of at most ``split_bytes``.

    Raises :class:`PlanError` if there is none.
    """
    if split_bytes is None:
        return tuple(types)
    sizes = {kind: bytes_alone(kvs, (tensor.name, tensor.shape, kind)) for kind in types}
    fitting = tuple(kind for kind, size in sizes.items() if size <= split_bytes)
    if not fitting:
        least = min(sizes, key=lambda kind: sizes[kind])
        raise PlanError(
            f"--split-max-size {split_bytes}: tensor '{tensor.name}' alone needs a file of {sizes[least]} bytes in "
            f"{least.name}, its smallest type here; raise the size, add smaller --types or lower a --floor"
        )
    return fitting


def plan_in_files(
    make: Callable[[Budget], Plan], source: Source, kvs: Mapping[str, KV], budget: Budget, split_bytes: int
) -> Plan:
    """The plan that ``make`` finds, with the bytes of all its files: at most the budget.

    How many files there are depends on the plan, and each has a header; so the budget is cut by what the last plan's
    headers were over, until they are not.
    """
    reserve = 0
    while True:
        plan = make(replace(budget, reserve=reserve))
        assert plan.budget_bytes is not None
        places = split_layouts(kvs, file_specs(source.tensors, plan.type_of()), split_bytes)
        extra = sum(place.file_size for place in places) - plan.file_bytes
        on_top = budget.bpw is not None
        if on_top or extra <= reserve:
            return replace(
                plan,
                budget_bytes=plan.budget_bytes + (extra if on_top else reserve),
                file_bytes=plan.file_bytes + extra,
                header_bytes=plan.header_bytes + extra,
            )
        reserve = extra
