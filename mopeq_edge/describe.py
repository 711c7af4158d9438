"""What is in a model: numbers by kind of tensor, and the range of sizes that a plan can have."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from mopeq_edge.imatrix import Imatrix
from mopeq_edge.output_kvs import IMATRIX_NAME, Provenance, output_kvs
from mopeq_edge.plan.make import size_range
from mopeq_edge.plan.options import PlanOptions
from mopeq_edge.source.model import Source, moe_shape


@dataclass(frozen=True)
class Part:
    """All tensors of one role."""

    n_tensors: int
    n_weights: int
    nbytes: int
    types: tuple[str, ...]


@dataclass(frozen=True)
class Description:
    """Sizes in bytes; ``bpw`` is tensor data over weights; the plan sizes are whole files."""

    architecture: str
    kind: str
    n_layer: int
    n_expert: int
    n_expert_used: int
    n_weights: int
    tensor_bytes: int
    smallest_bytes: int
    largest_bytes: int
    by_role: dict[str, Part]

    @property
    def bpw(self) -> float:
        return 8 * self.tensor_bytes / self.n_weights

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "bpw": self.bpw}


def describe(source: Source, options: PlanOptions, calibration_name: str) -> Description:
    """Describe ``source`` and the plans that ``options`` allow, calibrated on a text of that name."""
    shape = moe_shape(source)
    roles: dict[str, list[tuple[int, int, str]]] = {}
    for t in source.tensors:
        roles.setdefault(t.role.value, []).append((t.n_weights, t.nbytes, t.type.name))
    by_role = {
        role: Part(len(items), sum(i[0] for i in items), sum(i[1] for i in items), tuple(sorted({i[2] for i in items})))
        for role, items in sorted(roles.items(), key=lambda item: -sum(i[1] for i in item[1]))
    }
    # the file names the imatrix and its text; the usual names, so that the sizes are those of a plan
    imatrix = Imatrix({}, (calibration_name,), 0, 0)
    kvs = output_kvs(source.kvs, 0, imatrix, IMATRIX_NAME, Provenance())
    smallest, largest = size_range(source, kvs, options, has_imatrix=True)
    return Description(
        architecture=source.architecture,
        kind=source.kind,
        n_layer=shape.n_layer,
        n_expert=shape.n_expert,
        n_expert_used=shape.n_expert_used,
        n_weights=sum(t.n_weights for t in source.tensors),
        tensor_bytes=sum(t.nbytes for t in source.tensors),
        smallest_bytes=smallest,
        largest_bytes=largest,
        by_role=by_role,
    )
