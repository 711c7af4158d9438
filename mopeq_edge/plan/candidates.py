"""Which types a tensor may get: what was asked for, what its shape allows, and floors by role."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from mopeq_edge.errors import PlanError
from mopeq_edge.ggml.types import BY_NAME, NEEDS_IMATRIX, QUANTIZABLE, GgmlType, type_named
from mopeq_edge.source.model import SourceTensor
from mopeq_edge.source.roles import Role

K_TYPES = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q8_0")
DEFAULT_TYPES = (
    *("IQ2_XXS", "IQ2_XS", "IQ2_S", "Q2_K", "IQ3_XXS", "IQ3_S", "Q3_K"),
    *("IQ4_XS", "IQ4_NL", "Q4_K", "Q5_K", "Q6_K", "Q8_0"),
)
TYPE_SETS: Mapping[str, tuple[str, ...]] = {
    "default": DEFAULT_TYPES,
    "k": K_TYPES,
    "all": tuple(t for t in QUANTIZABLE if t not in ("F16", "BF16")),
}
"""Names for sets of candidates: ``default``; ``k`` (fast everywhere); ``all`` that libggml quantizes to."""

FLOORS: Mapping[Role, float] = {
    Role.ATTENTION: 4.0,
    Role.SHARED_EXPERT: 4.0,
    Role.DENSE_FFN: 4.0,
    Role.OUTPUT: 4.0,
    Role.EMBEDDING: 4.0,
    Role.OTHER: 4.0,
    Role.MTP: 4.0,
}
"""Least bits per weight by role: every token passes through these tensors, and they are small.

The embedding is here because only ``fisher`` can price it (it is a lookup and has no activations): with the
other scores a plan without this floor starves it, and on the bundled model its mean KLD rises up to sevenfold.
"""


@dataclass(frozen=True)
class Allowed:
    """What one tensor may become: ``types``, smallest first, and their ``damage`` [n_types, n_matrices]."""

    types: tuple[GgmlType, ...]
    damage: npt.NDArray[np.float64]


def parse_types(text: str) -> tuple[GgmlType, ...]:
    """``k``, ``default``, ``all``, or a comma-separated list of types and sets. Smallest first."""
    names: list[str] = []
    for item in (part.strip() for part in text.split(",") if part.strip()):
        names.extend(TYPE_SETS.get(item.lower()) or (type_named(item).name,))
    types = {BY_NAME[name] for name in names}
    unusable = sorted(t.name for t in types if t.name not in QUANTIZABLE)
    if unusable or not types:
        raise PlanError(f"--types {text}: cannot quantize to {', '.join(unusable) or 'nothing'}; see --types all")
    return tuple(sorted(types, key=lambda t: (t.bpw, t.name)))


def parse_floors(items: Sequence[str]) -> dict[Role, float]:
    """``attention=Q3_K`` or ``output=3`` (bits per weight) on top of :data:`FLOORS`."""
    floors = dict(FLOORS)
    for item in items:
        role_name, _, value = item.partition("=")
        try:
            role = Role(role_name)
            floors[role] = float(value) if value.replace(".", "", 1).isdigit() else type_named(value).bpw
        except ValueError:
            known = ", ".join(r.value for r in Role)
            raise PlanError(f"--floor {item}: expected ROLE=TYPE or ROLE=BITS, with ROLE one of {known}") from None
    return floors


def candidates(
    tensor: SourceTensor,
    types: Sequence[GgmlType],
    *,
    has_imatrix: bool,
    floors: Mapping[Role, float] = FLOORS,
    largest: float = 0.0,
) -> tuple[GgmlType, ...]:
    """Types that ``tensor`` may get, smallest first; its own type, without loss, is always the last.

    Types below its role's floor, types whose blocks do not fit its rows, types that need an imatrix where there is
    none, and types that do not hold its ``largest`` weight are left out. A tensor that is not quantizable keeps its own
    type.
    """
    if not tensor.quantizable:
        return (tensor.type,)
    floor = floors.get(tensor.role, 0.0)
    return _fitting(tensor.type, tensor.n_in, tuple(types), has_imatrix=has_imatrix, floor=floor, largest=largest)


@lru_cache
def _fitting(
    own: GgmlType, n_in: int, types: tuple[GgmlType, ...], *, has_imatrix: bool, floor: float, largest: float
) -> tuple[GgmlType, ...]:
    """The same for rows of ``n_in`` numbers: layers are alike, so it is asked for a few kinds of tensors."""
    fitting = [
        t
        for t in types
        if t.fits(n_in)
        and t.bpw >= floor
        and t.bpw < own.bpw
        and t.holds(largest)
        and (has_imatrix or t.name not in NEEDS_IMATRIX)
    ]
    return (*sorted(fitting, key=lambda t: (t.bpw, t.name)), own)
