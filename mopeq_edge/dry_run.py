"""What the emit stage would do, without reading or writing a weight."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mopeq_edge.atomic import free_bytes
from mopeq_edge.emit import require_imatrix
from mopeq_edge.errors import OutputError
from mopeq_edge.expert_groups.layout import Types
from mopeq_edge.ggml.library import Quantizer
from mopeq_edge.ggml.types import BY_NAME, GgmlType
from mopeq_edge.gguf_layout import Layout
from mopeq_edge.imatrix import Imatrix
from mopeq_edge.source.model import Source, SourceTensor
from mopeq_edge.units import format_bytes

TRIED, TRIALS = 2**14, 4
"""Weights that are quantized to tell how fast a type is, and how often."""
ROW = 256


@dataclass(frozen=True)
class DryRun:
    """``files``: (path, bytes) of each; ``free``: bytes where they would go.

    ``seconds`` of quantizing alone on ``threads``, by a trial of each type; reading and writing go on beside it.
    """

    files: tuple[tuple[Path, int], ...]
    free: int
    n_tensors: int
    weights: Mapping[str, int]
    """By the type that they are quantized to."""
    seconds: float
    threads: int

    @property
    def file_bytes(self) -> int:
        """Of all files."""
        return sum(size for _, size in self.files)

    def as_dict(self) -> dict[str, Any]:
        """Plain values with units in their names."""
        return {
            "files": [{"path": str(path), "bytes": size} for path, size in self.files],
            "file_bytes": self.file_bytes,
            "free_bytes": self.free,
            "tensors": self.n_tensors,
            "weights_by_type": dict(self.weights),
            "quantizing_seconds": self.seconds,
            "threads": self.threads,
        }


def dry_run(
    source: Source,
    types: Types,
    imatrix: Imatrix | None,
    places: Sequence[Layout],
    paths: Sequence[Path],
    ggml: Quantizer,
    threads: int,
) -> DryRun:
    """Check what can be checked before a weight is read, and tell sizes and time.

    Raises what emit raises for an imatrix that is missing or of another model, and :class:`OutputError` where there is
    not enough room.
    """
    require_imatrix(source, types, imatrix)
    needed, free = sum(place.file_size for place in places), free_bytes(paths[0].parent)
    if needed > free:
        raise OutputError(
            f"{paths[0]}: needs {needed} bytes ({format_bytes(needed)}), {free} ({format_bytes(free)}) are free there; "
            "free space or choose another place"
        )
    weights: Counter[str] = Counter()
    for tensor in source.tensors:
        for kind, n_weights in _parts(tensor, types):
            if kind is not tensor.type:
                weights[kind.name] += n_weights
    flat = None if imatrix is None else np.ones(ROW, dtype=np.float32)
    seconds = sum(n * seconds_a_weight(BY_NAME[name], ggml, flat) for name, n in weights.items()) / threads
    return DryRun(
        tuple((path, place.file_size) for path, place in zip(paths, places, strict=True)),
        free,
        sum(len(place.tensors) for place in places),
        dict(weights.most_common()),
        seconds,
        threads,
    )


def _parts(tensor: SourceTensor, types: Types) -> list[tuple[GgmlType, int]]:
    kind = types[tensor.name]
    if isinstance(kind, GgmlType):
        return [(kind, tensor.n_weights)]
    return [(group.type, len(group.experts) * tensor.n_in * tensor.n_out) for group in kind]


def seconds_a_weight(kind: GgmlType, ggml: Quantizer, imatrix: npt.NDArray[np.float32] | None) -> float:
    """Of one thread: CPU time, since what else runs now need not run then, and the least of several short trials."""
    rows = np.random.default_rng(0).standard_normal((TRIED // ROW, ROW), dtype=np.float32)
    # makes the tables that some types need
    ggml.quantize(kind, rows[:1], imatrix)
    found = []
    for _ in range(TRIALS):
        start = time.thread_time()
        ggml.quantize(kind, rows, imatrix)
        found.append(time.thread_time() - start)
    return min(found) / TRIED
