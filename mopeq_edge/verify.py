"""Compare a GGUF's bytes with the hashes that it carries (:mod:`mopeq_edge.file_hashes`)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

from mopeq_edge.errors import FormatError
from mopeq_edge.file_hashes import HEADER_KEY, KEYS, TENSORS_KEY, UNKNOWN, new_hash
from mopeq_edge.gguf_file import GGUFHeader, pad
from mopeq_edge.gguf_layout import encode_kv
from mopeq_edge.progress import BYTES, Progress, Step
from mopeq_edge.split import read_parts

_READ_BYTES = 2**22


@dataclass(frozen=True)
class Verification:
    """What was found. ``damaged`` has what differs: (file, tensor), with words for what is no tensor's data."""

    files: tuple[str, ...]
    n_tensors: int
    n_bytes: int
    has_hashes: bool
    damaged: tuple[tuple[str, str], ...] = ()

    @property
    def whole(self) -> bool:
        """Every byte is as it was written."""
        return self.has_hashes and not self.damaged

    def as_dict(self) -> dict[str, Any]:
        """Plain values."""
        found = asdict(self)
        return {
            **found,
            "damaged": [{"file": file, "what": what} for file, what in self.damaged],
            "files": list(self.files),
            "whole": self.whole,
        }


def verify(path: Path, progress: Progress) -> Verification:
    """Read every byte of ``path``, or of all files of a split GGUF.

    Raises :class:`FormatError` or :class:`SourceError` where the damage leaves no header to read or a file is missing.
    """
    headers = read_parts(path)
    damaged: list[tuple[str, str]] = []
    known = [any(key in header.kvs for key in KEYS) for header in headers]
    names = tuple(str(header.path) for header in headers)
    n_tensors, n_bytes = sum(len(h.tensors) for h in headers), sum(h.file_size for h in headers)
    if not any(known):
        return Verification(names, n_tensors, n_bytes, False)
    with progress.step("verify", n_bytes, BYTES) as step:
        for header in headers:
            damaged += [(str(header.path), what) for what in _damage(header, step)]
    return Verification(names, n_tensors, n_bytes, True, tuple(damaged))


def _damage(header: GGUFHeader, step: Step) -> Iterator[str]:
    recorded, own = header.get(TENSORS_KEY), header.get(HEADER_KEY)
    sound = isinstance(recorded, list) and isinstance(own, str) and len(recorded) == len(header.tensors)
    try:
        with header.path.open("rb") as file:
            raw = file.read(header.data_start)
            step.advance(len(raw))
            if not sound or _header_hash(header, raw) != own:
                yield "header (key-values, names, shapes, types)"
            if sound:
                yield from _damaged_data(header, file, recorded, step)
    except OSError as error:
        raise FormatError(f"{header.path}: cannot be read ({error.strerror}); download or copy it again") from None


def _header_hash(header: GGUFHeader, raw: bytes) -> str | None:
    """The hash of the header's bytes with zeros in its own place; None if that place is not clear."""
    kv = header.kvs[HEADER_KEY]
    try:
        text = encode_kv(HEADER_KEY, kv)
    except (UnicodeEncodeError, FormatError):
        return None
    if raw.count(text) != 1 or len(kv.value) != len(UNKNOWN):
        return None
    end = raw.index(text) + len(text)
    found = new_hash()
    found.update(raw[: end - len(UNKNOWN)])
    found.update(UNKNOWN.encode())
    found.update(raw[end:])
    return str(found.hexdigest())


def _damaged_data(header: GGUFHeader, file: BinaryIO, recorded: list[str], step: Step) -> Iterator[str]:
    for tensor, expected in zip(header.tensors, recorded, strict=True):
        file.seek(header.data_start + tensor.offset)
        found = new_hash()
        left = tensor.nbytes
        while left and (data := file.read(min(left, _READ_BYTES))):
            found.update(data)
            left -= len(data)
            step.advance(len(data))
        if found.hexdigest() != expected:
            yield tensor.name
        if any(file.read(pad(tensor.nbytes, header.alignment) - tensor.nbytes)):
            yield f"padding after {tensor.name}"
    if file.seek(0, 2) != (end := _planned_end(header)):
        yield f"length ({header.file_size} bytes, {end} were written)"


def _planned_end(header: GGUFHeader) -> int:
    if not header.tensors:
        return header.data_start
    last = header.tensors[-1]
    return header.data_start + pad(last.offset + last.nbytes, header.alignment)
