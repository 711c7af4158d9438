"""plan.json: which type every tensor gets, what it costs and what it is predicted to hurt."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mopeq_edge.artifacts import digest, read_json, write_json
from mopeq_edge.errors import FormatError
from mopeq_edge.ggml.types import BY_NAME, GgmlType
from mopeq_edge.source.model import SourceTensor

FORMAT, VERSION = "mopeq-edge plan", 1
STOCK = "stock"


@dataclass(frozen=True)
class PlannedTensor:
    """``nbytes``: with the padding behind it. ``damage``: predicted, in the plan's unit."""

    name: str
    role: str
    shape: tuple[int, ...]
    type: str
    nbytes: int
    damage: float


@dataclass(frozen=True)
class Plan:
    """A finished plan. Sizes are bytes of the whole file; ``gap`` is the solver's optimality gap."""

    layout: str
    sensitivity: str
    unit: str
    budget_bytes: int
    file_bytes: int
    header_bytes: int
    smallest_bytes: int
    largest_bytes: int
    damage: float
    gap: float
    quantized_with: str
    types: tuple[str, ...]
    made_from: str
    tensors: tuple[PlannedTensor, ...]

    def type_of(self) -> dict[str, GgmlType]:
        """Type by tensor name."""
        return {t.name: BY_NAME[t.type] for t in self.tensors}

    def is_quantized(self, tensor: PlannedTensor) -> bool:
        """Whether the plan chose the type of ``tensor`` (a matrix, no norm, router or bias)."""
        return SourceTensor(tensor.name, tensor.shape, BY_NAME[tensor.type]).quantizable

    def bytes_by_type(self) -> dict[str, int]:
        """Bytes of tensor data by type, largest first."""
        sizes: Counter[str] = Counter()
        for tensor in self.tensors:
            sizes[tensor.type] += tensor.nbytes
        return dict(sizes.most_common())

    @property
    def bpw(self) -> float:
        """llama.cpp's bits per weight: tensor data over the number of weights."""
        weights = sum(math.prod(tensor.shape) for tensor in self.tensors)
        return 8 * (self.file_bytes - self.header_bytes) / weights

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
        fields["tensors"] = tuple(PlannedTensor(**{**t, "shape": tuple(t["shape"])}) for t in fields["tensors"])
        fields["types"] = tuple(fields["types"])
        plan = Plan(**fields)
        plan.type_of()
    except (KeyError, TypeError) as error:
        raise FormatError(f"{path}: not a plan as mopeq-edge writes it ({error}); plan again") from None
    return plan


def tensor_type_lines(types: Mapping[str, str]) -> str:
    """The plan as ``llama-quantize --tensor-type-file`` reads it: one ``regex=type`` a line.

    The regular expressions match one tensor's whole name each. Run llama-quantize with the same imatrix and
    any quantized file type (``--token-embedding-type`` and ``--output-tensor-type`` are not needed).
    """
    return "".join(f"^{name.replace('.', chr(92) + '.')}$={kind.lower()}\n" for name, kind in types.items())
