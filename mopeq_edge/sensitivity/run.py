"""The sensitivity stage: source and statistics in, one table of damages out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mopeq_edge.engine.interface import Engine, Tools
from mopeq_edge.ggml.types import GgmlType
from mopeq_edge.heap import keep_freed_memory
from mopeq_edge.imatrix import Imatrix
from mopeq_edge.plan.candidates import candidates
from mopeq_edge.progress import Progress
from mopeq_edge.sensitivity.measure import Measured, Measuring, total_matrices
from mopeq_edge.sensitivity.pricing import Statistics, pricings
from mopeq_edge.sensitivity.sample import Rows, SampleRows, rows_to_measure
from mopeq_edge.sensitivity.scores import DERIVED, Doubles, Pricing, mopeq_score
from mopeq_edge.sensitivity.table import SensitivityTable
from mopeq_edge.source.model import Source, SourceTensor
from mopeq_edge.source.padded import expert_padding
from mopeq_edge.source.part import Part, PartSource, joined_in_order, parts_of
from mopeq_edge.source.roles import Role


@dataclass(frozen=True)
class Measurement:
    """One task: the matrices of ``part``. Of ``pricings`` only the weighings are used, not the factors."""

    part: Part
    types: tuple[GgmlType, ...]
    pricings: Mapping[str, Sequence[Pricing]]
    imatrix: Imatrix | None
    padded_in: int
    rows: Rows


def measure_sensitivity(
    source: Source,
    types: Sequence[GgmlType],
    statistics: Statistics,
    quantize_with: str,
    engine: Engine,
    *,
    sample_rows: SampleRows,
    rows_only: bool = False,
    made_from: str,
    progress: Progress,
) -> SensitivityTable:
    """Damage of every quantizable tensor and expert for all ``types`` that fit it, by every available score.

    ``quantize_with`` chooses the imatrix that weighs the quantizer: ``activation``, ``gradient`` or ``none``.
    Floors do not apply here, so one table serves every choice of floors. ``sample_rows`` says how many rows are
    measured of each matrix (:mod:`~mopeq_edge.sensitivity.sample`). A type that does not hold the largest weight of a
    tensor, of all its rows, is left out for it. Where experts can be padded, the types that only padded rows take are
    measured as well. Every weight is read once, with ``rows_only`` those of the measured rows alone, so that no other
    row's largest weight is known. The table does not depend on ``engine``.
    """
    padding = expert_padding(source)
    imatrix = statistics.imatrix(quantize_with)
    tensors = [t for t in source.tensors if t.quantizable]
    parts = parts_of(tensors, engine.part_weights)

    def tasks() -> Iterator[Measurement]:
        # one at a time: what calibration knows of all experts, in float64, is large
        for part in parts:
            tensor = part.whole
            padded = tensor if padding is None else padding.tensor(tensor)
            has_imatrix = imatrix is not None and tensor.name in imatrix.entries
            chosen = candidates(padded, types, has_imatrix=has_imatrix, floors={})
            # the norms of a layer, and so the factors of some scores, are known at the end
            weighings = pricings(tensor, statistics, [1.0] * tensor.n_matrices)
            prices = {name: each[part.first : part.stop] for name, each in weighings.items()}
            rows = rows_to_measure(tensor, sample_rows, only=rows_only)
            yield Measurement(part, tuple(chosen), prices, part.imatrix(imatrix), padded.n_in, rows)

    found: dict[int, Measured] = {}
    with progress.step("sensitivity", total_matrices(tensors), "matrices") as step:
        found.update(engine.map(measure_part, source, tasks(), step.advance))
    numbers = joined_in_order(parts)
    measured = {t.name: Measured.joined([found[number] for number in numbers[t.name]]) for t in tensors}
    mopeq = _mopeq_by_layer(tensors, measured)
    errors = {
        tensor.name: measured[tensor.name].priced(pricings(tensor, statistics, _own_mopeq(tensor, measured, mopeq)))
        for tensor in tensors
    }
    unrouted = imatrix.unrouted if imatrix is not None else ()
    scores = tuple(score for score in statistics.available() if score not in DERIVED)
    return SensitivityTable(errors, mopeq, scores, quantize_with, unrouted, sample_rows, made_from, rows_only)


def measure_part(source: Source, task: Measurement, tools: Tools) -> Measured:
    """The work of one task."""
    keep_freed_memory()
    begun = Measuring(
        PartSource(source, task.part),
        task.part.tensor,
        task.types,
        task.pricings,
        task.imatrix,
        tools.ggml,
        tools.pool,
        padded_in=task.padded_in,
        rows=task.rows,
        first=task.part.first,
    )
    return begun.result(lambda: tools.advance(1))


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
