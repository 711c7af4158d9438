"""One file of a checkpoint's weights, whatever its format: which tensors it holds, where, and the bytes of any rows."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mopeq_edge.errors import FormatError
from mopeq_edge.ggml.library import bf16_to_f32
from mopeq_edge.source.file_bytes import File, read_bytes

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]

DTYPE_BITS: Mapping[str, int] = {
    **{"F64": 64, "F32": 32, "F16": 16, "BF16": 16, "C64": 64},
    **{"F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8},
    **{"F6_E2M3": 6, "F6_E3M2": 6, "F4": 4, "BOOL": 8},
    **{"I64": 64, "I32": 32, "I16": 16, "I8": 8, "U64": 64, "U32": 32, "U16": 16, "U8": 8},
}
"""Bits of one element of every type that a file may hold."""

WEIGHT_DTYPES = ("BF16", "F16", "F32", "F64")
"""Types that can be read as weights."""


@dataclass(frozen=True)
class Entry:
    """One tensor of a file; ``shape`` is the checkpoint's, outermost axis first."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    """Where its data begins, in bytes from the start of the file."""
    nbytes: int

    @property
    def n_rows(self) -> int:
        """Rows when all axes but the last are seen as one; 1 for a vector."""
        return math.prod(self.shape[:-1])

    @property
    def n_in(self) -> int:
        return self.shape[-1] if self.shape else 1


class Shard:
    """The tensors of one file by name, in the order in which they are written."""

    def __init__(self, path: File, entries: dict[str, Entry]) -> None:
        self.path = path
        self.entries = entries

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Bytes:
        """The bytes [n_rows, row bytes] of rows ``start`` to ``stop`` of a tensor seen as a matrix."""
        entry = self.entries[name]
        stop = entry.n_rows if stop is None else stop
        if not 0 <= start <= stop <= entry.n_rows:
            raise ValueError(f"{name}: rows {start} to {stop} of {entry.n_rows}")
        row_bits = DTYPE_BITS[entry.dtype] * entry.n_in
        if row_bits % 8:
            raise FormatError(f"{self.path}: tensor '{name}' ({entry.dtype}): its rows are no whole bytes")
        row_bytes = row_bits // 8
        raw = read_bytes(self.path, entry.offset + start * row_bytes, (stop - start) * row_bytes)
        return raw.reshape(stop - start, row_bytes)

    def read_f32(self, name: str, start: int = 0, stop: int | None = None) -> Floats:
        """The same rows as float32 [n_rows, n_in]. Only F64 is rounded."""
        dtype = self.entries[name].dtype
        if dtype not in WEIGHT_DTYPES:
            raise FormatError(
                f"{self.path}: tensor '{name}' has type {dtype}, expected weights in {', '.join(WEIGHT_DTYPES)}; "
                "use a checkpoint that is not quantized"
            )
        return as_f32(dtype, self.read(name, start, stop))


def as_f32(dtype: str, raw: Bytes) -> Floats:
    """Rows of bytes [n_rows, row bytes] of one of :data:`WEIGHT_DTYPES` as float32 [n_rows, n_in]."""
    if dtype == "BF16":
        return bf16_to_f32(raw.view("<u2"))
    if dtype == "F32":
        return raw.view("<f4")
    with np.errstate(over="ignore"):
        return raw.view("<f2" if dtype == "F16" else "<f8").astype(np.float32)
