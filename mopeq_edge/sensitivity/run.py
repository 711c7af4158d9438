"""The sensitivity stage: source and statistics in, one table of damages out."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mopeq_edge.engine.interface import Engine, Tools
from mopeq_edge.ggml.types import GgmlType
from mopeq_edge.imatrix import Imatrix
from mopeq_edge.plan.candidates import candidates
from mopeq_edge.progress import Progress
from mopeq_edge.sensitivity.measure import ROWS_AT_ONCE, TensorErrors, measure_tensor, total_matrices
from mopeq_edge.sensitivity.pricing import Statistics, pricings
from mopeq_edge.sensitivity.scores import DERIVED, Doubles, Pricing, mopeq_score
from mopeq_edge.sensitivity.table import SensitivityTable
from mopeq_edge.source.model import Source, SourceTensor, magnitude
from mopeq_edge.source.padded import expert_padding
from mopeq_edge.source.part import Part, PartSource, joined_in_order, parts_of
from mopeq_edge.source.roles import Role

SINGLE_MATRIX_ROWS = 8
"""Times as many rows are sampled of a tensor of one matrix."""


@dataclass(frozen=True)
class Measurement:
    """One task: :func:`measure_tensor` of the matrices of ``part``."""

    part: Part
    types: tuple[GgmlType, ...]
    pricings: Mapping[str, Sequence[Pricing]]
    imatrix: Imatrix | None
    padded_in: int
    sample_rows: int | None


def measure_sensitivity(
    source: Source,
    types: Sequence[GgmlType],
    statistics: Statistics,
    quantize_with: str,
    engine: Engine,
    *,
    sample_rows: int | None,
    made_from: str,
    progress: Progress,
) -> SensitivityTable:
    """Damage of every quantizable tensor and expert for all ``types`` that fit it, by every available score.

    ``quantize_with`` chooses the imatrix that weighs the quantizer: ``activation``, ``gradient`` or ``none``.
    Floors do not apply here, so one table serves every choice of floors. ``sample_rows`` rows are measured of each
    matrix of a stack, :data:`SINGLE_MATRIX_ROWS` times as many of other tensors; None measures all. A type that does
    not hold the largest weight of a tensor, of all its rows, is left out for it. Where experts can be padded, the types
    that only padded rows take are measured as well. The table does not depend on ``engine``.
    """
    padding = expert_padding(source)
    imatrix = statistics.imatrix(quantize_with)
    tensors = [t for t in source.tensors if t.quantizable]
    parts = parts_of(tensors, engine.part_weights)
    numbers = joined_in_order(parts)
    norms, largest = _norms(source, parts, engine, progress)
    mopeq = _mopeq_by_layer(tensors, norms)

    def tasks() -> Iterator[Measurement]:
        # one at a time: what calibration knows of all experts, in float64, is large
        for part in parts:
            tensor = part.whole
            padded = tensor if padding is None else padding.tensor(tensor)
            chosen = candidates(
                padded,
                types,
                has_imatrix=imatrix is not None and tensor.name in imatrix.entries,
                floors={},
                largest=float(largest[tensor.name].max()),
            )
            score = mopeq[tensor.layer] if tensor.role is Role.EXPERT and tensor.layer is not None else None
            own = _own_mopeq(tensor, norms[tensor.name]) if score is None else list(score)
            prices = {name: each[part.first : part.stop] for name, each in pricings(tensor, statistics, own).items()}
            rows = _rows_to_measure(tensor, sample_rows)
            yield Measurement(part, tuple(chosen), prices, part.imatrix(imatrix), padded.n_in, rows)

    measured: dict[int, TensorErrors] = {}
    with progress.step("sensitivity", total_matrices(tensors), "matrices") as step:
        measured.update(engine.map(measure_part, source, tasks(), step.advance))
    errors = {t.name: _joined([measured[number] for number in numbers[t.name]]) for t in tensors}
    unrouted = imatrix.unrouted if imatrix is not None else ()
    scores = tuple(score for score in statistics.available() if score not in DERIVED)
    return SensitivityTable(errors, mopeq, scores, quantize_with, unrouted, sample_rows, made_from)


def measure_part(source: Source, task: Measurement, tools: Tools) -> TensorErrors:
    """The work of one task."""
    return measure_tensor(
        PartSource(source, task.part),
        task.part.tensor,
        task.types,
        task.pricings,
        task.imatrix,
        tools.ggml,
        tools.pool,
        padded_in=task.padded_in,
        sample_rows=task.sample_rows,
        on_matrix=lambda: tools.advance(1),
    )


def _joined(parts: Sequence[TensorErrors]) -> TensorErrors:
    """The errors of a tensor from those of its parts, in order."""
    first = parts[0]
    return TensorErrors(
        first.types,
        {score: np.concatenate([part.damage[score] for part in parts], axis=1) for score in first.damage},
        {score: np.concatenate([part.variance[score] for part in parts], axis=1) for score in first.variance},
        np.concatenate([part.norms for part in parts]),
    )


def _rows_to_measure(tensor: SourceTensor, sample_rows: int | None) -> int | None:
    """A stack averages over its experts or heads; a tensor of one matrix needs more rows for the same error."""
    if sample_rows is None or tensor.n_matrices > 1:
        return sample_rows
    return sample_rows * SINGLE_MATRIX_ROWS


def _norms(
    source: Source, parts: Sequence[Part], engine: Engine, progress: Progress
) -> tuple[dict[str, Doubles], dict[str, Doubles]]:
    """|W|_F and the largest magnitude [n_matrices] of every tensor; also the first full look at the weights."""
    found: dict[int, Doubles] = {}
    with progress.step("norms", sum(part.n_matrices for part in parts), "matrices") as step:
        found.update(engine.map(norms_of_part, source, parts, step.advance))
    whole = {
        name: np.concatenate([found[number] for number in numbers], axis=1)
        for name, numbers in joined_in_order(parts).items()
    }
    return {name: both[0] for name, both in whole.items()}, {name: both[1] for name, both in whole.items()}


def norms_of_part(source: Source, part: Part, tools: Tools) -> Doubles:
    """The work of one task: |W|_F and the largest magnitude [2, n_matrices]."""
    tensor = part.whole

    def norm(matrix: int) -> tuple[float, float]:
        # a whole vocabulary in float64 would be larger than a block
        at_once, total, largest = max(1, ROWS_AT_ONCE // tensor.n_in), 0.0, 0.0
        for start in range(0, tensor.n_out, at_once):
            rows = source.read(tensor, matrix, slice(start, start + at_once))
            total += float(np.square(rows, dtype=np.float64).sum())
            largest = max(largest, magnitude(rows))
        return math.sqrt(total), largest

    futures = [tools.pool.submit(norm, matrix) for matrix in range(part.first, part.stop)]
    found = np.array([future.result() for future in futures]).T
    tools.advance(part.n_matrices)
    return found


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
