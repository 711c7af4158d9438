"""Read the header of a GGUF file: key-values, tensor infos, where the data starts.

Every length, count and offset is checked against the file's size before it is used, and what a header may hold has a
limit: time and memory are bounded by the constants below, whatever the file says and however large it is. Arrays stay
as they are in the file until somebody asks for their elements. Tensor data is not touched.

Format: version 3 (and 2) little-endian, as ``ggml/docs/gguf.md`` describes.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

from mopeq_edge.errors import FormatError, printable, shown
from mopeq_edge.ggml.types import BY_ID, GgmlType
from mopeq_edge.regular_file import regular_size

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
MAX_NAME = 63
"""Longest tensor name that llama.cpp loads, in bytes."""

MAX_KEY = 2**16 - 1
"""Longest key that the format allows, in bytes."""

MAX_ALIGNMENT = 2**20
"""Largest alignment in bytes; files in use have 32, and the padding of a header is written from memory."""

MAX_HEADER = 2**27
"""Bytes from the file's start to its data: the largest vocabularies in use take a fifth of that."""

MAX_KEYS, MAX_TENSORS = 2**12, 2**15
"""Files in use have some fifty keys; 512 layers whose three stacks have seven groups each have 20,000 tensors."""

MAX_ELEMENTS, MAX_TEXTS = 2**22, 2**21
"""Elements of all arrays together, and how many of them may be strings: tokens, types, scores and merges of the largest
vocabularies are 1.4 million, 0.8 million of them strings."""

_READ_BYTES = 2**18


class ValueType(IntEnum):
    """Types of a GGUF key-value."""

    UINT8 = 0
    INT8 = 1
    UINT16 = 2
    INT16 = 3
    UINT32 = 4
    INT32 = 5
    FLOAT32 = 6
    BOOL = 7
    STRING = 8
    ARRAY = 9
    UINT64 = 10
    INT64 = 11
    FLOAT64 = 12


SCALAR_FORMATS: Mapping[ValueType, str] = {
    ValueType.UINT8: "B",
    ValueType.INT8: "b",
    ValueType.UINT16: "H",
    ValueType.INT16: "h",
    ValueType.UINT32: "I",
    ValueType.INT32: "i",
    ValueType.FLOAT32: "f",
    ValueType.BOOL: "?",
    ValueType.UINT64: "Q",
    ValueType.INT64: "q",
    ValueType.FLOAT64: "d",
}


@dataclass(frozen=True, eq=False)
class KV:
    """One key's value; ``sub_type`` is the element type of an array."""

    type: ValueType
    value: Any
    sub_type: ValueType | None = None

    @cached_property
    def encoded(self) -> bytes:
        """Type and value as the header holds them. Kept: a vocabulary takes a tenth of a second, a plan asks often."""
        kind = struct.pack("<I", self.type)
        if self.type is ValueType.STRING:
            return kind + encode_string(self.value)
        if self.type is not ValueType.ARRAY:
            return kind + struct.pack("<" + SCALAR_FORMATS[self.type], self.value)
        assert self.sub_type is not None
        head = kind + struct.pack("<IQ", self.sub_type, len(self.value))
        if self.sub_type is ValueType.STRING:
            return head + b"".join(map(encode_string, self.value))
        return head + struct.pack(f"<{len(self.value)}{SCALAR_FORMATS[self.sub_type]}", *self.value)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, KV):
            return NotImplemented
        return (self.type, self.sub_type) == (other.type, other.sub_type) and bool(self.value == other.value)

    __hash__ = None  # type: ignore[assignment]


