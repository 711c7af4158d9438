"""The emit stage on an engine of several machines: every task writes its part of the file where it belongs.

The layout is known to the byte before a weight is quantized, so tasks share one file of its final size, on storage that
all machines see, and nothing large goes through this process. Clients of NFS write whole pages: two that write into
one page can lose each other's bytes. A task therefore writes only the pages that are its own from end to end; what is
left at its two ends comes back with its result, and this process writes it.

When all is on the storage every tensor is read back, on any machine, for the hash that the file carries, and each
part of it is compared with the hash that its writer made of it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import BinaryIO

from mopeq_edge.emit import Written, quantized, quantizer_weights, whole_files, written
from mopeq_edge.engine.interface import Engine, Tools
from mopeq_edge.errors import FormatError, OutputError
from mopeq_edge.expert_groups.layout import Types, expert_map
from mopeq_edge.file_hashes import new_hash
from mopeq_edge.ggml.library import Floats
from mopeq_edge.ggml.types import GgmlType
from mopeq_edge.gguf_file import KV
from mopeq_edge.gguf_layout import Layout
from mopeq_edge.imatrix import Imatrix
from mopeq_edge.progress import BYTES, Progress, Step
from mopeq_edge.source.model import Source, SourceTensor

PAGE = 2**16
"""Bytes that one machine writes at least, and from a multiple of them: the largest page of the systems in use."""

READ_AT_ONCE = 2**22


@dataclass(frozen=True)
class PartToWrite:
    """One task: ``rows`` of each of the ``matrices`` of ``tensor`` as ``kind``, at ``offset`` of the file ``path``.

    ``weights`` [len(matrices), n_in] weigh the quantizer.
    """

    path: Path
    offset: int
    tensor: SourceTensor
    kind: GgmlType
    matrices: tuple[int, ...]
    rows: range
    weights: Floats | None

    @property
    def n_weights(self) -> int:
        return self.tensor.n_in * len(self.rows) * len(self.matrices)


@dataclass(frozen=True)
class PartWritten:
    """``head`` and ``tail`` are what its task left out at both ends: together less than two pages."""

    nbytes: int
    digest: str
    head: bytes
    tail: bytes


@dataclass(frozen=True)
class TensorToHash:
    """One task: the data of a tensor at ``offset`` of ``path``; ``parts`` has (bytes, hash) of each, in order."""

    path: Path
    offset: int
    name: str
    parts: tuple[tuple[int, str], ...]


def emit_on(
    engine: Engine,
    source: Source,
    types: Types,
    kvs: Mapping[str, KV],
    imatrix: Imatrix | None,
    path: Path,
    *,
    progress: Progress,
    split_bytes: int | None = None,
) -> int:
    """:func:`mopeq_edge.emit.emit` by tasks of ``engine``, to the same bytes; all its machines must see ``path``."""
    with whole_files(source, types, kvs, imatrix, path, split_bytes) as files, ExitStack() as stack:
        what = written(source, types)
        filling = [_Filling(temporary, place, list(islice(what, len(place.tensors)))) for temporary, place in files]
        opened = {one.path: stack.enter_context(one.path.open("r+b")) for one in filling}
        for one in filling:
            one.begin(opened[one.path])
        with progress.step("emit", sum(t.n_weights for t in source.tensors), "weights") as step:
            hashes = _write_parts(engine, source, filling, imatrix, opened, step)
        to_hash = [task for one in filling for task in one.tensors_to_hash(hashes)]
        with progress.step("hash", sum(n for task in to_hash for n, _ in task.parts), BYTES) as step:
            found = {
                (to_hash[number].path, to_hash[number].offset): digest
                for number, digest in engine.map(hash_tensor, source, to_hash, step.advance)
            }
        for one in filling:
            one.seal(opened[one.path], found)
    return sum(place.file_size for _, place in files)


class _Filling:
    """One file while it is filled: what is in it, and where."""

    def __init__(self, path: Path, place: Layout, what: Sequence[Written]) -> None:
        self.path, self.place, self.what = path.absolute(), place, what
        self.starts = [len(place.header) + info.offset for info in place.tensors]

    def begin(self, file: BinaryIO) -> None:
        """The header, and the size: a machine that writes behind the end, or sees another file, is found out."""
        file.write(self.place.header)
        file.truncate(self.place.file_size)
        for start, (tensor, kind, _) in zip(self.starts, self.what, strict=True):
            if not isinstance(kind, GgmlType):
                file.seek(start)
                file.write(expert_map(kind, tensor.n_matrices).tobytes())
        _flush(file)

    def parts(self, most_weights: int | None) -> Iterator[tuple[SourceTensor, GgmlType, Sequence[int], range, int]]:
        """(tensor, type, matrices, rows, offset) of everything that is to be quantized, in the order of the file."""
        for start, (tensor, kind, matrices) in zip(self.starts, self.what, strict=True):
            if not isinstance(kind, GgmlType):
                continue
            at = start
            for some, rows in cut(tensor, matrices, most_weights):
                yield tensor, kind, some, rows, at
                at += kind.nbytes(tensor.n_in) * len(rows) * len(some)

    def tensors_to_hash(self, hashes: Mapping[tuple[Path, int], tuple[int, str]]) -> list[TensorToHash]:
        """``hashes`` has (bytes, hash) of every part that was written, by its file and offset."""
        if self.place.hashes_at is None:
            return []
        found = []
        for start, info in zip(self.starts, self.place.tensors, strict=True):
            parts: list[tuple[int, str]] = []
            at = start
            while (self.path, at) in hashes and at < start + info.nbytes:
                parts.append(hashes[self.path, at])
                at += parts[-1][0]
            found.append(TensorToHash(self.path, start, info.name, tuple(parts) or ((info.nbytes, ""),)))
        return found

    def seal(self, file: BinaryIO, found: Mapping[tuple[Path, int], str]) -> None:
        """The header once more, with the hashes of all tensors."""
        if self.place.hashes_at is not None:
            file.seek(0)
            file.write(self.place.sealed([found[self.path, start] for start in self.starts]))
        _flush(file)


def cut(
    tensor: SourceTensor, matrices: Sequence[int], most_weights: int | None
) -> Iterator[tuple[Sequence[int], range]]:
    """Some of the ``matrices``, or some rows of one of them, at a time."""
    n_rows = tensor.n_out if most_weights is None else max(1, most_weights // tensor.n_in)
    if n_rows < tensor.n_out:
        for matrix in matrices:
            for start in range(0, tensor.n_out, n_rows):
                yield [matrix], range(start, min(start + n_rows, tensor.n_out))
        return
    at_once = len(matrices) if most_weights is None else n_rows // tensor.n_out
    for first in range(0, len(matrices), at_once):
        yield matrices[first : first + at_once], range(tensor.n_out)


def _write_parts(
    engine: Engine,
    source: Source,
    filling: Sequence[_Filling],
    imatrix: Imatrix | None,
    opened: Mapping[Path, BinaryIO],
    step: Step,
) -> dict[tuple[Path, int], tuple[int, str]]:
    """Quantize everything. Returns (bytes, hash) of every part by its file and offset."""
    parts = [(one.path, *part) for one in filling for part in one.parts(engine.part_weights)]
    # the largest first: one that starts last would keep the others waiting
    parts.sort(key=lambda part: -part[1].n_in * len(part[4]) * len(part[3]))

    def tasks() -> Iterator[PartToWrite]:
        for path, tensor, kind, matrices, rows, offset in parts:
            weights = quantizer_weights(imatrix, tensor, kind, matrices)
            yield PartToWrite(path, offset, tensor, kind, tuple(matrices), rows, weights)

    hashes = {}
    for number, done in engine.map(write_part, source, tasks(), step.advance):
        path, offset = parts[number][0], parts[number][-1]
        file = opened[path]
        for at, edge in ((offset, done.head), (offset + done.nbytes - len(done.tail), done.tail)):
            file.seek(at)
            file.write(edge)
        hashes[path, offset] = done.nbytes, done.digest
    for file in opened.values():
        _flush(file)
    return hashes


def write_part(source: Source, task: PartToWrite, tools: Tools) -> PartWritten:
    """The work of one task. Raises :class:`OutputError` if the storage refuses, or is not the one of the others."""
    nbytes = task.kind.nbytes(task.tensor.n_in) * len(task.rows) * len(task.matrices)
    end = task.offset + nbytes
    # the pages that no other task has anything in
    first, last = -(-task.offset // PAGE) * PAGE, end // PAGE * PAGE
    if first >= last:
        first = last = end
    head, tail, digest, at = bytearray(), bytearray(), new_hash(), task.offset
    try:
        # not created: where it is missing, this machine sees other storage
        handle = os.open(task.path, os.O_WRONLY | getattr(os, "O_BINARY", 0))
    except FileNotFoundError:
        raise OutputError(
            f"{task.path}: not found; expected storage that every machine of the cluster has under this path"
        ) from None
    except OSError as error:
        raise OutputError(f"{task.path}: cannot be written ({error.strerror})") from None
    try:
        for blocks in quantized(
            source,
            task.tensor,
            task.kind,
            task.matrices,
            task.weights,
            tools.ggml,
            tools.pool,
            in_flight=2 * tools.threads,
            rows=task.rows,
        ):
            data = blocks.reshape(-1).data
            digest.update(data)
            until_first, until_last = (min(max(bound - at, 0), len(data)) for bound in (first, last))
            head += data[:until_first]
            tail += data[until_last:]
            _pwrite(handle, data[until_first:until_last], at + until_first, task.path)
            at += len(data)
            tools.advance(len(data) / task.kind.type_size * task.kind.block_size)
        if at != end:
            raise FormatError(
                f"{task.path}: part of tensor '{task.tensor.name}' was planned with {nbytes} bytes, made with "
                f"{at - task.offset}; this is a bug, please report it"
            )
        _sync(handle, task.path)
    finally:
        os.close(handle)
    return PartWritten(nbytes, digest.hexdigest(), bytes(head), bytes(tail))


def hash_tensor(_source: Source, task: TensorToHash, tools: Tools) -> str:
    """The work of one task: the hash of a tensor's data. Raises :class:`OutputError` if it is not what was written."""
    whole = new_hash()
    try:
        with task.path.open("rb", buffering=0) as file:
            file.seek(task.offset)
            for number, (nbytes, expected) in enumerate(task.parts):
                own, left = new_hash(), nbytes
                while left and (data := file.read(min(left, READ_AT_ONCE))):
                    own.update(data)
                    whole.update(data)
                    left -= len(data)
                    tools.advance(len(data))
                if left or (expected and own.hexdigest() != expected):
                    raise OutputError(
                        f"{task.path}: tensor '{task.name}', part {number} of {len(task.parts)}: the storage does not "
                        "give back what was written; expected one that all machines of the cluster write and read "
                        "alike, run the command again or choose another place"
                    )
    except OSError as error:
        raise OutputError(f"{task.path}: cannot be read back ({error.strerror})") from None
    return whole.hexdigest()


def _pwrite(handle: int, data: memoryview, at: int, path: Path) -> None:
    try:
        while data:
            done = os.pwrite(handle, data, at)
            data, at = data[done:], at + done
    except OSError as error:
        raise _refused(path, error) from None


def _sync(handle: int, path: Path) -> None:
    try:
        os.fsync(handle)
    except OSError as error:
        raise _refused(path, error) from None


def _refused(path: Path, error: OSError) -> OutputError:
    return OutputError(
        f"{path}: cannot be written ({error.strerror}); nothing was left under the final name; free space or choose "
        "another place"
    )


def _flush(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())
