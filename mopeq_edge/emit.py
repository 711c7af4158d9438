"""The emit stage: write the GGUF of a plan, one expert or one run of rows at a time, then read it back."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from itertools import islice
from pathlib import Path
from typing import BinaryIO

import numpy as np

from mopeq_edge.atomic import atomic_path
from mopeq_edge.errors import FormatError, PlanError
from mopeq_edge.expert_groups.layout import Grouping, Types, expert_map, file_kvs, file_layout, file_specs
from mopeq_edge.expert_groups.read import read_groups
from mopeq_edge.file_hashes import new_hash
from mopeq_edge.ggml.library import Bytes, Floats, Quantizer
from mopeq_edge.ggml.types import F16_MAX, NEEDS_IMATRIX, WIDE, GgmlType
from mopeq_edge.gguf_file import KV, read_header
from mopeq_edge.gguf_layout import Layout
from mopeq_edge.imatrix import Imatrix
from mopeq_edge.progress import Progress, Step
from mopeq_edge.source.model import Source, SourceTensor, magnitude
from mopeq_edge.split import part_paths, split_layouts

WEIGHTS_AT_ONCE = 2**20
"""Weights that one piece of work holds as float32, at most (one row at least)."""

Written = tuple[SourceTensor, GgmlType | Grouping, Sequence[int]]
"""One tensor of the file: matrices of a source tensor in one type, or (without matrices) the map of its groups."""


def emit(
    source: Source,
    types: Types,
    kvs: Mapping[str, KV],
    imatrix: Imatrix | None,
    ggml: Quantizer,
    path: Path,
    *,
    threads: int,
    progress: Progress,
    split_bytes: int | None = None,
) -> int:
    """Write ``path`` with every tensor of ``source`` in its type, or groups, of ``types``. Returns the bytes written.

    With ``split_bytes`` the result is split into files of at most so many bytes (:func:`part_paths` of ``path``); the
    groups of a stack and their map may come to lie in several. Files appear under their names only when all are whole
    and have been read back. Memory does not grow with the model: a few pieces of work for each of ``threads`` are in
    flight. The bytes do not depend on threads.
    An expert has the same bits in a group as in a stack of the group's type.
    """
    with (
        whole_files(source, types, kvs, imatrix, path, split_bytes) as files,
        ThreadPoolExecutor(threads) as pool,
        ThreadPoolExecutor(1) as hashing,
        progress.step("emit", sum(t.n_weights for t in source.tensors), "weights") as step,
    ):
        tensors = written(source, types)
        for temporary, place in files:
            with temporary.open("wb") as file:
                file.write(place.header)
                hasher = hashing if place.hashes_at is not None else None
                hashes = [
                    _write(file, place.alignment, source, own, imatrix, ggml, pool, hasher, step, threads)
                    for own in islice(tensors, len(place.tensors))
                ]
                if place.hashes_at is not None:
                    file.seek(0)
                    file.write(place.sealed(hashes))
    return sum(place.file_size for _, place in files)


@contextmanager
def whole_files(
    source: Source,
    types: Types,
    kvs: Mapping[str, KV],
    imatrix: Imatrix | None,
    path: Path,
    split_bytes: int | None,
) -> Iterator[list[tuple[Path, Layout]]]:
    """The files of :func:`emit` under temporary names, each with its layout, to be filled in the block.

    They get their names when all were read back and are as planned.
    """
    blind = without_imatrix(source, types, imatrix)
    if blind:
        needy = next(kind for kind in kinds_of(types[blind[0]]) if kind.name in NEEDS_IMATRIX)
        raise PlanError(
            f"tensor '{blind[0]}': type {needy.name} needs an imatrix entry and the imatrix has none; "
            "plan again with this imatrix, or emit with the one that the plan was made with"
        )
    places = planned_files(source, types, kvs, split_bytes)
    paths = [path] if split_bytes is None else part_paths(path, len(places))
    with _all_or_none(paths) as temporaries:
        yield list(zip(temporaries, places, strict=True))
        for temporary, place in zip(temporaries, places, strict=True):
            check_written(temporary, place)
        check_groups(temporaries, types)
        if len(paths) > 1:
            # a run that is killed between two renames must not leave a set of old and new files that loads
            paths[0].unlink(missing_ok=True)


def planned_files(
    source: Source, types: Types, kvs: Mapping[str, KV], split_bytes: int | None = None
) -> tuple[Layout, ...]:
    """The layout of every file that :func:`emit` writes. Raises :class:`PlanError` for what cannot be split so."""
    if split_bytes is None:
        return (file_layout(kvs, source.tensors, types),)
    return split_layouts(file_kvs(kvs, types), file_specs(source.tensors, types), split_bytes)


@contextmanager
def _all_or_none(paths: Sequence[Path]) -> Iterator[list[Path]]:
    """Temporary names that become ``paths`` on success, the first last; on error no new file keeps its name."""
    new = [path for path in paths if not path.exists()]
    try:
        with ExitStack() as stack:
            yield [stack.enter_context(atomic_path(path)) for path in paths]
    except BaseException:
        for path in new:
            path.unlink(missing_ok=True)
        raise


def written(source: Source, types: Types) -> Iterator[Written]:
    """What :func:`file_specs` lists, in the same order."""
    for tensor in source.tensors:
        kind = types[tensor.name]
        if isinstance(kind, GgmlType):
            yield tensor, kind, range(tensor.n_matrices)
            continue
        for group in kind:
            yield tensor, group.type, group.experts
        yield tensor, kind, ()


def _write(
    file: BinaryIO,
    alignment: int,
    source: Source,
    what: Written,
    imatrix: Imatrix | None,
    ggml: Quantizer,
    pool: ThreadPoolExecutor,
    hashing: ThreadPoolExecutor | None,
    step: Step,
    threads: int,
) -> str:
    """Append one tensor with its padding. Returns the hash of its data, made while the data is written.

    Without ``hashing`` there is none: the file has no room for it.
    """
    tensor, kind, matrices = what
    data = new_hash()
    hashed: Future[None] | None = None
    if isinstance(kind, GgmlType):
        weights = quantizer_weights(imatrix, tensor, kind, matrices)
        for blocks in quantized(source, tensor, kind, matrices, weights, ggml, pool, in_flight=2 * threads):
            if hashed is not None:
                # in order, and no more than one piece behind
                hashed.result()
            if hashing is not None:
                hashed = hashing.submit(data.update, blocks.data)
            file.write(blocks.data)
            step.advance(blocks.nbytes / kind.type_size * kind.block_size)
        if hashed is not None:
            hashed.result()
    else:
        rows = expert_map(kind, tensor.n_matrices).tobytes()
        data.update(rows)
        file.write(rows)
    file.write(b"\0" * (-file.tell() % alignment))
    return data.hexdigest()


def kinds_of(kind: GgmlType | Grouping) -> tuple[GgmlType, ...]:
    """The types that a tensor is written in."""
    return (kind,) if isinstance(kind, GgmlType) else tuple(group.type for group in kind)


def without_imatrix(source: Source, types: Types, imatrix: Imatrix | None) -> list[str]:
    """Tensors with a type in ``types`` that libggml cannot quantize to without an imatrix, which they lack."""
    known = imatrix.entries if imatrix is not None else {}
    return [
        t.name
        for t in source.tensors
        if t.name not in known
        and any(kind.name in NEEDS_IMATRIX and kind is not t.type for kind in kinds_of(types[t.name]))
    ]


def check_written(path: Path, plan: Layout) -> None:
    """Read the header of ``path`` back and compare names, shapes, types and size with what was planned."""
    header = read_header(path)
    for want, got in zip(plan.tensors, header.tensors, strict=False):
        if (want.name, want.shape, want.type) != (got.name, got.shape, got.type):
            raise FormatError(
                f"{path}: tensor '{want.name}' was planned as {want.type.name} {list(want.shape)}, "
                f"written as '{got.name}' {got.type.name} {list(got.shape)}; this is a bug, please report it"
            )
    n_planned, n_found = len(plan.tensors), len(header.tensors)
    if n_found != n_planned or header.file_size != plan.file_size:
        raise FormatError(
            f"{path}: planned {n_planned} tensors and {plan.file_size} bytes, written {n_found} tensors and "
            f"{header.file_size} bytes; this is a bug, please report it"
        )


def check_groups(paths: Sequence[Path], types: Types) -> None:
    """Read the maps in the files ``paths`` back and compare every expert's group with what was planned."""
    planned = {name: kind for name, kind in types.items() if not isinstance(kind, GgmlType)}
    found = {stack.name: stack.groups for stack in read_groups(*(read_header(path) for path in paths))}
    for name in sorted(planned.keys() | found.keys()):
        if planned.get(name) != found.get(name):
            raise FormatError(f"{paths[0]}: the groups of '{name}' are not as planned; this is a bug, please report it")