class StoredArray(KV):
    """An array as it is in a file, checked; its ``value`` is made when it is asked for."""

    def __init__(self, sub_type: ValueType, length: int, raw: bytes | bytearray) -> None:
        for name, value in (("type", ValueType.ARRAY), ("sub_type", sub_type), ("length", length), ("raw", raw)):
            object.__setattr__(self, name, value)

    length: int
    """Number of elements."""
    raw: bytes | bytearray
    """The elements, one after the other; each string behind its length."""

    @property
    def encoded(self) -> bytes:
        assert self.sub_type is not None
        return struct.pack("<IIQ", self.type, self.sub_type, self.length) + self.raw

    @cached_property
    def value(self) -> list[Any]:
        """The elements."""
        assert self.sub_type is not None
        if self.sub_type is not ValueType.STRING:
            return list(struct.unpack(f"<{self.length}{SCALAR_FORMATS[self.sub_type]}", self.raw))
        found, at = [], 0
        for _ in range(self.length):
            start = at + 8
            at = start + _LENGTH(self.raw, at)[0]
            found.append(self.raw[start:at].decode("utf-8", "surrogateescape"))
        return found


_LENGTH = struct.Struct("<Q").unpack_from
_TENSOR = tuple(struct.Struct(f"<{n}QIQ") for n in range(5))
"""Axes, type and offset of a tensor, by its number of axes."""


