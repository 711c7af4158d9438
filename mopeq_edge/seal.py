"""Fill in the hashes of a GGUF that another tool wrote with room for them (:mod:`mopeq_edge.file_hashes`)."""

from __future__ import annotations

from pathlib import Path
from typing import BinaryIO

from mopeq_edge.errors import FormatError
from mopeq_edge.file_hashes import BYTES_PER_TENSOR, HEADER_KEY, TENSORS_KEY, UNKNOWN, new_hash, seal, unknown_hashes
from mopeq_edge.gguf_file import read_header
from mopeq_edge.gguf_layout import encode_kv

_READ_BYTES = 2**22


def seal_file(path: Path) -> None:
    """Hash every tensor and the header of ``path`` in place. Raises :class:`FormatError` if it has no room for that."""
    header = read_header(path)
    with path.open("r+b") as file:
        raw = file.read(header.data_start)
        tensors_at, header_at = (
            _end_of(path, raw, key, len(header.tensors)) - room
            for key, room in ((TENSORS_KEY, BYTES_PER_TENSOR * len(header.tensors)), (HEADER_KEY, len(UNKNOWN)))
        )
        hashes = [_hash(file, header.data_start + info.offset, info.nbytes) for info in header.tensors]
        # of the first string in the array: its text, behind its length
        sealed = seal(raw, tensors_at + BYTES_PER_TENSOR - len(UNKNOWN), header_at, hashes)
        file.seek(0)
        file.write(sealed)


def _end_of(path: Path, raw: bytes, key: str, n_tensors: int) -> int:
    room = encode_kv(key, unknown_hashes(n_tensors)[key])
    if raw.count(room) != 1:
        raise FormatError(f"{path}: expected room for the hashes of {n_tensors} tensors in '{key}', found none")
    return raw.index(room) + len(room)


def _hash(file: BinaryIO, start: int, size: int) -> str:
    found = new_hash()
    file.seek(start)
    while size and (data := file.read(min(size, _READ_BYTES))):
        found.update(data)
        size -= len(data)
    return found.hexdigest()
