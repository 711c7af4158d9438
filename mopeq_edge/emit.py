"""The emit stage: write the GGUF of a plan, one expert or one run of rows at a time, then read it back."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np

from mopeq_edge.atomic import atomic_path
from mopeq_edge.errors import FormatError, PlanError
from mopeq_edge.ggml.library import Bytes, Floats, Ggml
from mopeq_edge.ggml.types import NEEDS_IMATRIX, GgmlType
from mopeq_edge.gguf_file import KV, read_header
from mopeq_edge.gguf_layout import Layout, TensorSpec, layout
from mopeq_edge.imatrix import Imatrix
from mopeq_edge.progress import Progress
from mopeq_edge.source.model import Source, SourceTensor

WEIGHTS_AT_ONCE = 2**20
"""Weights that one piece of work holds as float32, at most (one row at least)."""


def emit(
    source: Source,
    types: Mapping[str, GgmlType],
    kvs: Mapping[str, KV],
    imatrix: Imatrix | None,
    ggml: Ggml,
    path: Path,
    *,
    threads: int,
    progress: Progress,
) -> int:
    """Write ``path`` with every tensor of ``source`` in its type of ``types``. Returns the file's bytes.

    The file appears under its name only when it is whole and has been read back. Memory does not grow with
    the model: a few pieces of work for each of ``threads`` are in flight. The bytes do not depend on threads.
    """
    blind = without_imatrix(source, types, imatrix)
    if blind:
        raise PlanError(
            f"tensor '{blind[0]}': type {types[blind[0]].name} needs an imatrix entry and the imatrix has none; "
            "plan again with this imatrix, or emit with the one that the plan was made with"
        )
    specs: list[TensorSpec] = [(t.name, t.shape, types[t.name]) for t in source.tensors]
    plan = layout(kvs, specs)
    with atomic_path(path) as temporary:
        with (
            temporary.open("xb") as file,
            ThreadPoolExecutor(threads) as pool,
            progress.step("emit", sum(t.n_weights for t in source.tensors)) as step,
        ):
            file.write(plan.header)
            for tensor, info in zip(source.tensors, plan.tensors, strict=True):
                for blocks in _quantized(source, tensor, info.type, imatrix, ggml, pool, in_flight=2 * threads):
                    file.write(blocks.data)
                    step.advance(blocks.nbytes / info.type.type_size * info.type.block_size)
                file.write(b"\0" * (-info.nbytes % plan.alignment))
            file.flush()
            os.fsync(file.fileno())
        check_written(temporary, plan, specs)
    return plan.file_size


def without_imatrix(source: Source, types: Mapping[str, GgmlType], imatrix: Imatrix | None) -> list[str]:
    """Tensors whose type of ``types`` libggml cannot quantize to without an imatrix, which they lack."""
    known = imatrix.entries if imatrix is not None else {}
    return [
        t.name
        for t in source.tensors
        if types[t.name].name in NEEDS_IMATRIX and types[t.name] is not t.type and t.name not in known
    ]


def check_written(path: Path, plan: Layout, specs: Sequence[TensorSpec]) -> None:
    """Read the header of ``path`` back and compare names, shapes, types and size with what was planned."""
    header = read_header(path)
    found = [(t.name, t.shape, t.type) for t in header.tensors]
    for want, got in zip(specs, found, strict=False):
        if want != got:
            raise FormatError(
                f"{path}: tensor '{want[0]}' was planned as {want[2].name} {list(want[1])}, "
                f"written as '{got[0]}' {got[2].name} {list(got[1])}; this is a bug, please report it"
            )
    if len(found) != len(specs) or header.file_size != plan.file_size:
        raise FormatError(
            f"{path}: planned {len(specs)} tensors and {plan.file_size} bytes, written {len(found)} tensors and "
            f"{header.file_size} bytes; this is a bug, please report it"
        )


def _quantized(
    source: Source,
    tensor: SourceTensor,
    kind: GgmlType,
    imatrix: Imatrix | None,
    ggml: Ggml,
    pool: ThreadPoolExecutor,
    in_flight: int,
) -> Iterator[Bytes]:
    """The bytes of ``tensor`` as ``kind``, in order, a piece at a time."""
    entry = imatrix.entries.get(tensor.name) if imatrix is not None else None
    weights = entry.mean() if entry is not None and kind.is_quantized else None
    if weights is not None and weights.shape != (tensor.n_matrices, tensor.n_in):
        raise FormatError(
            f"imatrix entry '{tensor.name}' has shape {list(weights.shape)}, expected "
            f"{[tensor.n_matrices, tensor.n_in]}; it was made for another model"
        )

    def one_piece(matrix: int, rows: slice) -> Bytes:
        if kind is tensor.type:
            return np.ascontiguousarray(source.read_stored(tensor, matrix, rows))
        own: Floats | None = None if weights is None else weights[matrix]
        return ggml.quantize(kind, source.read(tensor, matrix, rows).reshape(-1, tensor.n_in), own)

    waiting: deque[Future[Bytes]] = deque()
    at_once = max(1, WEIGHTS_AT_ONCE // tensor.n_in)
    try:
        for matrix in range(tensor.n_matrices):
            for start in range(0, tensor.n_out, at_once):
                rows = slice(start, min(start + at_once, tensor.n_out))
                waiting.append(pool.submit(one_piece, matrix, rows))
                if len(waiting) >= in_flight:
                    yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()
