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
from mopeq_edge.ggml.types import GgmlType
from mopeq_edge.gguf_file import (
    DEFAULT_ALIGNMENT,
    KV,
    MAGIC,
    MAX_NAME,
    SCALAR_FORMATS,
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


def string(value: str) -> KV:
    return KV(ValueType.STRING, value)


def uint32(value: int) -> KV:
    return KV(ValueType.UINT32, value)


def layout(kvs: Mapping[str, KV], specs: Sequence[TensorSpec]) -> Layout:
    """Lay out a file with ``kvs`` in their order and tensors in the order of ``specs``.

    Every tensor, the last one too, is followed by padding to the alignment, as llama.cpp's writer does.
    """
    alignment = kvs["general.alignment"].value if "general.alignment" in kvs else DEFAULT_ALIGNMENT
    tensors: list[TensorInfo] = []
    offset = 0
    for name, shape, kind in specs:
        info = TensorInfo(name, shape, kind, offset)
        tensors.append(info)
        offset += pad(info.nbytes, alignment)
    parts = [MAGIC, struct.pack("<IQQ", 3, len(specs), len(kvs))]
    parts.extend(encode_kv(key, kv) for key, kv in kvs.items())
    parts.extend(encode_tensor(info) for info in tensors)
    header = b"".join(parts)
    end = len(header)
    header += b"\0" * (pad(end, alignment) - end)
    return Layout(header, end, tuple(tensors), alignment, len(header) + offset)


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
