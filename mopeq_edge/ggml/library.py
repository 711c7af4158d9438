"""libggml by ctypes: quantize and dequantize rows with the bits that llama.cpp uses.

``ggml_quantize_chunk`` releases the GIL under ctypes, so threads scale.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from mopeq_edge.errors import RuntimeMissingError
from mopeq_edge.ggml.types import BF16, F16, F32, GgmlType

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]

_FLOAT_P = ctypes.POINTER(ctypes.c_float)


class _TypeTraits(ctypes.Structure):
    _fields_ = (
        ("type_name", ctypes.c_char_p),
        ("blck_size", ctypes.c_int64),
        ("blck_size_interleave", ctypes.c_int64),
        ("type_size", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", ctypes.CFUNCTYPE(None, ctypes.c_void_p, _FLOAT_P, ctypes.c_int64)),
        ("from_float_ref", ctypes.c_void_p),
    )


class Quantizer(Protocol):
    """What turns weights into blocks."""

    def quantize(self, to: GgmlType, rows: Floats, imatrix: Floats | None = None) -> Bytes:
        """Blocks [n_rows, row bytes] of ``rows`` [n_rows, n_in], weighted by ``imatrix`` [n_in]."""


class Ggml:
    """The quantizers of one loaded ``libggml-base``.

    All methods may be called from several threads at once.
    """

    def __init__(self, path: str) -> None:
        try:
            self._lib = ctypes.CDLL(path)
        except OSError as error:
            raise RuntimeMissingError(f"{path}: cannot be loaded ({error}); run: mopeq-edge runtime install") from None
        lib = self._lib
        lib.ggml_quantize_chunk.restype = ctypes.c_size_t
        lib.ggml_quantize_chunk.argtypes = [
            *(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p),
            *(ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p),
        ]
        lib.ggml_get_type_traits.restype = ctypes.POINTER(_TypeTraits)
        lib.ggml_get_type_traits.argtypes = [ctypes.c_int]

    def describe(self, type_id: int) -> tuple[str, int, int]:
        """(lower-case name, weights per block, bytes per block) of type ``type_id``."""
        traits = self._lib.ggml_get_type_traits(type_id).contents
        return (traits.type_name or b"").decode(), traits.blck_size, traits.type_size

    def quantize(self, to: GgmlType, rows: Floats, imatrix: Floats | None = None) -> Bytes:
        """Quantize ``rows`` [n_rows, n_in] to ``to``, weighted by ``imatrix`` [n_in].

        Returns the blocks as bytes [n_rows, row bytes]. The same bits as ``llama-quantize``.
        """
        rows = np.ascontiguousarray(rows, dtype=np.float32)
        n_rows, n_in = rows.shape
        if not to.fits(n_in):
            raise ValueError(f"{to.name}: rows of {n_in} weights are not whole blocks of {to.block_size}")
        if to is F32:
            return rows.view(np.uint8).reshape(n_rows, -1)
        out = np.empty((n_rows, to.nbytes(n_in)), dtype=np.uint8)
        weights: Any = None
        if imatrix is not None:
            imatrix = np.ascontiguousarray(imatrix, dtype=np.float32)
            if imatrix.shape != (n_in,):
                raise ValueError(f"imatrix of shape {imatrix.shape} for rows of {n_in} weights")
            weights = imatrix.ctypes.data
        written = self._lib.ggml_quantize_chunk(to.id, rows.ctypes.data, out.ctypes.data, 0, n_rows, n_in, weights)
        if written != out.nbytes:
            raise RuntimeError(f"{to.name}: libggml wrote {written} bytes, expected {out.nbytes}")
        return out

    def dequantize(self, of: GgmlType, blocks: Bytes, n_in: int) -> Floats:
        """The float32 weights [n_rows, n_in] of ``blocks`` [n_rows, row bytes] of type ``of``."""
        blocks = np.ascontiguousarray(blocks)
        n_rows = blocks.nbytes // of.nbytes(n_in)
        if of is F32:
            return blocks.view(np.float32).reshape(n_rows, n_in)
        if of is F16:
            return blocks.view(np.float16).reshape(n_rows, n_in).astype(np.float32)
        if of is BF16:
            return bf16_to_f32(blocks.view(np.uint16)).reshape(n_rows, n_in)
        out = np.empty((n_rows, n_in), dtype=np.float32)
        traits = self._lib.ggml_get_type_traits(of.id).contents
        if not traits.to_float:
            raise RuntimeMissingError(f"type {of.name}: this libggml cannot dequantize it")
        traits.to_float(blocks.ctypes.data, out.ctypes.data_as(_FLOAT_P), out.size)
        return out


def bf16_to_f32(bits: npt.NDArray[np.uint16]) -> Floats:
    """BF16 bit patterns as float32, exactly."""
    values = bits.astype(np.uint32)
    values <<= np.uint32(16)
    return values.view(np.float32)


def f32_to_bf16(values: Floats) -> npt.NDArray[np.uint16]:
    """BF16 bit patterns of finite float32 ``values``, rounded to the nearest, ties to even."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


_FP4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6], dtype=np.float32)
_E8M0 = np.append(np.ldexp(1.0, np.arange(-127, 128)), np.nan).astype(np.float32)


def mxfp4_to_f32(blocks: Bytes) -> Floats:
    """Rows of MXFP4 blocks [n_rows, row bytes] as float32 [n_rows, n_in], exactly; a scale of all ones is NaN."""
    n_rows, n_block = len(blocks), blocks.shape[1] // 17
    by_block = blocks.reshape(n_rows, n_block, 17)
    codes = np.concatenate([by_block[..., 1:] & 0x0F, by_block[..., 1:] >> 4], axis=-1)
    with np.errstate(over="ignore"):
        values: Floats = _FP4[codes] * _E8M0[by_block[..., :1]]
    return values.reshape(n_rows, n_block * 32)


@cache
def load_ggml() -> Ggml:
    """The libggml of the llama.cpp in use. Raises :class:`RuntimeMissingError` if there is none."""
    from mopeq_edge.runtime.locate import library_path

    return Ggml(str(library_path("ggml-base")))
