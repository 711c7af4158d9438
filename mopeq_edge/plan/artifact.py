"""plan.json: which type every tensor gets, what it costs and what it is predicted to hurt."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mopeq_edge.artifacts import digest, read_json, write_json
from mopeq_edge.errors import FormatError
from mopeq_edge.expert_groups.layout import ExpertGroup, Grouping
from mopeq_edge.ggml.types import BY_NAME, F32, I32, GgmlType
from mopeq_edge.source.model import SourceTensor
from mopeq_edge.source.padded import ExpertPadding
from mopeq_edge.units import plural

FORMAT, VERSION = "mopeq-edge plan", 4
STOCK, PER_EXPERT = "stock", "per-expert"
LAYOUTS = (STOCK, PER_EXPERT)
KNAPSACK, MOPEQ = "knapsack", "mopeq"
MIXED = "mixed"
"""Type of a stack whose experts have several; its groups have the types."""


@dataclass(frozen=True)
class PlannedGroup:
    """Experts of a stack that share a type: router ids as in ``0-3,7``. ``nbytes``: with the padding behind it."""

    type: str
    experts: str
    nbytes: int


@dataclass(frozen=True)
class PlannedTensor:
    """``nbytes``: with the padding behind it, and the map of a stack in groups. ``damage``: in the plan's unit."""

    name: str
    role: str
    shape: tuple[int, ...]
    type: str
    nbytes: int
    damage: float
    groups: tuple[PlannedGroup, ...] = ()

    def written_as(self) -> GgmlType | Grouping:
        """The type, or the groups of a :data:`MIXED` stack."""
        if self.type != MIXED:
            return BY_NAME[self.type]
        return tuple(ExpertGroup(BY_NAME[group.type], ids_of(group.experts)) for group in self.groups)


@dataclass(frozen=True)
class PrecisionMap:
    """The paper's map behind a plan: ``types`` of 2, 3 and 4 bit and how many ``experts`` each has.

    ``unscaled_bytes`` is the file that the map would be without a budget; to fit it, ``steps`` experts in turn went
    one precision up (or, below zero, down).
    """

    scope: str
    types: tuple[str, ...]
    experts: tuple[int, ...]
    unscaled_bytes: int
    steps: int

    def sentence(self, budget_bytes: int | None) -> str:
        """What the map is, and what was done to it."""
        mix = ", ".join(f"{n} at {kind}" for kind, n in zip(self.types, self.experts, strict=True))
        if budget_bytes is None:
            return f"experts clustered by {self.scope}: {mix}"
        way = "up" if self.steps > 0 else "down"
        moved = f"{plural(abs(self.steps), 'step')} {way}" if self.steps else "no step"
        return (
            f"experts clustered by {self.scope}: {mix}; {budget_bytes:,} bytes asked for, {self.unscaled_bytes:,} "
            f"without a target: {moved}"
        )


@dataclass(frozen=True)
class Plan:
    """A finished plan. Sizes are bytes of the whole file; ``budget_bytes`` is None where there was none.

    ``gap`` is the solver's optimality gap; None for a planner that solves nothing, which has a ``precision_map``.
    """

    layout: str
    planner: str
    sensitivity: str
    unit: str
    budget_bytes: int | None
    file_bytes: int
    header_bytes: int
    smallest_bytes: int
    largest_bytes: int
    damage: float
    gap: float | None
    quantized_with: str
    types: tuple[str, ...]
    made_from: str
    tensors: tuple[PlannedTensor, ...]
    n_weights: int
    """Of the source: zeros that pad experts do not count."""
    precision_map: PrecisionMap | None = None
    expert_padding: ExpertPadding | None = None

    def type_of(self) -> dict[str, GgmlType | Grouping]:
        """Type, or groups of types, by tensor name."""
        return {t.name: t.written_as() for t in self.tensors}

    def is_quantized(self, tensor: PlannedTensor) -> bool:
        """Whether the plan chose the type of ``tensor`` (a matrix, no norm, router or bias)."""
        return SourceTensor(tensor.name, tensor.shape, F32).quantizable

    def bytes_by_type(self) -> dict[str, int]:
        """Bytes of tensor data by type, largest first; the maps of expert groups are I32."""
        sizes: Counter[str] = Counter()
        for tensor in self.tensors:
            for group in tensor.groups:
                sizes[group.type] += group.nbytes
            sizes[I32.name if tensor.groups else tensor.type] += tensor.nbytes - sum(g.nbytes for g in tensor.groups)
        return dict(sizes.most_common())

    @property
    def bpw(self) -> float:
        """llama.cpp's bits per weight: tensor data over the number of weights."""
        return 8 * (self.file_bytes - self.header_bytes) / self.n_weights

    @property
    def sha256(self) -> str:
        """Hash of the whole plan."""
        return digest(self.as_dict())

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def write_plan(plan: Plan, path: Path) -> None:
    write_json(path, FORMAT, VERSION, plan.as_dict())


def read_plan(path: Path) -> Plan:
    """Read what :func:`write_plan` wrote. Raises :class:`FormatError` for anything else."""
    document = read_json(path, FORMAT, VERSION)
    fields = {key: value for key, value in document.items() if key not in ("format", "version")}
    try:
        fields["tensors"] = tuple(_tensor(t) for t in fields["tensors"])
        fields["types"] = tuple(fields["types"])
        fields["precision_map"] = _precision_map(fields["precision_map"])
        padding = fields["expert_padding"]
        fields["expert_padding"] = None if padding is None else ExpertPadding(**padding)
        plan = Plan(**fields)
        plan.type_of()
    except (KeyError, TypeError, ValueError) as error:
        raise FormatError(f"{path}: not a plan as mopeq-edge writes it ({error}); plan again") from None
    return plan


def _tensor(fields: Mapping[str, Any]) -> PlannedTensor:
    groups = tuple(PlannedGroup(**group) for group in fields["groups"])
    if bool(groups) != (fields["type"] == MIXED):
        raise ValueError(f"tensor '{fields['name']}' of type '{fields['type']}' in {len(groups)} groups")
    return PlannedTensor(**{**fields, "shape": tuple(fields["shape"]), "groups": groups})


def _precision_map(fields: Mapping[str, Any] | None) -> PrecisionMap | None:
    if fields is None:
        return None
    return PrecisionMap(**{**fields, "types": tuple(fields["types"]), "experts": tuple(fields["experts"])})


def id_runs(ids: Iterable[int]) -> str:
    """Rising numbers as runs: ``0-3,7``."""
    runs: list[list[int]] = []
    for number in ids:
        if runs and runs[-1][1] == number - 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def ids_of(runs: str) -> tuple[int, ...]:
    """What :func:`id_runs` was given. Raises :class:`ValueError` for anything else."""
    ids: list[int] = []
    for run in runs.split(","):
        first, _, last = run.partition("-")
        ids.extend(range(int(first), int(last or first) + 1))
    if id_runs(ids) != runs or ids != sorted(set(ids)):
        raise ValueError(f"experts '{runs}'")
    return tuple(ids)


def tensor_type_lines(types: Mapping[str, str]) -> str:
    """The plan as ``llama-quantize --tensor-type-file`` reads it: one ``regex=type`` a line.

    The regular expressions match one tensor's whole name each. Run llama-quantize with the same imatrix and
    any quantized file type (``--token-embedding-type`` and ``--output-tensor-type`` are not needed).
    """
    return "".join(f"^{name.replace('.', chr(92) + '.')}$={kind.lower()}\n" for name, kind in types.items())
