"""Which type every expert's matrices have, from a plan or from a GGUF: what a picture of it shows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from mopeq_edge.errors import FormatError
from mopeq_edge.expert_groups.layout import Grouping
from mopeq_edge.expert_groups.read import read_groups
from mopeq_edge.ggml.types import GgmlType
from mopeq_edge.gguf_file import MAGIC
from mopeq_edge.plan.artifact import Plan, read_plan
from mopeq_edge.source.roles import PROJECTIONS, layer_of, projection_of
from mopeq_edge.split import read_parts
from mopeq_edge.summary import summarise

Stack = tuple[int, str]
"""(layer, projection)"""


@dataclass(frozen=True)
class TypeMap:
    """The types of all experts. ``types`` of each stack [n_expert]; sizes are of the whole file."""

    name: str
    layout: str
    made_by: str
    """Planner and sensitivity of a plan, architecture of a GGUF."""
    file_bytes: int
    bpw: float
    types: dict[Stack, tuple[GgmlType, ...]]

    @property
    def projections(self) -> tuple[str, ...]:
        """Those that there are, in the order of the computation."""
        return tuple(p for p in PROJECTIONS if any(own == p for _, own in self.types))

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers that have experts, rising."""
        return tuple(sorted({layer for layer, _ in self.types}))

    @property
    def n_expert(self) -> int:
        return max(len(types) for types in self.types.values())

    def bits(self, projection: str) -> npt.NDArray[np.float64]:
        """[n_layers, n_expert] bits per weight, in the order of :attr:`layers`; NaN where there is no matrix."""
        found = np.full((len(self.layers), self.n_expert), np.nan)
        for row, layer in enumerate(self.layers):
            types = self.types.get((layer, projection), ())
            found[row, : len(types)] = [kind.bpw for kind in types]
        return found

    def counts(self) -> dict[float, dict[str, int]]:
        """Number of matrices of each type, by bits per weight, both rising."""
        number = Counter(kind for types in self.types.values() for kind in types)
        found: dict[float, dict[str, int]] = {}
        for kind in sorted(number, key=lambda kind: (kind.bpw, kind.name)):
            found.setdefault(kind.bpw, {})[kind.name] = number[kind]
        return found


def read_type_map(path: Path) -> TypeMap:
    """The map of a plan.json or a GGUF, told apart by content.

    Raises :class:`FormatError` for any other file, and for a model without experts.
    """
    try:
        with path.open("rb") as file:
            is_gguf = file.read(len(MAGIC)) == MAGIC
    except OSError as error:
        raise FormatError(f"{path}: cannot be read ({error.strerror}); give a plan.json or a GGUF file") from None
    return map_of_gguf(path) if is_gguf else map_of_plan(read_plan(path), path.name)


def map_of_plan(plan: Plan, name: str) -> TypeMap:
    """The map of ``plan``, called ``name``."""
    stacks = [(t.name, t.shape, t.written_as()) for t in plan.tensors]
    made_by = f"planner {plan.planner}, sensitivity {plan.sensitivity}"
    return TypeMap(name, plan.layout, made_by, plan.file_bytes, plan.bpw, _types(name, stacks))


def map_of_gguf(path: Path) -> TypeMap:
    """The map of a file, or of the first of a split one; headers and the maps of groups are read, no weights."""
    headers, summary = read_parts(path), summarise(path)
    stacks: list[tuple[str, tuple[int, ...], GgmlType | Grouping]] = [
        (info.name, info.shape, info.type) for header in headers for info in header.tensors
    ]
    stacks += [(stack.name, stack.shape, stack.groups) for stack in read_groups(*headers)]
    made_by = summary.architecture or summary.kind
    return TypeMap(path.name, summary.layout, made_by, summary.file_bytes, summary.bpw, _types(str(path), stacks))


def _types(
    name: str, stacks: Iterable[tuple[str, tuple[int, ...], GgmlType | Grouping]]
) -> dict[Stack, tuple[GgmlType, ...]]:
    found: dict[Stack, tuple[GgmlType, ...]] = {}
    for tensor, shape, kind in stacks:
        layer, projection = layer_of(tensor), projection_of(tensor)
        if layer is None or projection is None:
            continue
        if isinstance(kind, GgmlType):
            found[layer, projection] = (kind,) * (shape[2] if len(shape) > 2 else 1)
        else:
            by_expert = {expert: group.type for group in kind for expert in group.experts}
            found[layer, projection] = tuple(by_expert[expert] for expert in sorted(by_expert))
    if not found:
        raise FormatError(f"{name}: has no experts (tensors 'blk.N.ffn_…_exps.weight'), so there is no map of them")
    return dict(sorted(found.items()))
