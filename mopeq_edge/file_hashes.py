"""Hashes that a finished GGUF carries of itself, so that any later reader can tell whether a byte changed.

``mopeq.tensor_hashes`` is an array of strings: for each tensor of the file, in order, BLAKE2b of 128 bits over its
data, in hex. ``mopeq.header_hash`` is the same over everything before the data, with 32 zeros in its own place. Padding
is zeros. Every file of a split GGUF has those of its own. Their lengths are fixed: a file's size is known before them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import BinaryIO

from mopeq_edge.gguf_file import KV, ValueType
from mopeq_edge.progress import Step

TENSORS_KEY, HEADER_KEY = "mopeq.tensor_hashes", "mopeq.header_hash"
KEYS = (TENSORS_KEY, HEADER_KEY)

DIGEST_BYTES = 16
UNKNOWN = "0" * 2 * DIGEST_BYTES
BYTES_PER_TENSOR = 8 + len(UNKNOWN)
"""What a tensor adds to the array: the string's length, and the string."""

_READ_BYTES = 2**22


def new_hash() -> hashlib.blake2b:
    """What tensors and headers are hashed with."""
    return hashlib.blake2b(digest_size=DIGEST_BYTES)


def hash_of(file: BinaryIO, nbytes: int, step: Step | None = None) -> str:
    """The hash of the next ``nbytes`` of ``file``, or of what there is of them; a few megabytes in memory at a time."""
    found, left = new_hash(), nbytes
    while left and (data := file.read(min(left, _READ_BYTES))):
        found.update(data)
        left -= len(data)
        if step is not None:
            step.advance(len(data))
    return found.hexdigest()


def unknown_hashes(n_tensors: int) -> dict[str, KV]:
    """Both keys with zeros in the place of every hash."""
    return {
        TENSORS_KEY: KV(ValueType.ARRAY, [UNKNOWN] * n_tensors, ValueType.STRING),
        HEADER_KEY: KV(ValueType.STRING, UNKNOWN),
    }


def with_room(kvs: Mapping[str, KV], n_tensors: int) -> Mapping[str, KV]:
    """``kvs`` with room for ``n_tensors`` hashes if it has the keys."""
    return {**kvs, **unknown_hashes(n_tensors)} if TENSORS_KEY in kvs else kvs


def bytes_per_tensor(kvs: Mapping[str, KV]) -> int:
    """Bytes of the header for the hash of one tensor."""
    return BYTES_PER_TENSOR if TENSORS_KEY in kvs else 0


def seal(header: bytes, tensors_at: int, header_at: int, hashes: Sequence[str]) -> bytes:
    """``header`` with the ``hashes`` of its tensors and its own; ``…_at`` is where the first string's text begins."""
    sealed = bytearray(header)
    for index, text in enumerate(hashes):
        at = tensors_at + index * BYTES_PER_TENSOR
        sealed[at : at + len(UNKNOWN)] = text.encode()
    own = new_hash()
    own.update(sealed)
    sealed[header_at : header_at + len(UNKNOWN)] = own.hexdigest().encode()
    return bytes(sealed)
