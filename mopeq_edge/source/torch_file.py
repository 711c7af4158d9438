"""Read one ``pytorch_model.bin``: where its tensors are, as torch says, and the bytes of any rows.

A pickle can run anything, so ``torch.load`` reads it with ``weights_only`` and in no other way: names that are not
torch's own are refused, not called. torch maps the file for that; what a tensor holds is then read from the file,
where the archive keeps it, so that nothing stays mapped.
"""

from __future__ import annotations

import pickle
import re
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mopeq_edge.errors import FormatError, SourceError, printable
from mopeq_edge.regular_file import regular_size
from mopeq_edge.source.file_bytes import read_bytes
from mopeq_edge.source.shard import Entry, Shard

_NAMES: Mapping[str, str] = {
    **{"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "bool": "BOOL"},
    **{"int64": "I64", "int32": "I32", "int16": "I16", "int8": "I8", "uint8": "U8"},
    **{"float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2"},
}
"""torch's types in the words of safetensors."""

_AGAIN = "download it again"
_INSTEAD = "use a checkpoint in safetensors"

MAX_PICKLE = 100_000_000
"""Bytes of the archive's pickle, as of a safetensors header."""

_LOCAL_HEADER = 30
"""Bytes before the name and the extra field of an archive's member."""
_LENGTHS = 26
"""Where the lengths of these two are, two bytes each."""


def open_torch_file(path: Path) -> Shard:
    """The tensors of ``path``, sorted by name.

    Raises :class:`SourceError` without torch, :class:`FormatError` for a file that is damaged or holds anything else.
    """
    places = _records(path)
    found = _load(path)
    # torch slices one mapping of the whole file: the archive's records, in order, moved by the same distance
    pointers = {value.untyped_storage().data_ptr(): value.untyped_storage().nbytes() for value in found.values()}
    storages = sorted((at, size) for at, size in pointers.items() if size)
    starts = {at: start for (at, _), (start, _) in zip(storages, places, strict=False)}
    distances = {at - start for at, start in starts.items()}
    if [size for _, size in storages] != [size for _, size in places] or len(distances) > 1:
        raise FormatError(f"{path}: its archive holds {len(places)} pieces of data, its tensors name others; {_AGAIN}")
    entries = []
    for name, value in found.items():
        storage = value.untyped_storage().data_ptr()
        offset = starts.get(storage, 0) + value.data_ptr() - storage if value.numel() else 0
        dtype = _NAMES[str(value.dtype).removeprefix("torch.")]
        entries.append(Entry(name, dtype, tuple(value.shape), offset, value.nbytes))
    return Shard(path, {entry.name: entry for entry in sorted(entries, key=lambda entry: entry.name)})


def _records(path: Path) -> list[tuple[int, int]]:
    """(start in the file, bytes) of every piece of data in the archive, in order; empty ones left out."""
    try:
        regular_size(path)
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            # before anything is read: what is compressed may become any size
            for member in members:
                _check_member(path, member)
            orders = [member for member in members if member.filename.endswith("/byteorder")]
            # by its size first: a member may claim to be anything
            little = all(member.file_size == 6 and archive.read(member) == b"little" for member in orders)
    except OSError as error:
        raise FormatError(
            f"{path}: cannot be read ({error.strerror or error}); expected a file of torch.save"
        ) from None
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, ValueError, EOFError, struct.error):
        raise FormatError(
            f"{path}: not an archive as torch.save writes them since version 1.6, or it is truncated; {_INSTEAD}"
        ) from None
    if not little:
        raise FormatError(f"{path}: its numbers are not little-endian; {_INSTEAD}")
    if any(member.filename.endswith("/constants.pkl") for member in members):
        raise FormatError(f"{path}: holds a program (TorchScript), expected tensors alone; {_INSTEAD}")
    found = []
    for member in members:
        if re.fullmatch(r"[^/]+/data/\d+", member.filename) and member.file_size:
            header = read_bytes(path, member.header_offset, _LOCAL_HEADER)
            lengths = int(header[_LENGTHS:].view("<u2").sum())
            found.append((member.header_offset + _LOCAL_HEADER + lengths, member.file_size))
    return sorted(found)


def _check_member(path: Path, member: zipfile.ZipInfo) -> None:
    name, size = printable(member.filename, 200), path.stat().st_size
    if not 0 <= member.header_offset < size:
        raise FormatError(
            f"{path}: '{name}' begins at byte {member.header_offset}, expected one of its {size}; {_INSTEAD}"
        )
    if member.compress_type != zipfile.ZIP_STORED or member.compress_size != member.file_size:
        raise FormatError(f"{path}: '{name}' is compressed, expected data as stored; {_INSTEAD}")
    if member.filename.endswith(".pkl") and member.file_size > MAX_PICKLE:
        raise FormatError(f"{path}: '{name}' has {member.file_size} bytes, expected at most {MAX_PICKLE}; {_INSTEAD}")


def _load(path: Path) -> dict[str, Any]:
    """The tensors by name, mapped."""
    try:
        import torch
    except ImportError:
        raise SourceError(
            f"{path}: reading it needs torch; run: pip install 'mopeq-edge[calibrate]', or {_INSTEAD}"
        ) from None
    try:
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        asked = re.search(r"GLOBAL (\S+)", str(error))
        what = f"asks for '{asked[1]}'" if asked else "is none of tensors alone"
        raise FormatError(f"{path}: refused, nothing of it was run: its pickle {what}; {_INSTEAD}") from None
    except Exception as error:
        # a broken pickle raises whatever its instructions stumble over
        reason = " ".join(str(error).split())[:200]
        raise FormatError(f"{path}: torch cannot load it ({reason}); {_AGAIN}") from None
    if not isinstance(found, dict):
        raise FormatError(f"{path}: expected tensors by name, found {type(found).__name__}; {_INSTEAD}")
    for name, value in found.items():
        _check(path, name, value, isinstance(name, str) and isinstance(value, torch.Tensor))
    return found


def _check(path: Path, name: object, value: Any, tensor: bool) -> None:
    if not tensor:
        raise FormatError(f"{path}: expected tensors by name, found {type(value).__name__} under {name!r}; {_INSTEAD}")
    if str(value.layout) != "torch.strided" or not value.is_contiguous() or value.is_neg() or value.is_conj():
        raise FormatError(f"{path}: tensor '{name}' is a view of others or sparse, expected rows as stored; {_INSTEAD}")
    if str(value.dtype).removeprefix("torch.") not in _NAMES:
        raise FormatError(f"{path}: tensor '{name}' has type {value.dtype}, expected weights; {_INSTEAD}")
