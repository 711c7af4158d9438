"""All stages in one: a checkpoint and a budget in, a proven GGUF out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from mopeq_edge.artifacts import digest, read_json, write_json
from mopeq_edge.atomic import check_output
from mopeq_edge.device_files import DeviceFile, total_bytes
from mopeq_edge.emit import without_imatrix
from mopeq_edge.errors import PlanError
from mopeq_edge.evaluate.chunks import Positions, read_text
from mopeq_edge.evaluate.run import Evaluation, evaluate, make_reference
from mopeq_edge.imatrix import ACTIVATION, GRADIENT
from mopeq_edge.pipeline import (
    Context,
    check_budget,
    output_files,
    planner_of,
    run_emit,
    run_forecast,
    run_plan,
    run_sensitivity,
    source_gguf,
)
from mopeq_edge.pipeline_calibrate import (
    Calibrated,
    CalibrationRequest,
    check_calibration,
    check_sensitivity,
    load_traces,
    run_calibrate,
)
from mopeq_edge.pipeline_fits import Fit, FitsRequest, first_budget, run_plan_that_fits
from mopeq_edge.pipeline_vision import Vision, check_vision, run_vision
from mopeq_edge.plan.artifact import Plan
from mopeq_edge.plan.budget import Budget
from mopeq_edge.plan.forecast import Forecast
from mopeq_edge.plan.options import PlanOptions
from mopeq_edge.sensitivity.pricing import Statistics, require_scores
from mopeq_edge.sensitivity.sample import AUTO, SampleRows
from mopeq_edge.sensitivity.scores import FISHER, FISHER_TRACE, IMATRIX
from mopeq_edge.split import check_parts

VALIDATION_FORMAT, CHOICE_FORMAT, VERSION = "mopeq-edge validation", "mopeq-edge imatrix choice", 1

HELD_OUT = 0.1
"""Share of the calibration text that is kept back to compare imatrices and to validate."""
HELD_OUT_CHUNKS = 16

Measure = Callable[[Path], Evaluation]


@dataclass(frozen=True)
class ConvertRequest:
    """What to convert to. ``quantize_with``: ``activation``, ``gradient``, or ``auto`` to measure which is better.

    ``evaluation_text`` must not be part of the calibration text; the first :data:`HELD_OUT_CHUNKS` windows of it
    are read.
    """

    output: Path
    budget: Budget | None
    calibration: CalibrationRequest
    options: PlanOptions
    quantize_with: str = "auto"
    sample_rows: SampleRows = AUTO
    evaluation_text: Path | None = None
    evaluate: bool = True
    force: bool = False
    fits: FitsRequest | None = None
    """In the place of a budget: what the file has to run in."""
    vision: str | None = None
    """Type of the vision file's matrices; None for the text side alone."""
    beside: tuple[DeviceFile, ...] = ()
    """Further files that the device loads; like those that see pictures they are part of the budget."""


@dataclass(frozen=True)
class ImatrixChoice:
    """Mean KLD in nats of the same plan quantized with each imatrix; ``chosen`` is the smaller one."""

    chosen: str
    kld: dict[str, float]

    def sentence(self) -> str:
        """Which imatrix measured better, and by how much."""
        if len(self.kld) < 2:
            return f"{self.chosen} imatrix (the only one)"
        best, other = sorted(self.kld.values())
        return (
            f"{self.chosen} imatrix: mean KLD {best:.5f} against {other:.5f} nats on held-out text "
            f"({100 * (1 - best / other) if other else 0:.1f} % less)"
        )


