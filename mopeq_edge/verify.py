"""Compare the bytes of a GGUF (:mod:`mopeq_edge.file_hashes`) and of the vision file beside it
(:mod:`mopeq_edge.vision.hashes`) with the hashes that they carry."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

from mopeq_edge.errors import FormatError
from mopeq_edge.file_hashes import HEADER_KEY, KEYS, TENSORS_KEY, UNKNOWN, hash_of, new_hash
from mopeq_edge.gguf_file import GGUFHeader, pad
from mopeq_edge.gguf_layout import encode_kv
from mopeq_edge.progress import BYTES, Progress, Step
from mopeq_edge.split import read_parts
from mopeq_edge.vision.description import ENDING, vision_beside, weights_file


@dataclass(frozen=True)
class Verification:
    """What was found. ``damaged`` has what differs: (file, tensor), with words for what is no tensor's data."""

    files: tuple[str, ...]
    n_tensors: int
    n_bytes: int
    without_hashes: tuple[str, ...]
    """Files that carry none."""
    damaged: tuple[tuple[str, str], ...] = ()

    @property
    def has_hashes(self) -> bool:
        """Every file can be verified."""
        return not self.without_hashes

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
            "has_hashes": self.has_hashes,
            "whole": self.whole,
            "without_hashes": list(self.without_hashes),
        }


def verify(path: Path, progress: Progress) -> Verification:
    """Read every byte of ``path``, of all files of a split GGUF, and of the vision file beside it; or of that alone.

    Raises :class:`FormatError` or :class:`SourceError` where the damage leaves no header to read or a file is missing.
    """
    if path.name.endswith(ENDING):
        return _verify_vision(path, progress)
    headers = read_parts(path)
    names = [str(header.path) for header in headers]
    without = [str(header.path) for header in headers if not any(key in header.kvs for key in KEYS)]
    n_tensors, n_bytes = sum(len(h.tensors) for h in headers), sum(h.file_size for h in headers)
    damaged: list[tuple[str, str]] = []
    if len(without) < len(headers):
        # a part that lost its hashes is damaged, not made by another program
        without = []
        with progress.step("verify", n_bytes, BYTES) as step:
            for header in headers:
                damaged += [(str(header.path), what) for what in _damage(header, step)]
    found = Verification(tuple(names), n_tensors, n_bytes, tuple(without), tuple(damaged))
    vision = vision_beside(path)
    return _with(found, vision, progress) if vision.is_file() else found


def _with(found: Verification, vision: Path, progress: Progress) -> Verification:
    """``found`` and what is found of the file ``vision``, also if there is nothing left of it to read."""
    try:
        more = _verify_vision(vision, progress)
    except FormatError as error:
        more = Verification((str(vision),), 0, 0, (), ((str(vision), f"everything ({error})"),))
    return Verification(
        found.files + more.files,
        found.n_tensors + more.n_tensors,
        found.n_bytes + more.n_bytes,
        found.without_hashes + more.without_hashes,
        found.damaged + more.damaged,
    )


def _verify_vision(path: Path, progress: Progress) -> Verification:
    from mopeq_edge.vision.graph_file import read_graph
    from mopeq_edge.vision.hashes import damage, recorded

    graph = read_graph(path)
    said = recorded(graph)
    beside = weights_file(path)
    if not beside.is_file():
        raise FormatError(f"{path}: its weights, {beside.name}, are not beside it; copy both files")
    names = (str(path), str(beside))
    n_bytes = len(graph.raw) + beside.stat().st_size
    if said is None:
        return Verification(names, len(graph.stored), n_bytes, (str(path),))
    with progress.step("verify vision", n_bytes, BYTES) as step:
        damaged = tuple((str(file), what) for file, what in damage(graph, said, step))
    return Verification(names, len(graph.stored), n_bytes, (), damaged)


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
        if hash_of(file, tensor.nbytes, step) != expected:
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
