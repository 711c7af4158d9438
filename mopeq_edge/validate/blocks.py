"""Where the blocks of each type have their floating-point scales, and which bit patterns of these are no numbers.

Everything else in a block is a small integer or the index of a table, of which no bit pattern is wrong. Plain numbers
are blocks of one scale. Source: the structs of ggml's ``ggml-common.h``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from mopeq_edge.ggml.types import GgmlType

Bytes = npt.NDArray[np.uint8]
Flags = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Number:
    """A format of floating-point numbers: its width in bytes, and whether bit patterns are NaN or infinite."""

    name: str
    dtype: str
    is_bad: Callable[[npt.NDArray[Any]], Flags]


F16_BITS = Number("F16", "<u2", lambda bits: (bits & 0x7C00) == 0x7C00)
BF16_BITS = Number("BF16", "<u2", lambda bits: (bits & 0x7F80) == 0x7F80)
F32_BITS = Number("F32", "<u4", lambda bits: (bits & 0x7F800000) == 0x7F800000)
F64_BITS = Number("F64", "<u8", lambda bits: (bits & 0x7FF0000000000000) == 0x7FF0000000000000)
E8M0_BITS = Number("E8M0", "u1", lambda bits: bits == 0xFF)
UE4M3_BITS = Number("UE4M3", "u1", lambda bits: (bits & 0x7F) == 0x7F)


@dataclass(frozen=True)
class Scale:
    """A scale of a block: what ggml calls it, its offset in bytes, its format."""

    name: str
    offset: int
    number: Number


_D = (Scale("d", 0, F16_BITS),)
_D_AND_M = (Scale("d", 0, F16_BITS), Scale("m", 2, F16_BITS))
_D_AND_DMIN = (Scale("d", 0, F16_BITS), Scale("dmin", 2, F16_BITS))

SCALES: Mapping[str, tuple[Scale, ...]] = {
    "F32": (Scale("value", 0, F32_BITS),),
    "F16": (Scale("value", 0, F16_BITS),),
    "BF16": (Scale("value", 0, BF16_BITS),),
    "F64": (Scale("value", 0, F64_BITS),),
    **dict.fromkeys(("Q1_0", "Q2_0", "Q4_0", "Q5_0", "Q8_0", "IQ4_NL"), _D),
    **dict.fromkeys(("Q4_1", "Q5_1"), _D_AND_M),
    "Q8_1": (Scale("d", 0, F16_BITS), Scale("s", 2, F16_BITS)),
    "Q8_K": (Scale("d", 0, F32_BITS),),
    "Q2_K": (Scale("d", 80, F16_BITS), Scale("dmin", 82, F16_BITS)),
    "Q3_K": (Scale("d", 108, F16_BITS),),
    **dict.fromkeys(("Q4_K", "Q5_K"), _D_AND_DMIN),
    "Q6_K": (Scale("d", 208, F16_BITS),),
    **dict.fromkeys(("IQ1_S", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_XS"), _D),
    "TQ1_0": (Scale("d", 52, F16_BITS),),
    "TQ2_0": (Scale("d", 64, F16_BITS),),
    "MXFP4": (Scale("e", 0, E8M0_BITS),),
    "NVFP4": tuple(Scale(f"d[{i}]", i, UE4M3_BITS) for i in range(4)),
}
"""By the name of the type; IQ1_M is not here, see :func:`bad_scales`. Integer types have no scales."""

_IQ1_M_SCALES = 48
"""Offset of the four 16-bit words whose highest four bits are the nibbles of one F16."""


@dataclass(frozen=True)
class BadScales:
    """Of one piece: how many blocks have a scale that is no number, and the first of them."""

    n_blocks: int
    block: int
    scale: str
    found: str
    """``NaN`` or ``infinite``."""


def bad_scales(kind: GgmlType, raw: Bytes) -> BadScales | None:
    """What is wrong with the scales in ``raw`` (whole blocks of ``kind``), or None."""
    blocks = raw.reshape(-1, kind.type_size)
    worst: list[tuple[int, str, str]] = []
    bad = np.zeros(len(blocks), dtype=np.bool_)
    for name, number, bits in _bits(kind, blocks):
        flags = number.is_bad(bits)
        if flags.any():
            first = int(flags.argmax())
            bad |= flags
            worst.append((first, name, _what(number, int(bits[first]))))
    if not worst:
        return None
    block, name, what = min(worst)
    return BadScales(int(bad.sum()), block, name, what)


def has_scales(kind: GgmlType) -> bool:
    """Whether the table knows the type: integers and types to come have nothing to look at."""
    return kind.name in SCALES or kind.name == "IQ1_M"


def _bits(kind: GgmlType, blocks: Bytes) -> list[tuple[str, Number, npt.NDArray[Any]]]:
    if kind.name == "IQ1_M":
        words = np.ascontiguousarray(blocks[:, _IQ1_M_SCALES:]).view("<u2")
        bits = sum((words[:, i] >> 12).astype(np.uint16) << np.uint16(4 * i) for i in range(4))
        return [("d", F16_BITS, np.asarray(bits, dtype=np.uint16))]
    found = []
    for scale in SCALES.get(kind.name, ()):
        width = np.dtype(scale.number.dtype).itemsize
        column = np.ascontiguousarray(blocks[:, scale.offset : scale.offset + width])
        found.append((scale.name, scale.number, column.view(scale.number.dtype)[:, 0]))
    return found


def _what(number: Number, bits: int) -> str:
    mantissa = {"F16": 0x3FF, "BF16": 0x7F, "F32": 0x7FFFFF, "F64": (1 << 52) - 1}.get(number.name)
    return "infinite" if mantissa is not None and not bits & mantissa else "NaN"