@dataclass(frozen=True)
class Converted:
    """What came out."""

    files: tuple[Path, ...]
    """One, or those that the output was split into, in order."""
    file_bytes: int
    """Of all files."""
    plan: Plan
    choice: ImatrixChoice
    sampling_error: float
    """Largest relative standard error of a tensor's damage by row sampling; 0 when all rows were measured."""
    evaluation: Evaluation | None
    forecast: Forecast | None = None
    """What the other layout would bring; None for the paper's planner."""
    fit: Fit | None = None
    """The memory that the file was planned for."""
    vision: Vision | None = None
    """The file beside it that sees pictures."""
    beside: tuple[DeviceFile, ...] = ()
    """Further files that the device loads."""

    @property
    def device_bytes(self) -> int:
        """Of everything that the device loads."""
        return self.file_bytes + self.beside_bytes

    @property
    def beside_bytes(self) -> int:
        """Of everything but the GGUF."""
        return total_bytes((*(self.vision.files if self.vision is not None else ()), *self.beside))

    def as_dict(self) -> dict[str, Any]:
        """Plain values with units in their names."""
        return {
            "beside": {file.name: file.nbytes for file in self.beside},
            "budget_bytes": self.plan.budget_bytes,
            "device_bytes": self.device_bytes,
            "evaluation": self.evaluation.as_dict() if self.evaluation is not None else None,
            "expert_padding": asdict(self.plan.expert_padding) if self.plan.expert_padding is not None else None,
            "file_bytes": self.file_bytes,
            "imatrix": asdict(self.choice),
            "layout": self.plan.layout,
            "optimality_gap": self.plan.gap,
            "output": self.files[0].name,
            "output_files": len(self.files),
            "fits": self.fit.as_dict() if self.fit is not None else None,
            "forecast": self.forecast.as_dict() if self.forecast is not None else None,
            "plan_sha256": self.plan.sha256,
            "planner": self.plan.planner,
            "precision_map": asdict(self.plan.precision_map) if self.plan.precision_map is not None else None,
            "predicted_damage": self.plan.damage,
            "predicted_damage_unit": self.plan.unit,
            "predicted_file_bytes": self.plan.file_bytes,
            "relative_sampling_error": self.sampling_error,
            "sensitivity": self.plan.sensitivity,
            "vision": self.vision.as_dict() if self.vision is not None else None,
        }


def default_sensitivity(context: Context, calibration: CalibrationRequest) -> str:
    """``fisher`` where a backward pass is possible and wanted (``fisher-trace`` with traces), else ``imatrix``."""
    has_gradient = context.source.kind == "huggingface" and calibration.imatrix is None and calibration.fisher
    if not has_gradient:
        return IMATRIX
    if calibration.pictures is not None:
        return FISHER
    return FISHER_TRACE if calibration.trace is not None or load_traces(context) is not None else FISHER


def convert(context: Context, request: ConvertRequest) -> Converted:
    """Calibrate, measure, plan, emit and validate; finished stages are reused.

    The output is checked before anything is computed, and appears only when it is whole.
    """
    check = check_output if request.options.split_bytes is None else check_parts
    check(request.output, context.inputs, force=request.force)
    eyes = check_vision(context, request.output, request.vision, force=request.force)
    check_calibration(context, request.calibration)
    check_sensitivity(context, request.calibration, request.options.sensitivity)
    words = read_text(request.evaluation_text) if request.evaluation_text is not None else ""
    if request.evaluate and not words:
        raise PlanError(
            f"{context.source.path}: no text to validate on; give --eval-text FILE, or --no-evaluate to skip that"
        )
    tower = eyes.tower if eyes is not None else None
    budget, fits = request.budget, request.fits
    if fits is not None:
        # an mmproj is in memory together with the model
        with_it = eyes.files if eyes is not None and tower is None else ()
        fits = replace(fits, tower=tower, beside=(*with_it, *request.beside))
        budget = first_budget(context, fits)
    elif budget is not None:
        budget = replace(budget, beside=(*(eyes.files if eyes is not None else ()), *request.beside))
    check_budget(context, request.calibration, budget, request.options)
    calibrated = run_calibrate(context, request.calibration)
    require_scores([request.options.sensitivity], calibrated.statistics)
    kind = _first_kind(request, calibrated.statistics)
    table = run_sensitivity(context, calibrated, request.options.types, kind, request.sample_rows)
    planner = planner_of(context, table, calibrated.statistics, request.options)
    fit: Fit | None = None
    if fits is None:
        plan = run_plan(context, planner, budget)
    else:
        plan, fit, budget = run_plan_that_fits(context, planner, fits)
    comparison = run_forecast(planner, calibrated.statistics.routing, budget, plan)
    measure = _measure(context, request) if request.evaluate else None
    choice = _choose(context, request, calibrated, plan, kind, digest(words), measure)
    split = request.options.split_bytes
    vision = run_vision(context, eyes)
    written = run_emit(context, plan, calibrated.statistics, request.output, choice.chosen, split_bytes=split)
    files = output_files(context, plan, calibrated.statistics, request.output, split)
    evaluation = measure(files[0]) if measure is not None else None
    result = Converted(
        files,
        written,
        plan,
        choice,
        table.relative_error(plan.sensitivity),
        evaluation,
        comparison,
        fit,
        vision,
        request.beside,
    )
    write_json(context.work.file("validation.json"), VALIDATION_FORMAT, VERSION, result.as_dict())
    return result


