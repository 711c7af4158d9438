"""The sensitivity stage: source and statistics in, one table of damages out."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from mopeq_edge.ggml.library import Ggml
from mopeq_edge.ggml.types import GgmlType
from mopeq_edge.heap import keep_freed_memory
from mopeq_edge.plan.candidates import candidates
from mopeq_edge.progress import Progress, Step
from mopeq_edge.sensitivity.measure import Measured, Measurement, total_matrices
from mopeq_edge.sensitivity.pricing import Statistics, pricings
from mopeq_edge.sensitivity.sample import SampleRows
from mopeq_edge.sensitivity.scores import DERIVED, Doubles, Pricing, mopeq_score
from mopeq_edge.sensitivity.table import SensitivityTable
from mopeq_edge.source.model import Source, SourceTensor
from mopeq_edge.source.padded import expert_padding
from mopeq_edge.source.roles import Role

AHEAD = 8
"""Tensors that are begun before the first of them is waited for: threads find work while one matrix is at its end."""


def measure_sensitivity(
    source: Source,
    types: Sequence[GgmlType],
    statistics: Statistics,
    quantize_with: str,
    ggml: Ggml,
    *,
    sample_rows: SampleRows,
    threads: int,
    made_from: str,
    progress: Progress,
) -> SensitivityTable:
    """Damage of every quantizable tensor and expert for all ``types`` that fit it, by every available score.

    ``quantize_with`` chooses the imatrix that weighs the quantizer: ``activation``, ``gradient`` or ``none``.
    Floors do not apply here, so one table serves every choice of floors. ``sample_rows`` says how many rows are
    measured of each matrix (:mod:`~mopeq_edge.sensitivity.sample`). A type that does not hold the largest weight of a
    tensor, of all its rows, is left out for it. Where experts can be padded, the types that only padded rows take are
    measured as well. Every weight is read once.
    """
    keep_freed_memory()
    padding = expert_padding(source)
    imatrix = statistics.imatrix(quantize_with)
    tensors = [t for t in source.tensors if t.quantizable]
    measured: dict[str, Measured] = {}
    waiting: deque[tuple[str, Measurement]] = deque()
    with (
        ThreadPoolExecutor(threads) as pool,
        progress.step("sensitivity", total_matrices(tensors), "matrices") as step,
    ):
        try:
            for tensor in tensors:
                has_imatrix = imatrix is not None and tensor.name in imatrix.entries
                padded = tensor if padding is None else padding.tensor(tensor)
                measurement = Measurement(
                    source,
                    tensor,
                    candidates(padded, types, has_imatrix=has_imatrix, floors={}),
                    _prices(tensor, statistics, None),
                    imatrix,
                    ggml,
                    pool,
                    padded_in=padded.n_in,
                    sample_rows=sample_rows,
                )
                waiting.append((tensor.name, measurement))
                if len(waiting) >= AHEAD:
                    _collect(waiting, measured, step)
            while waiting:
                _collect(waiting, measured, step)
        finally:
            for _, unfinished in waiting:
                unfinished.cancel()
    mopeq = _mopeq_by_layer(tensors, measured)
    errors = {
        tensor.name: measured[tensor.name].priced(_prices(tensor, statistics, _own_mopeq(tensor, measured, mopeq)))
        for tensor in tensors
    }
    unrouted = imatrix.unrouted if imatrix is not None else ()
    scores = tuple(score for score in statistics.available() if score not in DERIVED)
    return SensitivityTable(errors, mopeq, scores, quantize_with, unrouted, sample_rows, made_from)


def _collect(waiting: deque[tuple[str, Measurement]], measured: dict[str, Measured], step: Step) -> None:
    """Wait for the first; it stays among the waiting if it fails."""
    name, first = waiting[0]
    measured[name] = first.result(step.advance)
    waiting.popleft()


def _prices(tensor: SourceTensor, statistics: Statistics, mopeq: Sequence[float] | None) -> dict[str, list[Pricing]]:
    """With ``mopeq`` None for how errors are weighed, which is known before the norms of a layer are."""
    return pricings(tensor, statistics, [1.0] * tensor.n_matrices if mopeq is None else mopeq)


def _mopeq_by_layer(tensors: Sequence[SourceTensor], measured: Mapping[str, Measured]) -> dict[int, Doubles]:
    """S(e) of every expert of every layer."""
    layers: dict[int, list[SourceTensor]] = {}
    for tensor in tensors:
        if tensor.role is Role.EXPERT and tensor.layer is not None:
            layers.setdefault(tensor.layer, []).append(tensor)
    scores = {}
    for layer, stacks in layers.items():
        sizes = {t.name: t.n_in * t.n_out for t in stacks}
        norms = {t.name: measured[t.name].norms for t in stacks}
        by_expert = ({name: float(own[e]) for name, own in norms.items()} for e in range(stacks[0].n_matrices))
        scores[layer] = np.array([mopeq_score(of_one, sizes) for of_one in by_expert])
    return scores


def _own_mopeq(tensor: SourceTensor, measured: Mapping[str, Measured], by_layer: Mapping[int, Doubles]) -> list[float]:
    """S of every matrix of ``tensor``: of its expert, or of the matrix by itself."""
    if tensor.role is Role.EXPERT and tensor.layer is not None:
        return [float(score) for score in by_layer[tensor.layer]]
    sizes = {tensor.name: tensor.n_in * tensor.n_out}
    return [mopeq_score({tensor.name: float(norm)}, sizes) for norm in measured[tensor.name].norms]
