"""The tensor types of GGUF: id, name, block and bytes, as libggml defines them.

A static table, so that a header can be read where no library is built; a test compares every
row with the library in use. Source of the numbers: ``ggml_type``, ``ggml_blck_size`` and
``ggml_type_size`` of llama.cpp.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from mopeq_edge.errors import FormatError

F16_MAX = 65504.0
"""The largest number of F16, of which the weights, or the scales of the blocks, of most types are."""

WIDE: frozenset[str] = frozenset({"F32", "BF16"})
"""Types for weights beyond it. MXFP4 and NVFP4 stay finite, but have no digits left for a row of such spread."""


@dataclass(frozen=True, eq=False)
class GgmlType:
    """One tensor type: ``block_size`` weights take ``type_size`` bytes. There is one object of each."""

    id: int
    name: str
    block_size: int
    type_size: int

    @property
    def bpw(self) -> float:
        """Bits per weight."""
        return 8 * self.type_size / self.block_size

    @property
    def is_quantized(self) -> bool:
        return self.block_size > 1

    def fits(self, n_in: int) -> bool:
        """Whether rows of ``n_in`` weights are a whole number of blocks."""
        return n_in % self.block_size == 0

    def holds(self, largest: float) -> bool:
        """Whether the type is for weights up to the magnitude ``largest``: within F16's range any, beyond it few."""
        return largest <= F16_MAX or self.name in WIDE

    def nbytes(self, n_weights: int) -> int:
        """Bytes of ``n_weights`` weights; the rows must be whole blocks."""
        return n_weights // self.block_size * self.type_size

    def __reduce__(self) -> tuple[Callable[[str], GgmlType], tuple[str]]:
        """Pickled by name: types are compared by identity, in another process too."""
        return _by_name, (self.name,)


def _by_name(name: str) -> GgmlType:
    return BY_NAME[name]


_TABLE = (
    GgmlType(0, "F32", 1, 4),
    GgmlType(1, "F16", 1, 2),
    GgmlType(2, "Q4_0", 32, 18),
    GgmlType(3, "Q4_1", 32, 20),
    GgmlType(6, "Q5_0", 32, 22),
    GgmlType(7, "Q5_1", 32, 24),
    GgmlType(8, "Q8_0", 32, 34),
    GgmlType(9, "Q8_1", 32, 36),
    GgmlType(10, "Q2_K", 256, 84),
    GgmlType(11, "Q3_K", 256, 110),
    GgmlType(12, "Q4_K", 256, 144),
    GgmlType(13, "Q5_K", 256, 176),
    GgmlType(14, "Q6_K", 256, 210),
    GgmlType(15, "Q8_K", 256, 292),
    GgmlType(16, "IQ2_XXS", 256, 66),
    GgmlType(17, "IQ2_XS", 256, 74),
    GgmlType(18, "IQ3_XXS", 256, 98),
    GgmlType(19, "IQ1_S", 256, 50),
    GgmlType(20, "IQ4_NL", 32, 18),
    GgmlType(21, "IQ3_S", 256, 110),
    GgmlType(22, "IQ2_S", 256, 82),
    GgmlType(23, "IQ4_XS", 256, 136),
    GgmlType(24, "I8", 1, 1),
    GgmlType(25, "I16", 1, 2),
    GgmlType(26, "I32", 1, 4),
    GgmlType(27, "I64", 1, 8),
    GgmlType(28, "F64", 1, 8),
    GgmlType(29, "IQ1_M", 256, 56),
    GgmlType(30, "BF16", 1, 2),
    GgmlType(34, "TQ1_0", 256, 54),
    GgmlType(35, "TQ2_0", 256, 66),
    GgmlType(39, "MXFP4", 32, 17),
    GgmlType(40, "NVFP4", 64, 36),
    GgmlType(41, "Q1_0", 128, 18),
    GgmlType(42, "Q2_0", 64, 18),
)

BY_NAME: dict[str, GgmlType] = {t.name: t for t in _TABLE}
BY_ID: dict[int, GgmlType] = {t.id: t for t in _TABLE}

F32 = BY_NAME["F32"]
F16 = BY_NAME["F16"]
BF16 = BY_NAME["BF16"]
I32 = BY_NAME["I32"]
MXFP4 = BY_NAME["MXFP4"]

QUANTIZABLE: tuple[str, ...] = (
    *("F16", "BF16"),
    *("Q1_0", "Q2_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "MXFP4", "NVFP4"),
    *("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "TQ1_0", "TQ2_0"),
    *("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_NL", "IQ4_XS"),
)
"""Types that libggml can quantize to."""

NEEDS_IMATRIX: frozenset[str] = frozenset({"IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS"})
"""Types that llama-quantize refuses to use on a block tensor without an imatrix."""


def type_named(name: str) -> GgmlType:
    """The type called ``name``, in any case. Raises :class:`FormatError` for an unknown name."""
    found = BY_NAME.get(name.upper())
    if found is None:
        raise FormatError(f"type '{name}': unknown GGUF type; known: {', '.join(QUANTIZABLE)}")
    return found