def _first_kind(request: ConvertRequest, statistics: Statistics) -> str:
    """The imatrix that the sensitivity is measured with."""
    if request.quantize_with != "auto":
        if request.quantize_with == GRADIENT and statistics.gradient is None:
            raise PlanError("--quantize-with gradient: there is no gradient-weighted imatrix; calibrate with --fisher")
        return request.quantize_with
    return statistics.richest


def _choose(
    context: Context,
    request: ConvertRequest,
    calibrated: Calibrated,
    plan: Plan,
    kind: str,
    text_sha256: str,
    measure: Measure | None,
) -> ImatrixChoice:
    """Quantize one plan with both imatrices and measure; remembered for later budgets."""
    other = calibrated.statistics.activation
    both = calibrated.statistics.gradient is not None and request.quantize_with == "auto"
    # an embedding below its floor may need the gradient's entry: the activation imatrix has none
    if measure is None or not both or without_imatrix(context.source, plan.type_of(), other):
        return ImatrixChoice(kind, {})
    stage, name = "imatrix-choice", "imatrix-choice.json"
    # neither budget nor layout: they move few types, and measuring again would cost more than planning
    options = [plan.planner, plan.sensitivity, list(plan.types), text_sha256]
    made_from = digest(["choice 2", calibrated.made_from, context.source_sha256, *options])
    path = context.work.file(name)
    trials = {candidate: context.work.file(f"trial-{candidate}.gguf") for candidate in (ACTIVATION, GRADIENT)}
    for left in trials.values():
        # of a run that was killed
        left.unlink(missing_ok=True)
    if not context.work.has(stage, made_from):
        kld = {}
        for candidate, trial in trials.items():
            try:
                run_emit(context, plan, calibrated.statistics, trial, candidate)
                kld[candidate] = measure(trial).divergence.kld_mean
            finally:
                trial.unlink(missing_ok=True)
        write_json(path, CHOICE_FORMAT, VERSION, {"kld_mean_nats": kld})
        context.work.record(stage, made_from, [name])
    kld = read_json(path, CHOICE_FORMAT, VERSION)["kld_mean_nats"]
    return ImatrixChoice(min(sorted(kld), key=lambda k: float(kld[k])), kld)


def _measure(context: Context, request: ConvertRequest) -> Measure:
    """Evaluates files against the source on the evaluation text; the source's logits are looked up once."""
    if request.evaluation_text is None:
        raise ValueError("nothing to evaluate on")
    positions: Positions = "second-half"
    reference = make_reference(
        source_gguf(context),
        request.evaluation_text,
        context.work.path,
        n_ctx=request.calibration.n_ctx,
        n_chunks=HELD_OUT_CHUNKS,
        positions=positions,
        n_threads=context.threads,
        source_sha256=context.source_sha256,
        progress=context.progress,
    )

    def measure(target: Path) -> Evaluation:
        return evaluate(target, reference, n_threads=context.threads, positions=positions, progress=context.progress)

    return measure
