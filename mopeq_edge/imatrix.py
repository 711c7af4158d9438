"""llama.cpp's importance matrix in GGUF: per tensor and expert, sums of squared activations and counts.

``<tensor>.in_sum2`` [n_in, n_matrices] and ``<tensor>.counts`` [1, n_matrices], both F32, as
``llama-imatrix`` writes and ``llama-quantize`` reads them. A gradient-weighted imatrix has the same form:
its sums are sum_t |g_t|^2 x_tj^2 divided by a constant, kept in ``mopeq.imatrix.scale``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mopeq_edge.atomic import atomic_write
from mopeq_edge.errors import FormatError, shown
from mopeq_edge.ggml.types import F32
from mopeq_edge.gguf_file import KV, GGUFHeader, TensorInfo, ValueType, read_header
from mopeq_edge.gguf_layout import layout, string, uint32
from mopeq_edge.json_file import Check, is_count, is_number, is_texts

Floats = npt.NDArray[np.float32]

ACTIVATION = "activation"
GRADIENT = "gradient"

EMBEDDING = "token_embd.weight"
LOOKUP = "token_embd.lookup"
"""Entry of a gradient-weighted imatrix for an embedding that is the output matrix too (tied): what its look-ups are
worth. The entry under the tensor's own name is then that of the output matrix, as in llama-imatrix."""

MAX_COUNT = 2**32 - 1
"""Of chunks, and of tokens in one: what their keys hold."""

PRIOR_COUNT = 1.0
"""Tokens that the prior of a never-routed expert counts for."""

_SUMS, _COUNTS = ".in_sum2", ".counts"
_LARGEST = np.finfo(np.float32).max
_SCALE_KEY, _KIND_KEY, _UNROUTED_KEY = "mopeq.imatrix.scale", "mopeq.imatrix.kind", "mopeq.imatrix.unrouted"


@dataclass(frozen=True)
class Entry:
    """Statistics of one tensor: ``sums`` [n_matrices, n_in], ``counts`` [n_matrices] tokens."""

    sums: Floats
    counts: Floats

    def mean(self) -> Floats:
        """What the quantizer weighs with: sums / counts [n_matrices, n_in]."""
        return (self.sums / self.counts[:, None]).astype(np.float32)


@dataclass(frozen=True)
class Imatrix:
    """All entries by tensor name, with the metadata that llama-quantize asks for."""

    entries: Mapping[str, Entry]
    datasets: tuple[str, ...]
    chunk_count: int
    chunk_size: int
    kind: str = ACTIVATION
    scale: float = 1.0
    """What the sums of a gradient-weighted imatrix were divided by."""
    unrouted: tuple[str, ...] = field(default=())
    """Experts that no token reached, as ``tensor[expert]``; their entry is the prior."""

    @property
    def n_tokens(self) -> int:
        return self.chunk_count * self.chunk_size


def with_prior(entries: Mapping[str, Entry]) -> tuple[dict[str, Entry], tuple[str, ...]]:
    """Give never-routed experts the mean statistics of their stack at :data:`PRIOR_COUNT` tokens.

    Without it they would look free (zero importance) or break the quantizer (0/0). Columns that are zero
    in every token get the smallest positive mean of their row for the same reason. Returns the entries
    and the names ``tensor[expert]`` of the experts concerned.
    """
    filled: dict[str, Entry] = {}
    unrouted: list[str] = []
    for name, entry in entries.items():
        sums, counts = entry.sums.astype(np.float64), entry.counts.astype(np.float64)
        empty = counts <= 0
        if not empty.all():
            sums[empty] = sums[~empty].sum(axis=0) / counts[~empty].sum() * PRIOR_COUNT
        else:
            sums[:] = PRIOR_COUNT
        counts[empty] = PRIOR_COUNT
        positive = sums > 0
        floors = np.where(positive, sums, np.inf).min(axis=1, keepdims=True)
        sums = np.where(positive, sums, np.where(np.isfinite(floors), floors, 1.0))
        filled[name] = Entry(sums.astype(np.float32), counts.astype(np.float32))
        unrouted.extend(f"{name}[{expert}]" for expert in np.flatnonzero(empty))
    return filled, tuple(unrouted)


def split_stacks(imatrix: Imatrix, n_matrices: Mapping[str, int]) -> Imatrix:
    """``imatrix`` with an entry of :class:`Entry`'s form for every stack; ``n_matrices`` by tensor name.

    Where every token meets every matrix of a stack (the heads of latent attention), llama-imatrix counts the tokens
    once and has the sums of all matrices in one row.
    """
    entries = dict(imatrix.entries)
    for name, entry in imatrix.entries.items():
        n = n_matrices.get(name, 1)
        if n > 1 and len(entry.sums) == 1 and entry.sums.size % n == 0:
            entries[name] = Entry(entry.sums.reshape(n, -1), np.repeat(entry.counts, n))
    return replace(imatrix, entries=entries)


def write_imatrix(imatrix: Imatrix, path: Path) -> None:
    """Write ``imatrix`` so that llama-quantize accepts it; the same input gives the same bytes."""
    kvs: dict[str, KV] = {
        "general.type": string("imatrix"),
        "imatrix.datasets": KV(ValueType.ARRAY, list(imatrix.datasets), ValueType.STRING),
        "imatrix.chunk_count": uint32(imatrix.chunk_count),
        "imatrix.chunk_size": uint32(imatrix.chunk_size),
        _KIND_KEY: string(imatrix.kind),
        _SCALE_KEY: KV(ValueType.FLOAT64, imatrix.scale),
        _UNROUTED_KEY: KV(ValueType.ARRAY, list(imatrix.unrouted), ValueType.STRING),
    }
    arrays: list[tuple[str, tuple[int, ...], Floats]] = []
    for name in sorted(imatrix.entries):
        entry = imatrix.entries[name]
        n_matrices, n_in = entry.sums.shape
        arrays.append((name + _SUMS, (n_in, n_matrices), entry.sums))
        arrays.append((name + _COUNTS, (1, n_matrices), entry.counts))
    plan = layout(kvs, [(name, shape, F32) for name, shape, _ in arrays])
    with atomic_write(path) as file:
        file.write(plan.header)
        for info, (_, _, values) in zip(plan.tensors, arrays, strict=True):
            file.write(np.ascontiguousarray(values, dtype="<f4").tobytes())
            file.write(b"\0" * (-info.nbytes % plan.alignment))