def encode_string(text: str) -> bytes:
    """A string as the format has it: its length, then its bytes."""
    raw = text.encode("utf-8", "surrogateescape")
    return len(raw).to_bytes(8, "little") + raw


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a GGUF; ``shape`` is ggml's ``ne``: [n_in, n_out, n_expert]."""

    name: str
    shape: tuple[int, ...]
    type: GgmlType
    offset: int
    """From the start of the tensor data, in bytes."""

    @property
    def n_weights(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.type.nbytes(self.n_weights)


@dataclass(frozen=True)
class GGUFHeader:
    """All of a GGUF file but the tensor data."""

    path: Path
    version: int
    kvs: dict[str, KV]
    tensors: tuple[TensorInfo, ...]
    alignment: int
    data_start: int
    """Where the tensor data begins, in bytes from the start of the file."""
    file_size: int

    def get(self, key: str) -> Any:
        """The value under ``key``, or None."""
        kv = self.kvs.get(key)
        return None if kv is None else kv.value


class _Cursor:
    """Reads values from the header and never past the end of the file."""

    def __init__(self, file: BinaryIO, path: Path, size: int) -> None:
        self.file, self.path, self.size, self.at = file, path, size, 0
        self.elements = self.texts = 0
        """Of the arrays read so far."""

    def take(self, n: int, what: str) -> bytes:
        if n > self.size - self.at:
            raise FormatError(
                f"{self.path}: truncated GGUF: {what} needs {n} bytes at offset {self.at}, "
                f"but the file ends at {self.size}; download or convert it again"
            )
        if self.at + n > MAX_HEADER:
            raise FormatError(
                f"{self.path}: broken GGUF: {what} ends at byte {self.at + n}, expected a header of at most "
                f"{MAX_HEADER} bytes; convert the model again"
            )
        data = self.file.read(n)
        if len(data) != n:
            raise FormatError(f"{self.path}: truncated GGUF: the file shrank while it was read")
        self.at += n
        return data

    def unpack(self, fmt: str, what: str) -> Any:
        return struct.unpack("<" + fmt, self.take(struct.calcsize("<" + fmt), what))[0]

    def count(self, what: str, smallest: int, most: int) -> int:
        """A count of at most ``most`` items that take at least ``smallest`` bytes each."""
        return self.checked(int(self.unpack("Q", what)), what, smallest, most, self.at)

    def checked(self, n: int, what: str, smallest: int, most: int, start: int) -> int:
        """``n`` if the file has room for so many items from ``start`` on, behind their number."""
        found = f"{self.path}: broken GGUF: {what} is {n} at offset {start - 8}"
        if n * smallest > self.size - start:
            raise FormatError(f"{found}, more than the file's {self.size} bytes can hold")
        if n > most:
            raise FormatError(f"{found}, expected at most {most}")
        return n

    def length(self, what: str, smallest: int) -> int:
        """The length of an array; all together have at most :data:`MAX_ELEMENTS`."""
        n = self.count(f"length of {what}", smallest, MAX_ELEMENTS - self.elements)
        self.elements += n
        return n

    def string(self, what: str) -> str:
        raw = self.take(self.count(f"length of {what}", 1, MAX_HEADER), what)
        # llama.cpp does not ask for valid UTF-8 (token pieces are bytes); keep every byte
        return raw.decode("utf-8", "surrogateescape")

    def name(self, what: str, most: int) -> str:
        """A key or a tensor's name: printable text of at most ``most`` bytes."""
        n = self.count(f"length of {what}", 1, MAX_HEADER)
        raw = self.take(min(n, most + 1), what)
        text = raw.decode("utf-8", "surrogateescape")
        if n > most:
            raise FormatError(f"{self.path}: {what} '{printable(text, 80)}' is longer than {most} bytes ({n})")
        if not text or not text.isprintable():
            raise FormatError(
                f"{self.path}: broken GGUF: {what} '{text}' at offset {self.at - n}, expected printable UTF-8"
            )
        return text

    def value_type(self, what: str) -> ValueType:
        number = self.unpack("I", f"type of {what}")
        try:
            return ValueType(number)
        except ValueError:
            raise FormatError(f"{self.path}: broken GGUF: {what} has unknown value type {number}") from None

    def value(self, key: str) -> KV:
        kind = self.value_type(f"key '{key}'")
        if kind is ValueType.STRING:
            return KV(kind, self.string(f"value of '{key}'"))
        if kind is not ValueType.ARRAY:
            return KV(kind, self.unpack(SCALAR_FORMATS[kind], f"value of '{key}'"))
        sub = self.value_type(f"elements of '{key}'")
        if sub is ValueType.ARRAY:
            raise FormatError(f"{self.path}: key '{key}' is an array of arrays, which llama.cpp does not load")
        if sub is ValueType.STRING:
            n = self.length(f"'{key}'", 8)
            return StoredArray(sub, n, self.strings(key, n))
        width = struct.calcsize("<" + SCALAR_FORMATS[sub])
        n = self.length(f"'{key}'", width)
        return StoredArray(sub, n, self.take(n * width, f"values of '{key}'"))

    def strings(self, key: str, n: int) -> bytearray:
        """``n`` strings with their lengths, which lie one behind the other; read in pieces, walked, not made."""
        what = f"element of '{key}'"
        if self.texts + n > MAX_TEXTS:
            raise FormatError(
                f"{self.path}: broken GGUF: '{key}' has {n} strings at offset {self.at}, expected at most "
                f"{MAX_TEXTS - self.texts}; convert the model again"
            )
        self.texts += n
        whole, piece = bytearray(), b""
        while n:
            found, end = _walk(piece, n)
            whole += piece[:end]
            piece, n = piece[end:], n - found
            if n:
                piece += self._more(what, piece, n)
        # what lies behind the strings was read with them
        self.at -= len(piece)
        self.file.seek(self.at)
        return whole

    def _more(self, what: str, piece: bytes, n: int) -> bytes:
        """The rest of the string that ``piece`` begins with, and some of the ``n`` from there on."""
        needed = 8 - len(piece)
        if needed <= 0:
            start = self.at - len(piece) + 8
            needed += self.checked(_LENGTH(piece, 0)[0], f"length of {what}", 1, MAX_HEADER, start)
        room = min(self.size, MAX_HEADER) - self.at
        return self.take(max(needed, min(_READ_BYTES, 32 * n, room)), what)


def _walk(piece: bytes, most: int) -> tuple[int, int]:
    """(number, end) of the whole strings, at most ``most``, that ``piece`` begins with."""
    at = done = 0
    try:
        # the inner loop is what the largest vocabulary, or a hostile file, takes its time in
        while done < most:
            end, n = at, min(64, most - done)
            for _ in range(n):
                end += 8 + _LENGTH(piece, end)[0]
            if end > len(piece):
                break
            at, done = end, done + n
    except (struct.error, OverflowError):
        pass
    while done < most and at + 8 <= len(piece) and (end := at + 8 + _LENGTH(piece, at)[0]) <= len(piece):
        done, at = done + 1, end
    return done, at


def _read_tensor(cursor: _Cursor) -> TensorInfo:
    name = cursor.name("tensor name", MAX_NAME)
    n_dims = cursor.unpack("I", f"dimensions of tensor '{name}'")
    if not 1 <= n_dims <= 4:
        raise FormatError(f"{cursor.path}: tensor '{name}' has {n_dims} dimensions, expected 1 to 4")
    form = _TENSOR[n_dims]
    *shape_read, type_id, offset = form.unpack(cursor.take(form.size, f"shape of tensor '{name}'"))
    shape = tuple(shape_read)
    if type_id not in BY_ID:
        raise FormatError(f"{cursor.path}: tensor '{name}' has unknown type {type_id}; a newer llama.cpp made it?")
    kind = BY_ID[type_id]
    if 0 in shape or not kind.fits(shape[0]):
        raise FormatError(
            f"{cursor.path}: tensor '{name}' of shape {list(shape)} cannot have type {kind.name} "
            f"(rows must be whole blocks of {kind.block_size})"
        )
    return TensorInfo(name, shape, kind, offset)


def read_header(path: Path) -> GGUFHeader:
    """Read and check the header of ``path``.

    Raises :class:`FormatError` if it is no GGUF, is truncated or contradicts itself.
    """
    try:
        size = regular_size(path)
        file = path.open("rb")
    except OSError as error:
        raise FormatError(f"{path}: cannot be read ({error.strerror}); give the path of a GGUF file") from None
    with file:
        cursor = _Cursor(file, path, size)
        if size < 4 or cursor.take(4, "magic") != MAGIC:
            raise FormatError(f"{path}: not a GGUF file (it does not start with 'GGUF')")
        version = cursor.unpack("I", "version")
        if version not in VERSIONS:
            raise FormatError(f"{path}: GGUF version {version}, expected 2 or 3 (little-endian); convert it again")
        n_tensors = cursor.count("tensor count", 24, MAX_TENSORS)
        n_kvs = cursor.count("key-value count", 12, MAX_KEYS)
        kvs: dict[str, KV] = {}
        for _ in range(n_kvs):
            key = cursor.name("key", MAX_KEY)
            if key in kvs:
                raise FormatError(f"{path}: key '{key}' appears twice")
            kvs[key] = cursor.value(key)
        tensors = tuple(_read_tensor(cursor) for _ in range(n_tensors))
        header_end = cursor.at
    alignment = _alignment(path, kvs.get("general.alignment"))
    header = GGUFHeader(path, version, kvs, tensors, alignment, pad(header_end, alignment), size)
    _check_extents(header)
    return header


def _alignment(path: Path, kv: KV | None) -> int:
    if kv is None:
        return DEFAULT_ALIGNMENT
    value = kv.value
    if kv.type is not ValueType.UINT32 or not 0 < value <= MAX_ALIGNMENT or value & (value - 1):
        raise FormatError(
            f"{path}: general.alignment is {shown(value)} ({kv.type.name}), expected a power of two up to "
            f"{MAX_ALIGNMENT} (UINT32); convert the model again"
        )
    return int(value)


def _check_extents(header: GGUFHeader) -> None:
    """Names are unique; tensors lie in the file, aligned, one after the other."""
    names: set[str] = set()
    expected = 0
    for tensor in header.tensors:
        if tensor.name in names:
            raise FormatError(f"{header.path}: tensor '{tensor.name}' appears twice")
        names.add(tensor.name)
        if tensor.offset != expected:
            raise FormatError(
                f"{header.path}: tensor '{tensor.name}' has offset {tensor.offset}, expected {expected} "
                f"(right after the tensor before it, aligned to {header.alignment})"
            )
        end = header.data_start + tensor.offset + tensor.nbytes
        if end > header.file_size:
            raise FormatError(
                f"{header.path}: truncated GGUF: tensor '{tensor.name}' ends at byte {end}, "
                f"but the file has {header.file_size}; download or convert it again"
            )
        expected = pad(tensor.offset + tensor.nbytes, header.alignment)


def pad(n: int, alignment: int) -> int:
    """``n`` rounded up to a multiple of ``alignment``."""
    return -(-n // alignment) * alignment
