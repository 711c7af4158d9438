"""Plans whose types are given and not chosen here, and what any score predicts of them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from mopeq_edge.artifacts import digest
from mopeq_edge.expert_groups.layout import Types, file_layout
from mopeq_edge.ggml.types import GgmlType
from mopeq_edge.gguf_file import KV, pad
from mopeq_edge.plan.artifact import PER_EXPERT, STOCK, Plan
from mopeq_edge.plan.per_expert import planned_tensor
from mopeq_edge.sensitivity.scores import UNITS
from mopeq_edge.sensitivity.table import SensitivityTable
from mopeq_edge.source.model import Source, SourceTensor
from mopeq_edge.source.padded import unpadded


def predicted(tensors: Iterable[SourceTensor], types: Types, table: SensitivityTable, score: str) -> dict[str, float]:
    """Damage of every tensor by ``score``, in its unit; 0 for those that keep their type for good."""
    found: dict[str, float] = {}
    for tensor in tensors:
        if not tensor.quantizable:
            found[tensor.name] = 0.0
            continue
        errors, kind = table.errors[tensor.name], types[tensor.name]
        damage = errors.damage[score]
        found[tensor.name] = (
            math.fsum(damage[errors.types.index(kind.name)])
            if isinstance(kind, GgmlType)
            else math.fsum(damage[errors.types.index(g.type.name), e] for g in kind for e in g.experts)
        )
    return found


def fixed_plan(
    source: Source,
    table: SensitivityTable,
    kvs: Mapping[str, KV],
    types: Types,
    *,
    planner: str,
    sensitivity: str,
    budget_bytes: int | None,
) -> Plan:
    """A plan of exactly these ``types``; ``planner`` says where they come from, ``sensitivity`` prices them."""
    place = file_layout(kvs, source.tensors, types)
    nbytes = {info.name: pad(info.nbytes, place.alignment) for info in place.tensors}
    damages = predicted(source.tensors, types, table, sensitivity)
    grouped = any(not isinstance(kind, GgmlType) for kind in types.values())
    return Plan(
        layout=PER_EXPERT if grouped else STOCK,
        planner=planner,
        sensitivity=sensitivity,
        unit=UNITS[sensitivity],
        budget_bytes=budget_bytes,
        file_bytes=place.file_size,
        header_bytes=len(place.header),
        smallest_bytes=place.file_size,
        largest_bytes=place.file_size,
        damage=math.fsum(damages.values()),
        gap=None,
        quantized_with=table.quantized_with,
        types=(),
        made_from=digest([table.made_from, planner, sensitivity]),
        n_weights=sum(t.n_weights for t in unpadded(source).tensors),
        tensors=tuple(planned_tensor(t, types[t.name], nbytes, damages[t.name]) for t in source.tensors),
    )
