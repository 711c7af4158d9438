"""Where the bytes of a file are, by kind of tensor. The parts add up to the file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from mopeq_edge.expert_groups.read import is_part
from mopeq_edge.ggml.types import I32, GgmlType
from mopeq_edge.plan.artifact import Plan
from mopeq_edge.report.artifacts import Artifacts
from mopeq_edge.source.roles import Role, role_of

HEADER, MAPS, PADDING = "header", "maps of experts", "padding"
KINDS: dict[Role, str] = {
    Role.EXPERT: "routed experts",
    Role.SHARED_EXPERT: "shared experts",
    Role.DENSE_FFN: "dense feed-forward",
    Role.ATTENTION: "attention",
    Role.EMBEDDING: "embedding",
    Role.OUTPUT: "output",
    Role.ROUTER: "norms, routers and biases",
    Role.NORM: "norms, routers and biases",
    Role.MTP: "further-token prediction",
    Role.OTHER: "other",
}


@dataclass(frozen=True)
class Size:
    """``n_weights`` is 0 for what holds none; ``types``: bytes by type, largest first."""

    kind: str
    n_tensors: int
    n_weights: int
    nbytes: int
    types: dict[str, int]

    @property
    def bpw(self) -> float | None:
        return 8 * self.nbytes / self.n_weights if self.n_weights else None


def sizes(found: Artifacts) -> tuple[Size, ...]:
    """Largest first."""
    plan = found.plan
    if found.headers:
        tensors = [
            (_kind(t.name, t.shape), t.type, t.n_weights, t.nbytes) for header in found.headers for t in header.tensors
        ]
        header = sum(own.data_start for own in found.headers)
        total = sum(own.file_size for own in found.headers)
    else:
        assert plan is not None
        tensors, header, total = list(_planned(plan)), plan.header_bytes, plan.file_bytes
    n, weights, nbytes = Counter[str](), Counter[str](), Counter[str]()
    types: dict[str, Counter[str]] = {}
    for kind, stored, n_weights, size in tensors:
        n[kind] += 1
        weights[kind] += 0 if kind == MAPS else n_weights
        nbytes[kind] += size
        types.setdefault(kind, Counter())[stored.name] += size
    rows = [Size(kind, n[kind], weights[kind], nbytes[kind], dict(types[kind].most_common())) for kind in n]
    rows.append(Size(HEADER, 0, 0, header, {}))
    rest = total - header - sum(nbytes.values())
    if rest:
        rows.append(Size(PADDING, 0, 0, rest, {}))
    return tuple(sorted(rows, key=lambda row: -row.nbytes))


def _kind(name: str, shape: tuple[int, ...]) -> str:
    if is_part(name) and name.endswith(".map"):
        return MAPS
    role = role_of(name)
    return KINDS[Role.NORM] if name.endswith(".bias") or (len(shape) < 2 and role is not Role.OTHER) else KINDS[role]


def _planned(plan: Plan) -> Iterable[tuple[str, GgmlType, int, int]]:
    """As the file will have them."""
    for tensor in plan.tensors:
        n_weights, kind, stored = 1, _kind(tensor.name, tensor.shape), tensor.written_as()
        for size in tensor.shape:
            n_weights *= size
        if isinstance(stored, GgmlType):
            yield kind, stored, n_weights, stored.nbytes(n_weights)
            continue
        for group in stored:
            own = n_weights // tensor.shape[2] * len(group.experts)
            yield kind, group.type, own, group.type.nbytes(own)
        yield MAPS, I32, 0, 4 * len(stored) * tensor.shape[2]
