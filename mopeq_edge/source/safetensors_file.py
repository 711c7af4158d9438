"""Read one ``.safetensors`` file: its header, checked, and the bytes of any rows.

Our own small reader, because the library's numpy adapter has no BF16, reads whole tensors only and does not
say which tensor of a broken file is wrong. Format: 8 bytes of length, a JSON header, then the data without holes.
"""

from __future__ import annotations

import math
from typing import Any, NoReturn

from mopeq_edge.errors import FormatError, shown
from mopeq_edge.json_file import is_count, parse_json
from mopeq_edge.source.file_bytes import File, file_size, read_bytes
from mopeq_edge.source.shard import DTYPE_BITS, Entry, Shard

MAX_HEADER = 100_000_000
"""Longest header that the safetensors library accepts, in bytes."""

MAX_TENSORS = 2**16
"""Of a file: the largest released mixtures have 140,000, in dozens of files."""

MAX_AXES = 16
"""Of a tensor, so that the product of their sizes is quickly known."""


class SafetensorsFile(Shard):
    """The tensors of one file, sorted by name as the safetensors library lists them.

    Raises :class:`FormatError` if the file is damaged.
    """

    def __init__(self, path: File) -> None:
        super().__init__(path, _read_entries(path))


def _read_entries(path: File) -> dict[str, Entry]:
    try:
        size = file_size(path)
    except OSError as error:
        raise FormatError(f"{path}: cannot be read ({error.strerror}); expected a safetensors file") from None
    if size < 8:
        raise FormatError(f"{path}: truncated safetensors: the file has {size} bytes; download it again")
    length = int.from_bytes(read_bytes(path, 0, 8).tobytes(), "little")
    if length > MAX_HEADER:
        raise FormatError(f"{path}: not a safetensors file (it claims a header of {length} bytes)")
    if 8 + length > size:
        raise FormatError(
            f"{path}: truncated safetensors: the header needs {8 + length} bytes, file has {size}; download it again"
        )
    header = _parse_header(path, read_bytes(path, 8, length).tobytes())
    if len(header) > MAX_TENSORS + 1:
        raise FormatError(
            f"{path}: safetensors with {len(header)} tensors, expected at most {MAX_TENSORS}; save the model in "
            "several files"
        )
    entries = [_entry(path, name, info, 8 + length) for name, info in header.items() if name != "__metadata__"]
    _check_extents(path, entries, 8 + length, size)
    return {entry.name: entry for entry in sorted(entries, key=lambda entry: entry.name)}


def _parse_header(path: File, raw: bytes) -> dict[str, Any]:
    try:
        header = parse_json(raw)
    except ValueError as error:
        raise FormatError(f"{path}: broken safetensors header, or no safetensors file ({error})") from None
    if not isinstance(header, dict):
        raise FormatError(f"{path}: broken safetensors header: expected an object, found {type(header).__name__}")
    return header


def _entry(path: File, name: str, info: Any, data_start: int) -> Entry:
    def broken(problem: str) -> NoReturn:
        raise FormatError(f"{path}: broken safetensors header: tensor '{name}': {problem}; download it again")

    if not isinstance(info, dict):
        broken("expected an object")
    dtype, shape, offsets = info.get("dtype"), info.get("shape"), info.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        broken(f"unknown dtype {shown(dtype)}")
    if not isinstance(shape, list) or len(shape) > MAX_AXES or not all(is_count(dim) for dim in shape):
        broken(f"shape {shown(shape)} is no list of up to {MAX_AXES} sizes")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(is_count(at) for at in offsets):
        broken(f"data_offsets {shown(offsets)} are no pair of sizes")
    bits = math.prod(shape) * DTYPE_BITS[dtype]
    begin, end = offsets
    if bits % 8 or end - begin != bits // 8:
        broken(f"{dtype} of shape {shape} needs {bits} bits, its offsets give {end - begin} bytes")
    return Entry(name, dtype, tuple(shape), data_start + begin, end - begin)


def _check_extents(path: File, entries: list[Entry], data_start: int, size: int) -> None:
    """The data follows the header without holes or overlaps and ends with the file."""
    at = data_start
    # A tensor without elements shares its offset with the next one and must come before it
    for entry in sorted(entries, key=lambda entry: (entry.offset, entry.nbytes)):
        if entry.offset != at:
            raise FormatError(
                f"{path}: broken safetensors header: tensor '{entry.name}' starts at byte {entry.offset}, "
                f"expected {at}, where the one before it ends; download it again"
            )
        at += entry.nbytes
        if at > size:
            raise FormatError(
                f"{path}: truncated safetensors: tensor '{entry.name}' needs {at} bytes, file has {size}; "
                "download it again"
            )
    if at != size:
        raise FormatError(
            f"{path}: broken safetensors: the last tensor ends at byte {at}, but the file has {size}; download it again"
        )
