"""The stages on a work directory: each runs or is reused, and hands its artifact to the next."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from mopeq_edge.artifacts import digest
from mopeq_edge.calibrate.statistics import Routing
from mopeq_edge.dry_run import DryRun, dry_run
from mopeq_edge.emit import emit, planned_files
from mopeq_edge.emit_parts import emit_on
from mopeq_edge.engine.local import LocalEngine
from mopeq_edge.errors import PlanError
from mopeq_edge.expert_groups.layout import Types, file_specs
from mopeq_edge.ggml.library import Quantizer, load_ggml
from mopeq_edge.ggml.types import GgmlType
from mopeq_edge.gguf_file import KV
from mopeq_edge.gguf_layout import Layout
from mopeq_edge.imatrix import ACTIVATION, GRADIENT, NO_IMATRIX, Imatrix, read_imatrix
from mopeq_edge.output_kvs import IMATRIX_NAME, Provenance, file_type_of, output_kvs
from mopeq_edge.pipeline_calibrate import ACTIVATION_FILE, GRADIENT_FILE, Calibrated, CalibrationRequest
from mopeq_edge.pipeline_context import Context as Context
from mopeq_edge.pipeline_context import open_context as open_context
from mopeq_edge.pipeline_context import open_description as open_description
from mopeq_edge.pipeline_context import open_header as open_header
from mopeq_edge.plan.artifact import PER_EXPERT, STOCK, Plan, write_plan
from mopeq_edge.plan.budget import Budget
from mopeq_edge.plan.forecast import Forecast, forecast
from mopeq_edge.plan.make import Planner, require_budget
from mopeq_edge.plan.options import PlanOptions
from mopeq_edge.plan.per_expert import expert_stacks
from mopeq_edge.sensitivity.pricing import Statistics, require_scores
from mopeq_edge.sensitivity.run import measure_sensitivity
from mopeq_edge.sensitivity.sample import SampleRows
from mopeq_edge.sensitivity.table import SensitivityTable, read_table, write_table
from mopeq_edge.source.model import Source
from mopeq_edge.source.padded import PaddedSource, expert_padding
from mopeq_edge.split import part_paths
from mopeq_edge.workdir import WorkDirectory


def run_sensitivity(
    context: Context,
    calibrated: Calibrated | None,
    types: tuple[GgmlType, ...],
    quantize_with: str,
    sample_rows: SampleRows,
    *,
    rows_only: bool = False,
) -> SensitivityTable:
    """The sensitivity stage; ``calibrated`` None measures without an imatrix.

    With ``rows_only`` nothing but the measured rows is read, not even for a hash: sizes and times of its files then
    name the source.
    """
    inputs = [
        context.source_stamp if rows_only else context.source_sha256,
        calibrated.made_from if calibrated else NO_IMATRIX,
    ]
    if (padding := expert_padding(context.source)) is not None:
        inputs.append(f"padded to {padding.padded}")
    if calibrated is not None and calibrated.statistics.traces is not None:
        inputs.append(calibrated.statistics.traces.made_from)
    made_from = digest(
        [
            "sensitivity 4",
            *inputs,
            sorted(t.name for t in types),
            quantize_with,
            sample_rows,
            *(["rows only"] if rows_only else []),
        ]
    )
    stage, name = f"sensitivity-{quantize_with}", f"sensitivity-{quantize_with}.safetensors"
    if not context.work.has(stage, made_from):
        table = measure_sensitivity(
            context.source,
            types,
            calibrated.statistics if calibrated else Statistics(),
            quantize_with,
            context.engine or LocalEngine(context.threads, load_ggml()),
            sample_rows=sample_rows,
            rows_only=rows_only,
            made_from=made_from,
            progress=context.progress,
        )
        context.work.forget(stage)
        write_table(table, context.work.file(name))
        context.work.record(stage, made_from, [name])
    return read_table(context.work.file(name))


def check_budget(context: Context, request: CalibrationRequest, budget: Budget | None, options: PlanOptions) -> None:
    """Raise :class:`PlanError` for a budget below the exact minimum, before anything is computed.

    Also for files that are too small for a tensor.
    """
    if budget is None and options.split_bytes is None:
        return
    datasets = read_imatrix(request.imatrix).datasets if request.imatrix is not None else (request.dataset,)
    kvs = output_kvs(context.source.kvs, 0, Imatrix({}, datasets, 0, 0), IMATRIX_NAME, Provenance())
    require_budget(context.source, kvs, budget, options)


def planner_of(context: Context, table: SensitivityTable, statistics: Statistics, options: PlanOptions) -> Planner:
    """Makes plans of the source. Raises :class:`CalibrationError` for a score that lacks its statistics."""
    require_scores([options.sensitivity], statistics)
    kvs = _kvs(context, statistics, table.quantized_with, 0, Provenance())
    return Planner(context.source, table, kvs, options)


def run_plan(context: Context, planner: Planner, budget: Budget | None) -> Plan:
    """The plan stage: seconds, so it always runs. Leaves plan.json."""
    plan = planner.plan(budget)
    write_plan(plan, context.work.file("plan.json"))
    return plan


def run_forecast(planner: Planner, routing: Routing | None, budget: Budget | None, plan: Plan) -> Forecast | None:
    """What the other layout would make of the same budget; None for the paper's map, which has one layout.

    Also None for a budget that the other layout's files just miss.
    """
    options = planner.options
    if options.precision_map is not None:
        return None
    try:
        compared = planner.plan(budget, STOCK if plan.layout == PER_EXPERT else PER_EXPERT, proven=False)
    except PlanError:
        # of several files the other layout's may be one more, and its header over a budget at the minimum
        if options.split_bytes is None:
            raise
        return None
    return forecast(expert_stacks(planner.source), planner.table, routing, plan, compared)


def run_emit(
    context: Context,
    plan: Plan,
    statistics: Statistics,
    output: Path,
    quantize_with: str | None = None,
    quantizer: Quantizer | None = None,
    split_bytes: int | None = None,
) -> int:
    """The emit stage: the planned file, byte for byte as large as planned. Returns its bytes.

    ``quantizer`` is libggml unless another is given. With ``split_bytes`` it is in the files of
    :func:`output_files`. Raises :class:`PlanError` if these are larger than the plan's budget.
    """
    source, kvs, imatrix, _ = prepared(
        context, plan, statistics, output, quantize_with, split_bytes, context.source_sha256
    )
    return _emit(context, source, plan.type_of(), kvs, imatrix, output, quantizer, split_bytes)


def run_dry(
    context: Context,
    plan: Plan,
    statistics: Statistics,
    output: Path,
    quantize_with: str | None,
    split_bytes: int | None,
) -> DryRun:
    """What :func:`run_emit` would do, checked as far as that takes no weights. Leaves nothing."""
    source, _, imatrix, places = prepared(context, plan, statistics, output, quantize_with, split_bytes, None)
    paths = [output] if split_bytes is None else part_paths(output, len(places))
    return dry_run(source, plan.type_of(), imatrix, places, paths, load_ggml(), context.threads)


def prepared(
    context: Context,
    plan: Plan,
    statistics: Statistics,
    output: Path,
    quantize_with: str | None,
    split_bytes: int | None,
    source_sha256: str | None,
) -> tuple[Source, Mapping[str, KV], Imatrix | None, tuple[Layout, ...]]:
    """(source, key-values, imatrix, files) of what :func:`run_emit` writes, and what it raises for a plan too large.

    ``source_sha256`` None leaves its place empty, in the same bytes: to know it all weights are read.
    """
    kind = quantize_with or plan.quantized_with
    types, source = plan.type_of(), planned_source(context.source, plan)
    kvs = _final_kvs(context, source, plan, statistics, kind, source_sha256)
    places = planned_files(source, types, kvs, split_bytes)
    total = sum(place.file_size for place in places)
    if split_bytes is not None and plan.budget_bytes is not None and total > plan.budget_bytes:
        raise PlanError(
            f"{output}: in several files it has {total} bytes, {plan.budget_bytes} were allowed when it was planned; "
            "plan again with the same --split-max-size"
        )
    imatrix = statistics.imatrix(kind)
    if plan.expert_padding is not None:
        imatrix = plan.expert_padding.imatrix(imatrix, {t.name: t for t in context.source.tensors})
    return source, kvs, imatrix, places


def output_files(
    context: Context, plan: Plan, statistics: Statistics, output: Path, split_bytes: int | None
) -> tuple[Path, ...]:
    """The files that :func:`run_emit` writes; llama.cpp wants the first."""
    if split_bytes is None:
        return (output,)
    source = planned_source(context.source, plan)
    kvs = _final_kvs(context, source, plan, statistics, plan.quantized_with, None)
    return tuple(part_paths(output, len(planned_files(source, plan.type_of(), kvs, split_bytes))))


def planned_source(source: Source, plan: Plan) -> Source:
    """``source`` with its experts padded if ``plan`` has them so. Raises :class:`PlanError` if they cannot be."""
    padding = plan.expert_padding
    if padding is None:
        return source
    if expert_padding(source) != padding:
        raise PlanError(
            f"{source.path}: the plan pads experts from {padding.width} to {padding.padded} ({padding.key}), and these "
            "do not ask for it; the plan was made for another model, run mopeq-edge plan again"
        )
    return PaddedSource(source, padding)


def _final_kvs(
    context: Context, source: Source, plan: Plan, statistics: Statistics, kind: str, source_sha256: str | None
) -> Mapping[str, KV]:
    specs = file_specs(source.tensors, plan.type_of())
    provenance = Provenance(plan=plan.sha256) if source_sha256 is None else Provenance(source_sha256, plan.sha256)
    return plan.kvs(_kvs(context, statistics, kind, file_type_of(specs), provenance))


def source_gguf(context: Context) -> Path:
    """The source as a GGUF without loss: itself, or a copy in the work directory."""
    if context.source.kind == "gguf":
        return context.source.path
    name, made_from = "source.gguf", digest(["source 1", context.source_sha256])
    if not context.work.has("source", made_from):
        types: Types = {t.name: t.type for t in context.source.tensors}
        _emit(context, context.source, types, context.source.kvs, None, context.work.file(name))
        context.work.record("source", made_from, [name])
    return context.work.file(name)


def _emit(
    context: Context,
    source: Source,
    types: Types,
    kvs: Mapping[str, KV],
    imatrix: Imatrix | None,
    output: Path,
    quantizer: Quantizer | None = None,
    split_bytes: int | None = None,
) -> int:
    progress = context.progress
    if context.engine is not None and quantizer is None:
        return emit_on(context.engine, source, types, kvs, imatrix, output, progress=progress, split_bytes=split_bytes)
    ggml, threads = quantizer or load_ggml(), context.threads
    return emit(source, types, kvs, imatrix, ggml, output, threads=threads, progress=progress, split_bytes=split_bytes)


def imatrix_file(kind: str) -> str:
    """Name of the imatrix of ``kind`` in a work directory."""
    return {ACTIVATION: ACTIVATION_FILE, GRADIENT: GRADIENT_FILE}[kind]


def _kvs(context: Context, statistics: Statistics, kind: str, file_type: int, provenance: Provenance) -> dict[str, KV]:
    return output_kvs(context.source.kvs, file_type, statistics.imatrix(kind), IMATRIX_NAME, provenance)


def load_sensitivity(work: WorkDirectory, choose: Callable[[Sequence[str]], str] | None = None) -> SensitivityTable:
    """The finished sensitivity stage that knows most; ``choose``: see :func:`read_table`.

    Raises :class:`PlanError` if there is none.
    """
    for kind in (GRADIENT, ACTIVATION, NO_IMATRIX):
        if work.files(f"sensitivity-{kind}"):
            return read_table(work.file(f"sensitivity-{kind}.safetensors"), choose)
    raise PlanError(f"{work.path}: has no finished sensitivity; run mopeq-edge sensitivity first")


def check_plan(plan: Plan, source: Source) -> None:
    """Raise :class:`PlanError` for a plan that was made for another model."""
    planned = {t.name: t.shape for t in plan.tensors}
    for tensor in planned_source(source, plan).tensors:
        if planned.pop(tensor.name, None) != tensor.shape:
            raise PlanError(
                f"tensor '{tensor.name}' of {source.path} has shape {list(tensor.shape)} and is not so in the plan; "
                "the plan was made for another model, run mopeq-edge plan again"
            )
    if planned:
        raise PlanError(f"the plan has tensor '{next(iter(planned))}', which {source.path} lacks; plan again")
