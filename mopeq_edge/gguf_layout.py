"""The bytes of a GGUF before its tensor data, and so the exact size of the file.

The size of a file depends on its key-values, names and shapes, and on the type of each tensor; all are
known before a single weight is quantized. Planner and writer both use this module, which is why the
predicted size is the written size.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from mopeq_edge.errors import FormatError
from mopeq_edge.file_hashes import HEADER_KEY, TENSORS_KEY, UNKNOWN, bytes_per_tensor, seal, with_room
from mopeq_edge.ggml.types import GgmlType
from mopeq_edge.gguf_file import (
    DEFAULT_ALIGNMENT,
    KV,
    MAGIC,
    MAX_NAME,
    SCALAR_FORMATS,
    StoredArray,
    TensorInfo,
    ValueType,
    pad,
)

TensorSpec = tuple[str, tuple[int, ...], GgmlType]
"""(name, shape as ggml's ne, type) of a tensor to be written."""


@dataclass(frozen=True)
class Layout:
    """Where everything of a file to be written goes."""

    header: bytes
    """Magic to last tensor info, padded: the file's first bytes."""
    header_end: int
    """Bytes of the header without its padding."""
    tensors: tuple[TensorInfo, ...]
    alignment: int
    file_size: int
    hashes_at: tuple[int, int] | None = None
    """Where in the header the first tensor's hash and the header's own are, if the file carries them."""

    def sealed(self, hashes: Sequence[str]) -> bytes:
        """The header with the ``hashes`` of all tensors, and its own, where it has room for them."""
        return self.header if self.hashes_at is None else seal(self.header, *self.hashes_at, hashes)


def string(value: str) -> KV:
    return KV(ValueType.STRING, value)


def uint32(value: int) -> KV:
    return KV(ValueType.UINT32, value)


def layout(kvs: Mapping[str, KV], specs: Sequence[TensorSpec]) -> Layout:
    """Lay out a file with ``kvs`` in their order and tensors in the order of ``specs``.

    Every tensor, the last one too, is followed by padding to the alignment, as llama.cpp's writer does. Where ``kvs``
    has the keys of :mod:`mopeq_edge.file_hashes`, there is room for a hash of each tensor.
    """
    kvs = with_room(kvs, len(specs))
    alignment = kvs["general.alignment"].value if "general.alignment" in kvs else DEFAULT_ALIGNMENT
    tensors: list[TensorInfo] = []
    offset = 0
    for name, shape, kind in specs:
        info = TensorInfo(name, shape, kind, offset)
        tensors.append(info)
        offset += pad(info.nbytes, alignment)
    parts = [MAGIC, struct.pack("<IQQ", 3, len(specs), len(kvs))]
    values_at: dict[str, int] = {}
    at = sum(map(len, parts))
    for key, kv in kvs.items():
        parts.append(encode_kv(key, kv))
        at += len(parts[-1])
        if key in (TENSORS_KEY, HEADER_KEY):
            n_hashes = len(specs) if key == TENSORS_KEY else 1
            # from the end of the key-value back to the text of its first string
            values_at[key] = at - n_hashes * (8 + len(UNKNOWN)) + 8
    parts.extend(encode_tensor(info) for info in tensors)
    header = b"".join(parts)
    end = len(header)
    header += b"\0" * (pad(end, alignment) - end)
    hashes_at = (values_at[TENSORS_KEY], values_at[HEADER_KEY]) if TENSORS_KEY in values_at else None
    return Layout(header, end, tuple(tensors), alignment, len(header) + offset, hashes_at)


def tensor_header_bytes(info: TensorInfo, kvs: Mapping[str, KV]) -> int:
    """Bytes that a tensor adds to the header of a file with ``kvs``: its info, and its hash where they are kept."""
    return len(encode_tensor(info)) + bytes_per_tensor(kvs)


def padded_nbytes(shape: Iterable[int], kind: GgmlType, alignment: int = DEFAULT_ALIGNMENT) -> int:
    """Bytes that a tensor adds to a file: its data and the padding behind it."""
    return pad(kind.nbytes(math.prod(shape)), alignment)


def _encode_string(text: str) -> bytes:
    raw = text.encode("utf-8", "surrogateescape")
    return struct.pack("<Q", len(raw)) + raw


def encode_kv(key: str, kv: KV) -> bytes:
    """A key-value as the header holds it."""
    kind = _encode_string(key) + struct.pack("<I", kv.type)
    if kv.type is ValueType.STRING:
        return kind + _encode_string(kv.value)
    if kv.type is not ValueType.ARRAY:
        return kind + struct.pack("<" + SCALAR_FORMATS[kv.type], kv.value)
    if kv.sub_type is None or kv.sub_type is ValueType.ARRAY:
        raise FormatError(f"key '{key}': an array needs a scalar or string element type")
    if isinstance(kv, StoredArray):
        return kind + struct.pack("<IQ", kv.sub_type, kv.length) + kv.raw
    head = kind + struct.pack("<IQ", kv.sub_type, len(kv.value))
    if kv.sub_type is ValueType.STRING:
        return head + b"".join(_encode_string(item) for item in kv.value)
    return head + struct.pack(f"<{len(kv.value)}{SCALAR_FORMATS[kv.sub_type]}", *kv.value)


def encode_tensor(info: TensorInfo) -> bytes:
    """A tensor info as the header holds it."""
    if len(info.name.encode()) > MAX_NAME:
        raise FormatError(f"tensor name '{info.name}' is longer than {MAX_NAME} bytes, which llama.cpp refuses")
    return (
        _encode_string(info.name)
        + struct.pack(f"<I{len(info.shape)}Q", len(info.shape), *info.shape)
        + struct.pack("<IQ", info.type.id, info.offset)
    )
