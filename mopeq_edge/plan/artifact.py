"""plan.json: which type every tensor gets, what it costs and what it is predicted to hurt."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from mopeq_edge.artifacts import digest, read_json, write_json
from mopeq_edge.errors import FormatError, printable
from mopeq_edge.expert_groups.layout import MAX_GROUPS, ExpertGroup, Grouping
from mopeq_edge.ggml.types import BY_NAME, F32, I32, GgmlType
from mopeq_edge.gguf_file import KV, MAX_NAME, MAX_TENSORS
from mopeq_edge.json_file import Check, is_count, is_number, is_texts, require
from mopeq_edge.source.model import SourceTensor
from mopeq_edge.source.padded import ExpertPadding
from mopeq_edge.units import plural

FORMAT, VERSION = "mopeq-edge plan", 4
STOCK, PER_EXPERT = "stock", "per-expert"
LAYOUTS = (STOCK, PER_EXPERT)
KNAPSACK, MOPEQ = "knapsack", "mopeq"
MAX_EXPERTS = 2**14
"""Experts of a stack; the largest number that llama.cpp loads is 1024."""

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

    def as_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {**vars(self), "groups": [dict(vars(group)) for group in self.groups]}

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

    def kvs(self, kvs: Mapping[str, KV]) -> Mapping[str, KV]:
        """``kvs`` of the source as the planned file has them: the width of padded experts is another."""
        return kvs if self.expert_padding is None else self.expert_padding.kvs(kvs)

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
        """Plain values."""
        # asdict copies every value of every tensor and takes three times as long
        return {**asdict(replace(self, tensors=())), "tensors": [tensor.as_dict() for tensor in self.tensors]}


def write_plan(plan: Plan, path: Path) -> None:
    write_json(path, FORMAT, VERSION, plan.as_dict(), "tensors")


def read_plan(path: Path) -> Plan:
    """Read what :func:`write_plan` wrote. Raises :class:`FormatError` for anything else."""
    document = read_json(path, FORMAT, VERSION)
    fields = {key: value for key, value in document.items() if key not in ("format", "version")}
    try:
        fields = require(fields, _PLAN)
        tensors = tuple(_tensor(t) for t in fields["tensors"])
        if len({tensor.name for tensor in tensors}) != len(tensors):
            name, _ = Counter(tensor.name for tensor in tensors).most_common(1)[0]
            raise ValueError(f"tensor '{name}' appears twice")
        padding = fields["expert_padding"]
        return Plan(
            **{
                **fields,
                "tensors": tensors,
                "types": tuple(fields["types"]),
                "precision_map": _precision_map(fields["precision_map"]),
                "expert_padding": None if padding is None else ExpertPadding(**require(padding, _PADDING)),
            }
        )
    except ValueError as error:
        raise FormatError(f"{path}: not a plan as mopeq-edge writes it ({error}); plan again") from None


def _is_name(value: object) -> bool:
    return isinstance(value, str) and value.isprintable() and 0 < len(value.encode()) <= MAX_NAME


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_type(value: object) -> bool:
    return isinstance(value, str) and value in BY_NAME


def _are_types(value: object) -> bool:
    return is_texts(value) and all(_is_type(name) for name in value)  # type: ignore[attr-defined]


def _is_shape(value: object) -> bool:
    return isinstance(value, list) and 1 <= len(value) <= 4 and all(is_count(n) and n > 0 for n in value)


def _or_none(check: Check) -> Check:
    return lambda value: value is None or check(value)


_PLAN: dict[str, Check] = {
    **dict.fromkeys(("planner", "sensitivity", "unit", "quantized_with", "made_from"), _is_text),
    **dict.fromkeys(("file_bytes", "header_bytes", "smallest_bytes", "largest_bytes"), is_count),
    "layout": lambda value: value in LAYOUTS,
    "budget_bytes": _or_none(is_count),
    "damage": is_number,
    "gap": _or_none(is_number),
    "types": _are_types,
    "tensors": lambda value: isinstance(value, list) and len(value) <= MAX_TENSORS,
    "n_weights": lambda value: is_count(value) and value > 0,
    "precision_map": lambda _: True,
    "expert_padding": lambda _: True,
}
_TENSOR: dict[str, Check] = {
    "name": _is_name,
    "role": _is_text,
    "shape": _is_shape,
    "type": lambda value: value == MIXED or _is_type(value),
    "nbytes": is_count,
    "damage": is_number,
    "groups": lambda value: isinstance(value, list) and len(value) <= MAX_GROUPS,
}
_GROUP: dict[str, Check] = {"type": _is_type, "experts": _is_text, "nbytes": is_count}
_PADDING: dict[str, Check] = {
    "key": _is_text,
    "width": lambda value: is_count(value) and value > 0,
    "padded": lambda value: is_count(value) and value > 0,
    "shared": lambda value: isinstance(value, bool),
}
_MAP: dict[str, Check] = {
    "scope": _is_text,
    "types": _are_types,
    "experts": lambda value: isinstance(value, list) and all(is_count(n) for n in value),
    "unscaled_bytes": is_count,
    "steps": lambda value: type(value) is int,
}
"""What every field must be; none may be missing, no other one there."""


def _tensor(found: object) -> PlannedTensor:
    fields = require(found, _TENSOR)
    groups = tuple(PlannedGroup(**require(group, _GROUP)) for group in fields["groups"])
    tensor = PlannedTensor(**{**fields, "shape": tuple(fields["shape"]), "groups": groups})
    problem = _problem(tensor)
    if problem is not None:
        raise ValueError(f"tensor '{tensor.name}': {problem}")
    return tensor


def _problem(tensor: PlannedTensor) -> str | None:
    """Why ``tensor`` cannot be written, or None."""
    if not tensor.groups:
        if tensor.type == MIXED:
            return f"of type '{MIXED}' in no groups"
        return None if BY_NAME[tensor.type].fits(tensor.shape[0]) else f"rows of {tensor.shape[0]} in {tensor.type}"
    if tensor.type != MIXED:
        return f"of type '{tensor.type}' in {len(tensor.groups)} groups"
    if len(tensor.shape) != 3 or tensor.shape[2] > MAX_EXPERTS:
        return f"a stack of shape {list(tensor.shape)}, expected three axes and at most {MAX_EXPERTS} experts"
    n_expert = tensor.shape[2]
    experts = [expert for group in tensor.groups for expert in ids_of(group.experts, n_expert)]
    if sorted(experts) != list(range(n_expert)):
        return f"its groups hold {len(experts)} experts, expected each of {n_expert} once"
    misfit = next((g.type for g in tensor.groups if not BY_NAME[g.type].fits(tensor.shape[0])), None)
    return None if misfit is None else f"rows of {tensor.shape[0]} in {misfit}"


def _precision_map(found: object) -> PrecisionMap | None:
    if found is None:
        return None
    fields = require(found, _MAP)
    if len(fields["types"]) != len(fields["experts"]):
        raise ValueError(f"precision_map has {len(fields['types'])} types for {len(fields['experts'])} numbers")
    return PrecisionMap(**{**fields, "types": tuple(fields["types"]), "experts": tuple(fields["experts"])})


_RUN = re.compile(r"([0-9]{1,9})(?:-([0-9]{1,9}))?")


def id_runs(ids: Iterable[int]) -> str:
    """Rising numbers as runs: ``0-3,7``."""
    runs: list[list[int]] = []
    for number in ids:
        if runs and runs[-1][1] == number - 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def ids_of(runs: str, n_expert: int = MAX_EXPERTS) -> tuple[int, ...]:
    """What :func:`id_runs` was given, all below ``n_expert``. Raises :class:`ValueError` for anything else."""
    ids: list[int] = []
    for run in runs.split(","):
        match = _RUN.fullmatch(run)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (0, -1)
        if not (ids[-1] if ids else -1) < first <= last < n_expert:
            raise ValueError(f"experts '{printable(runs, 80)}', expected rising numbers below {n_expert}")
        ids.extend(range(first, last + 1))
    if id_runs(ids) != runs:
        raise ValueError(f"experts '{printable(runs, 80)}', expected the shortest form '{printable(id_runs(ids), 80)}'")
    return tuple(ids)


def tensor_type_lines(types: Mapping[str, str]) -> str:
    """The plan as ``llama-quantize --tensor-type-file`` reads it: one ``regex=type`` a line.

    The regular expressions match one tensor's whole name each. Run llama-quantize with the same imatrix and
    any quantized file type (``--token-embedding-type`` and ``--output-tensor-type`` are not needed).
    """
    return "".join(f"^{name.replace('.', chr(92) + '.')}$={kind.lower()}\n" for name, kind in types.items())
