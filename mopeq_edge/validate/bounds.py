"""How far weights of each type may be from the source's: the error that the type itself makes, with head-room.

Measured with libggml as |x - q| / |x| over matrices of 24 rows of 1024 weights: normal, Laplace, Student's t with 4 and
2.5 degrees of freedom, and normal with columns of log-normal size; each with no imatrix, a flat and a log-normal one.
The table has the largest of a type; ``tests/validate/test_bounds.py`` measures again. Weights that belong elsewhere are
uncorrelated and are off by sqrt(2), zeros by 1: no bound reaches that.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from mopeq_edge.ggml.types import F32, GgmlType

MEASURED: Mapping[str, float] = {
    **{"F16": 0.0002, "BF16": 0.0017, "Q8_0": 0.0094, "Q6_K": 0.030, "Q5_0": 0.074, "Q5_1": 0.054, "Q5_K": 0.054},
    **{"Q4_0": 0.140, "Q4_1": 0.112, "Q4_K": 0.107, "IQ4_NL": 0.113, "IQ4_XS": 0.114, "MXFP4": 0.153, "NVFP4": 0.096},
    **{"Q3_K": 0.200, "IQ3_S": 0.268, "IQ3_XXS": 0.269, "Q2_K": 0.378, "IQ2_S": 0.449, "IQ2_XS": 0.466},
    **{"IQ2_XXS": 0.580, "IQ1_M": 0.559, "IQ1_S": 0.661},
    **{"Q1_0": 0.856, "Q2_0": 0.735, "TQ1_0": 0.840, "TQ2_0": 0.840},
}
HEADROOM = 1.5
MOST, MOST_OF_A_ROW = 0.95, 0.98
"""Below the error of zeros, which is 1."""

LEAST_RMS = 1e-6
"""Difference that scales in F16 make of weights near nothing: half the smallest step of F16, 2^-25, times 16."""

TWO_PRODUCTS = 1e-5
"""What two programs differ by that turn the same blocks into float32, mostly in the order of two products."""


@dataclass(frozen=True)
class Bound:
    """Largest relative RMS error of a matrix, and of one of its rows; ``least`` is an RMS that never counts."""

    matrix: float
    row: float
    least: float


def bound_of(kind: GgmlType, source: GgmlType) -> Bound | None:
    """For weights of type ``kind`` made from a ``source`` of another; None for a type that was not measured.

    F32 holds the numbers that the source gives, bit for bit, and a quantized type that is kept has the same blocks. Of
    16 bits the source may have had the unrounded numbers (a product with block scales), so rounding is allowed for.
    """
    if kind is F32:
        return Bound(0.0, 0.0, 0.0)
    if kind is source and kind.is_quantized:
        return Bound(TWO_PRODUCTS, TWO_PRODUCTS, 0.0)
    if kind.name not in MEASURED:
        return None
    own = min(MOST, HEADROOM * MEASURED[kind.name])
    return Bound(own, min(MOST_OF_A_ROW, HEADROOM * own), LEAST_RMS)