def read_imatrix(path: Path) -> Imatrix:
    """Read ours or llama-imatrix's. Never-routed experts get the prior of :func:`with_prior`.

    Raises :class:`FormatError` for another kind of file, missing metadata, or values that are negative or
    not finite.
    """
    header = read_header(path)
    if header.get("general.type") != "imatrix":
        raise FormatError(f"{path}: not an imatrix (general.type is {header.get('general.type')!r}); see llama-imatrix")
    missing = [k for k in ("imatrix.datasets", "imatrix.chunk_count", "imatrix.chunk_size") if k not in header.kvs]
    if missing:
        raise FormatError(f"{path}: imatrix lacks {', '.join(missing)}; make it again with llama-imatrix or calibrate")
    said = {**_UNSAID, **{key: kv.value for key, kv in header.kvs.items() if key in _CHECKS}}
    for key, (check, expected) in _CHECKS.items():
        if not check(said[key]):
            raise FormatError(f"{path}: {key} is {shown(said[key])}, expected {expected}; make it again")
    raw = _read_arrays(header)
    entries: dict[str, Entry] = {}
    for name in sorted({key.removesuffix(_SUMS).removesuffix(_COUNTS) for key in raw}):
        if name + _SUMS not in raw or name + _COUNTS not in raw:
            raise FormatError(f"{path}: imatrix entry '{name}' needs both {_SUMS} and {_COUNTS}; make it again")
        sums, counts = raw[name + _SUMS], raw[name + _COUNTS]
        if counts.shape[1] != 1 or len(sums) != len(counts):
            shapes = f"sums of shape {list(sums.shape)} and counts of shape {list(counts.shape)}"
            raise FormatError(
                f"{path}: imatrix entry '{name}' has {shapes}, expected [n, n_in] and [n, 1]; make it again"
            )
        entries[name] = Entry(sums, counts.reshape(-1))
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        filled, unrouted = with_prior(entries)
        for name, entry in filled.items():
            if not np.isfinite(entry.sums).all() or not np.isfinite(entry.mean()).all():
                raise FormatError(
                    f"{path}: imatrix entry '{name}' has a mean (sums over counts) beyond F32, expected the squares of "
                    "activations; make it again"
                )
    return Imatrix(
        entries=filled,
        datasets=tuple(said["imatrix.datasets"]),
        chunk_count=said["imatrix.chunk_count"],
        chunk_size=said["imatrix.chunk_size"],
        kind=said[_KIND_KEY],
        scale=float(said[_SCALE_KEY]),
        unrouted=unrouted or tuple(said[_UNROUTED_KEY]),
    )


_CHECKS: Mapping[str, tuple[Check, str]] = {
    "imatrix.datasets": (is_texts, "a list of texts"),
    "imatrix.chunk_count": (lambda value: is_count(value, MAX_COUNT), "a number of chunks"),
    "imatrix.chunk_size": (lambda value: is_count(value, MAX_COUNT), "a number of tokens"),
    _KIND_KEY: (lambda value: value in (ACTIVATION, GRADIENT), f"{ACTIVATION} or {GRADIENT}"),
    _SCALE_KEY: (lambda value: is_number(value) and 0 < value < math.inf, "a positive number"),
    _UNROUTED_KEY: (is_texts, "a list of texts"),
}
"""What a key must hold, and that in words."""

_UNSAID: Mapping[str, Any] = {_KIND_KEY: ACTIVATION, _SCALE_KEY: 1.0, _UNROUTED_KEY: []}
"""Keys that llama-imatrix does not write, and what is then so."""


def _read_arrays(header: GGUFHeader) -> dict[str, Floats]:
    """Matrices [n_matrices, n] of float32 by name."""
    arrays: dict[str, Floats] = {}
    with header.path.open("rb") as file:
        for info in header.tensors:
            if info.type is not F32 or not info.name.endswith((_SUMS, _COUNTS)):
                raise FormatError(f"{header.path}: tensor '{info.name}' ({info.type.name}) has no place in an imatrix")
            n_in, n_matrices = _matrix_shape(header, info)
            file.seek(header.data_start + info.offset)
            raw = file.read(info.nbytes)
            if len(raw) != info.nbytes:
                raise FormatError(f"{header.path}: truncated imatrix: the file shrank while it was read")
            values = np.frombuffer(raw, "<f4").astype(np.float32).reshape(n_matrices, n_in)
            # NaN is in no order, infinity above the largest number
            if not (values.min() >= 0 and values.max() <= _LARGEST):
                raise FormatError(f"{header.path}: '{info.name}' holds negative or non-finite values; make it again")
            arrays[info.name] = values
    return arrays


def _matrix_shape(header: GGUFHeader, info: TensorInfo) -> tuple[int, int]:
    # ggml drops trailing axes of 1
    n_in, n_matrices, *more = (*info.shape, 1)
    if math.prod(more) != 1:
        raise FormatError(
            f"{header.path}: '{info.name}' has shape {list(info.shape)}, expected a matrix; make it again"
        )
    return n_in, n_matrices
