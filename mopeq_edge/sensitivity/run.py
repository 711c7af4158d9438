"""The sensitivity stage: source and statistics in, one table of damages out."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from mopeq_edge.ggml.library import Ggml
from mopeq_edge.ggml.types import GgmlType
from mopeq_edge.plan.candidates import candidates
from mopeq_edge.progress import Progress
from mopeq_edge.sensitivity.measure import ROWS_AT_ONCE, measure_tensor, total_matrices
from mopeq_edge.sensitivity.pricing import Statistics, pricings
from mopeq_edge.sensitivity.scores import DERIVED, Doubles, mopeq_score
from mopeq_edge.sensitivity.table import SensitivityTable
from mopeq_edge.source.model import Source, SourceTensor, magnitude
from mopeq_edge.source.padded import expert_padding
from mopeq_edge.source.roles import Role

SINGLE_MATRIX_ROWS = 8
"""Times as many rows are sampled of a tensor of one matrix."""


def measure_sensitivity(
    source: Source,
    types: Sequence[GgmlType],
    statistics: Statistics,
    quantize_with: str,
    ggml: Ggml,
    *,
    sample_rows: int | None,
    threads: int,
    made_from: str,
    progress: Progress,
) -> SensitivityTable:
    """Damage of every quantizable tensor and expert for all ``types`` that fit it, by every available score.

    ``quantize_with`` chooses the imatrix that weighs the quantizer: ``activation``, ``gradient`` or ``none``.
    Floors do not apply here, so one table serves every choice of floors. ``sample_rows`` rows are measured of each
    matrix of a stack, :data:`SINGLE_MATRIX_ROWS` times as many of other tensors; None measures all. A type that does
    not hold the largest weight of a tensor, of all its rows, is left out for it. Where experts can be padded, the types
    that only padded rows take are measured as well.
    """
    padding = expert_padding(source)
    imatrix = statistics.imatrix(quantize_with)
    tensors = [t for t in source.tensors if t.quantizable]
    with ThreadPoolExecutor(threads) as pool:
        norms, largest = _norms(source, tensors, pool, progress)
        mopeq = _mopeq_by_layer(tensors, norms)
        errors = {}
        with progress.step("sensitivity", total_matrices(tensors), "matrices") as step:
            for tensor in tensors:
                has_imatrix = imatrix is not None and tensor.name in imatrix.entries
                padded = tensor if padding is None else padding.tensor(tensor)
                chosen = candidates(
                    padded, types, has_imatrix=has_imatrix, floors={}, largest=float(largest[tensor.name].max())
                )
                score = mopeq[tensor.layer] if tensor.role is Role.EXPERT and tensor.layer is not None else None
                own = _own_mopeq(tensor, norms[tensor.name]) if score is None else list(score)
                errors[tensor.name] = measure_tensor(
                    source,
                    tensor,
                    chosen,
                    pricings(tensor, statistics, own),
                    imatrix,
                    ggml,
                    pool,
                    padded_in=padded.n_in,
                    sample_rows=_rows_to_measure(tensor, sample_rows),
                    on_matrix=step.advance,
                )
    unrouted = imatrix.unrouted if imatrix is not None else ()
    scores = tuple(score for score in statistics.available() if score not in DERIVED)
    return SensitivityTable(errors, mopeq, scores, quantize_with, unrouted, sample_rows, made_from)


def _rows_to_measure(tensor: SourceTensor, sample_rows: int | None) -> int | None:
    """A stack averages over its experts or heads; a tensor of one matrix needs more rows for the same error."""
    if sample_rows is None or tensor.n_matrices > 1:
        return sample_rows
    return sample_rows * SINGLE_MATRIX_ROWS


def _norms(
    source: Source, tensors: Sequence[SourceTensor], pool: ThreadPoolExecutor, progress: Progress
) -> tuple[dict[str, Doubles], dict[str, Doubles]]:
    """|W|_F and the largest magnitude [n_matrices] of every tensor; also the first full look at the weights."""

    def norm(tensor: SourceTensor, matrix: int) -> tuple[float, float]:
        # a whole vocabulary in float64 would be larger than a block
        at_once, total, largest = max(1, ROWS_AT_ONCE // tensor.n_in), 0.0, 0.0
        for start in range(0, tensor.n_out, at_once):
            rows = source.read(tensor, matrix, slice(start, start + at_once))
            total += float(np.square(rows, dtype=np.float64).sum())
            largest = max(largest, magnitude(rows))
        return math.sqrt(total), largest

    norms: dict[str, Doubles] = {}
    largest: dict[str, Doubles] = {}
    with progress.step("norms", total_matrices(tensors), "matrices") as step:
        for tensor in tensors:
            futures = [pool.submit(norm, tensor, m) for m in range(tensor.n_matrices)]
            norms[tensor.name], largest[tensor.name] = np.array([future.result() for future in futures]).T
            step.advance(tensor.n_matrices)
    return norms, largest


def _mopeq_by_layer(tensors: Sequence[SourceTensor], norms: Mapping[str, Doubles]) -> dict[int, Doubles]:
    """S(e) of every expert of every layer."""
    layers: dict[int, list[SourceTensor]] = {}
    for tensor in tensors:
        if tensor.role is Role.EXPERT and tensor.layer is not None:
            layers.setdefault(tensor.layer, []).append(tensor)
    scores = {}
    for layer, stacks in layers.items():
        sizes = {t.name: t.n_in * t.n_out for t in stacks}
        scores[layer] = np.array(
            [mopeq_score({t.name: float(norms[t.name][e]) for t in stacks}, sizes) for e in range(stacks[0].n_matrices)]
        )
    return scores


def _own_mopeq(tensor: SourceTensor, norms: Doubles) -> list[float]:
    """S of every matrix that is no expert's, for itself."""
    sizes = {tensor.name: tensor.n_in * tensor.n_out}
    return [mopeq_score({tensor.name: float(norm)}, sizes) for norm in norms]