def quantizer_weights(
    imatrix: Imatrix | None, tensor: SourceTensor, kind: GgmlType, matrices: Sequence[int]
) -> Floats | None:
    """What the quantizer weighs the columns of ``matrices`` with [len(matrices), n_in], if it does."""
    entry = imatrix.entries.get(tensor.name) if imatrix is not None else None
    if entry is None or not kind.is_quantized:
        return None
    weights = entry.mean()
    if weights.shape != (tensor.n_matrices, tensor.n_in):
        raise FormatError(
            f"imatrix entry '{tensor.name}' has shape {list(weights.shape)}, expected "
            f"{[tensor.n_matrices, tensor.n_in]}; it was made for another model"
        )
    return weights[list(matrices)]


def quantized(
    source: Source,
    tensor: SourceTensor,
    kind: GgmlType,
    matrices: Sequence[int],
    weights: Floats | None,
    ggml: Quantizer,
    pool: ThreadPoolExecutor,
    in_flight: int,
    rows: range | None = None,
) -> Iterator[Bytes]:
    """The bytes of ``matrices`` of ``tensor`` (of their ``rows``) as ``kind``, in order, a piece at a time."""
    rows = range(tensor.n_out) if rows is None else rows

    def one_piece(matrix: int, rows: slice, own: Floats | None) -> Bytes:
        if kind is tensor.type:
            return np.ascontiguousarray(source.read_stored(tensor, matrix, rows))
        values = source.read(tensor, matrix, rows).reshape(-1, tensor.n_in)
        largest = magnitude(values)
        if not kind.holds(largest):
            raise PlanError(
                f"tensor '{tensor.name}', matrix {matrix}: type {kind.name} is for weights up to {F16_MAX:g}, found "
                f"one of magnitude {largest:g}; make the plan again from a sensitivity table of these weights, which "
                f"keeps such a tensor in {tensor.type.name}, or choose {' or '.join(sorted(WIDE))}"
            )
        return ggml.quantize(kind, values, own)

    waiting: deque[Future[Bytes]] = deque()
    at_once = max(1, WEIGHTS_AT_ONCE // tensor.n_in)
    try:
        for position, matrix in enumerate(matrices):
            own = None if weights is None else weights[position]
            for start in range(rows.start, rows.stop, at_once):
                waiting.append(pool.submit(one_piece, matrix, slice(start, min(start + at_once, rows.stop)), own))
                if len(waiting) >= in_flight:
                    yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()
