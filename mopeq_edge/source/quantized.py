"""Checkpoints that come quantized: which schemes are read, and how their tensors become weights.

``quantization_config`` in config.json decides, never a tensor's shape. FP8 with block scales is multiplied out in
float32. MXFP4 is ggml's own type with its codes in another order: its bits are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from mopeq_edge.errors import FormatError, SourceError
from mopeq_edge.ggml.library import mxfp4_to_f32
from mopeq_edge.source.shard import WEIGHT_DTYPES, Entry, as_f32

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]
ReadRows = Callable[[str, int, int], Bytes]
"""Bytes [n_rows, row bytes] of a tensor's rows (name, from, to) as stored, all axes but the last seen as one."""

MXFP4 = "MXFP4"
"""Type of a tensor that is read as ggml's blocks: a scale's byte, then 16 bytes of codes for 32 weights."""

FP8 = "FP8"
"""Type of a tensor in F8_E4M3 with block scales; it is read as float32, multiplied out."""

_BLOCK = 32
_CONFIG_KEYS = ("text_config", "language_config")
_SCALES = "_scale_inv"


class Packing(Protocol):
    """How one tensor is made of several of the checkpoint."""

    @property
    def dtype(self) -> str: ...

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weights, outermost axis first."""
        ...

    @property
    def parts(self) -> tuple[str, ...]:
        """Tensors of the checkpoint that are nothing by themselves."""
        ...

    def read(self, rows: ReadRows, start: int, stop: int) -> Bytes:
        """Bytes [n_rows, row bytes] of rows ``start`` to ``stop`` in :attr:`dtype`."""
        ...


@dataclass(frozen=True)
class Mxfp4:
    """``blocks`` [..., n_block, 16] and ``scales`` [..., n_block], both U8, are weights [..., 32 n_block].

    A byte of codes has element 2i in its low four bits and 2i+1 in the high ones; ggml's byte j has j and j+16.
    """

    blocks: str
    scales: str
    shape: tuple[int, ...]
    dtype: str = MXFP4

    @property
    def parts(self) -> tuple[str, ...]:
        return (self.scales,)

    def read(self, rows: ReadRows, start: int, stop: int) -> Bytes:
        n_rows, n_block = stop - start, self.shape[-1] // _BLOCK
        codes = rows(self.blocks, start * n_block, stop * n_block).reshape(n_rows, n_block, _BLOCK // 2)
        elements = np.stack([codes & 0x0F, codes >> 4], axis=-1).reshape(n_rows, n_block, _BLOCK)
        found = np.empty((n_rows, n_block, 1 + _BLOCK // 2), dtype=np.uint8)
        found[..., 0] = rows(self.scales, start, stop)
        found[..., 1:] = elements[..., : _BLOCK // 2] | elements[..., _BLOCK // 2 :] << 4
        return found.reshape(n_rows, -1) if n_rows else found.reshape(0, n_block * found.shape[2])


@dataclass(frozen=True)
class ScaledFp8:
    """``weight`` [..., n_out, n_in] F8_E4M3, times ``scales`` [..., blocks of rows, blocks of columns].

    The last blocks may be partial. ``block`` is (rows, columns); ``scale_dtype`` one of the plain types.
    """

    weight: str
    scales: str
    shape: tuple[int, ...]
    block: tuple[int, int]
    scale_dtype: str
    dtype: str = FP8

    @property
    def parts(self) -> tuple[str, ...]:
        return (self.scales,)

    def read(self, rows: ReadRows, start: int, stop: int) -> Bytes:
        n_out, n_in = self.shape[-2:]
        values = E4M3[rows(self.weight, start, stop)]
        if stop > start:
            numbers = np.arange(start, stop)
            own = numbers // n_out * _ceil(n_out, self.block[0]) + numbers % n_out // self.block[0]
            scales = as_f32(self.scale_dtype, rows(self.scales, int(own[0]), int(own[-1]) + 1))[own - own[0]]
            with np.errstate(over="ignore", invalid="ignore"):
                values *= np.repeat(scales, self.block[1], axis=1)[:, :n_in]
        return values.view(np.uint8)


def packings(config: Mapping[str, Any], entries: Mapping[str, Entry]) -> dict[str, Packing]:
    """The tensors of a quantized checkpoint that are made of several, by the name of the one with the codes.

    Raises :class:`SourceError` for a scheme that is not read, :class:`FormatError` for a tensor without its scales.
    """
    settings = _settings(config)
    if settings is None:
        return {}
    method = settings.get("quant_method")
    if method == "mxfp4":
        return {name: _mxfp4(name, entries) for name in entries if name.endswith("_blocks")}
    block = settings.get("weight_block_size")
    if method == "fp8" and block is not None:
        if not isinstance(block, list) or len(block) != 2 or not all(type(n) is int and n > 0 for n in block):
            raise SourceError(f"config.json has weight_block_size {block!r}, expected two numbers: rows and columns")
        return _fp8(entries, (block[0], block[1]))
    raise SourceError(
        "expected weights that are not quantized, or quantized as mxfp4 or as fp8 with weight_block_size, "
        f"found {_described(settings)} in config.json; give the checkpoint that this one was made from"
    )


def as_weights(dtype: str, raw: Bytes) -> Floats:
    """Rows of bytes of a plain type, :data:`MXFP4` or :data:`FP8` as float32 [n_rows, n_in]."""
    if dtype == MXFP4:
        return mxfp4_to_f32(raw)
    return as_f32("F32" if dtype == FP8 else dtype, raw)


def _settings(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    for where in (config, *(config.get(key) for key in _CONFIG_KEYS)):
        found = where.get("quantization_config") if isinstance(where, Mapping) else None
        if isinstance(found, Mapping):
            return found
        if found is not None:
            raise SourceError(f"config.json has quantization_config {found!r}, expected an object or nothing")
    return None


def _described(settings: Mapping[str, Any]) -> str:
    """A scheme in the words of its own settings: ``compressed-tensors pack-quantized, 4 bit``."""
    in_4_bit, in_8_bit = settings.get("load_in_4bit"), settings.get("load_in_8bit")
    method = settings.get("quant_method") or ("bitsandbytes" if in_4_bit or in_8_bit else "no quant_method")
    groups = settings.get("config_groups")
    found = groups.values() if isinstance(groups, Mapping) else ()
    weights = [group.get("weights") for group in found if isinstance(group, Mapping)]
    widths = {w.get("num_bits") for w in weights if isinstance(w, Mapping)} - {None}
    bits = settings.get("bits") or settings.get("w_bit") or ("4" if in_4_bit else "8" if in_8_bit else None)
    if bits is None and widths:
        bits = " and ".join(sorted(str(width) for width in widths))
    words = [str(method), settings.get("format"), settings.get("bnb_4bit_quant_type") if in_4_bit else None]
    if method == "fp8":
        words.append("without weight_block_size")
    return " ".join(str(word) for word in words if word) + (f", {bits} bit" if bits else "")


def _mxfp4(name: str, entries: Mapping[str, Entry]) -> Packing:
    blocks, other = entries[name], name.removesuffix("_blocks") + "_scales"
    scales = entries.get(other)
    expected = blocks.shape[:-1]
    if blocks.dtype != "U8" or blocks.shape[-1:] != (_BLOCK // 2,) or len(expected) < 2:
        raise FormatError(
            f"tensor '{name}' is {blocks.dtype} of shape {list(blocks.shape)}, expected U8 of shape "
            f"[..., blocks, {_BLOCK // 2}] as config.json says mxfp4; use the config.json of these weights"
        )
    _check_scales(name, other, scales, expected, ("U8",))
    return Mxfp4(name, other, (*expected[:-1], expected[-1] * _BLOCK))


def _fp8(entries: Mapping[str, Entry], block: tuple[int, int]) -> dict[str, Packing]:
    found: dict[str, Packing] = {}
    for name, entry in entries.items():
        if entry.dtype != "F8_E4M3":
            continue
        if len(entry.shape) < 2:
            raise FormatError(f"tensor '{name}' is F8_E4M3 of shape {list(entry.shape)}, expected a matrix")
        *leading, n_out, n_in = entry.shape
        expected = (*leading, _ceil(n_out, block[0]), _ceil(n_in, block[1]))
        scales = _check_scales(name, name + _SCALES, entries.get(name + _SCALES), expected, WEIGHT_DTYPES)
        found[name] = ScaledFp8(name, scales.name, entry.shape, block, scales.dtype)
    return found


def _check_scales(
    name: str, other: str, scales: Entry | None, expected: tuple[int, ...], dtypes: tuple[str, ...]
) -> Entry:
    if scales is None:
        raise FormatError(f"tensor '{name}' needs its scales '{other}', which are missing; download it again")
    if scales.shape != expected or scales.dtype not in dtypes:
        raise FormatError(
            f"tensor '{other}' is {scales.dtype} of shape {list(scales.shape)}, expected {' or '.join(dtypes)} of "
            f"shape {list(expected)} for the blocks of '{name}'; use the config.json of these weights"
        )
    return scales


def _ceil(n: int, size: int) -> int:
    return -(-n // size)


def _e4m3() -> Floats:
    """The 256 values: sign, 4 bits of exponent (bias 7), 3 of mantissa; no infinities, all ones is NaN."""
    codes = np.arange(256)
    exponent, mantissa = codes >> 3 & 15, codes & 7
    size = np.where(exponent == 0, np.ldexp(mantissa / 8.0, -6), np.ldexp(1 + mantissa / 8.0, exponent - 7))
    size[codes & 127 == 127] = np.nan
    return np.where(codes < 128, size, -size).astype(np.float32)


E4M3: Floats = _e4m3()
"""float32 value of every F8_E4M3 code."""
