"""The stages on a work directory: each runs or is reused, and hands its artifact to the next."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mopeq_edge.artifacts import digest, file_digest
from mopeq_edge.calibrate.statistics import read_routing, routing_from_imatrix, write_routing
from mopeq_edge.calibrate.traces import Traces, read_traces, write_traces
from mopeq_edge.emit import emit, planned_files
from mopeq_edge.errors import CalibrationError, PlanError
from mopeq_edge.expert_groups.layout import Types, file_specs
from mopeq_edge.ggml.library import Quantizer, load_ggml
from mopeq_edge.ggml.types import GgmlType
from mopeq_edge.gguf_file import KV
from mopeq_edge.imatrix import ACTIVATION, GRADIENT, Imatrix, read_imatrix, split_stacks, write_imatrix
from mopeq_edge.output_kvs import IMATRIX_NAME, Provenance, file_type_of, output_kvs
from mopeq_edge.pipeline_context import Context as Context
from mopeq_edge.pipeline_context import open_context as open_context
from mopeq_edge.plan.artifact import PER_EXPERT, STOCK, Plan, write_plan
from mopeq_edge.plan.budget import Budget
from mopeq_edge.plan.forecast import Forecast, forecast
from mopeq_edge.plan.make import make_plan, require_budget
from mopeq_edge.plan.options import PlanOptions
from mopeq_edge.plan.per_expert import is_stack
from mopeq_edge.progress import Progress
from mopeq_edge.sensitivity.pricing import Statistics, require_scores
from mopeq_edge.sensitivity.run import measure_sensitivity
from mopeq_edge.sensitivity.scores import NEEDS_TRACES
from mopeq_edge.sensitivity.table import SensitivityTable, read_table, write_table
from mopeq_edge.source.model import Source
from mopeq_edge.split import part_paths
from mopeq_edge.workdir import WorkDirectory

ACTIVATION_FILE, GRADIENT_FILE, ROUTING_FILE = "imatrix.gguf", "gradient.gguf", "routing.safetensors"
TRACE_FILE = "trace.safetensors"
NO_IMATRIX = "none"


@dataclass(frozen=True)
class TraceRequest:
    """Measure Hessian traces on the first ``chunks`` windows with ``probes`` random probes (two or more)."""

    chunks: int = 8
    probes: int = 8


@dataclass(frozen=True)
class CalibrationRequest:
    """Where the statistics come from: a text, or an imatrix that llama-imatrix made.

    ``text`` is the calibration text itself and ``dataset`` its name; ``trace`` adds Hessian traces, which need
    ``fisher``.
    """

    text: str = ""
    dataset: str = ""
    n_ctx: int = 512
    chunks: int | None = None
    fisher: bool = True
    seed: int = 1
    imatrix: Path | None = None
    trace: TraceRequest | None = None


@dataclass(frozen=True)
class Calibrated:
    """Statistics, and the hash of what they were made from."""

    statistics: Statistics
    made_from: str


def check_calibration(context: Context, request: CalibrationRequest) -> None:
    """Raise :class:`CalibrationError` for a request that cannot be met, before anything is computed."""
    if request.trace is not None and not (request.fisher and context.source.kind == "huggingface"):
        raise CalibrationError(
            f"{context.source.path}: --trace needs --fisher on the text of a Hugging Face directory (matrices that are "
            "no experts are priced by gradients); calibrate that directory without --imatrix, or leave out --trace"
        )
    if request.imatrix is not None:
        return
    if not request.text:
        raise CalibrationError(f"{context.source.path}: no text to calibrate on; give --text FILE or --imatrix FILE")
    if request.fisher and context.source.kind != "huggingface":
        raise CalibrationError(
            f"{context.source.path}: gradients need the Hugging Face directory, this is a GGUF; "
            "calibrate that directory, or leave out --fisher and use --sensitivity imatrix"
        )


def check_sensitivity(context: Context, request: CalibrationRequest, sensitivity: str) -> None:
    """Raise :class:`CalibrationError` for a score of traces that are neither there nor asked for, before any work."""
    if sensitivity in NEEDS_TRACES and request.trace is None and load_traces(context) is None:
        require_scores([sensitivity], Statistics())


def run_calibrate(context: Context, request: CalibrationRequest) -> Calibrated:
    """The calibrate stage, reused when source, text and options are the same."""
    check_calibration(context, request)
    if request.imatrix is not None:
        return _foreign_imatrix(context, request.imatrix)
    options = (request.n_ctx, request.chunks, request.fisher, request.seed)
    made_from = digest(["calibration 1", context.source_sha256, digest(request.text), *options])
    if not context.work.has("calibrate", made_from):
        statistics = _calibrate(context, request)
        names = _write_statistics(context.work, statistics, made_from)
        context.work.record("calibrate", made_from, names)
    if request.trace is not None:
        _run_trace(context, request, request.trace)
    return Calibrated(load_statistics(context), made_from)


def load_statistics(context: Context) -> Statistics:
    """Statistics of the finished calibrate stage, with the source's traces if they were measured.

    Raises :class:`CalibrationError` if there is no finished stage.
    """
    work = context.work
    names = work.files("calibrate")
    if ACTIVATION_FILE not in names:
        raise CalibrationError(f"{work.path}: has no finished calibration; run mopeq-edge calibrate first")
    statistics = Statistics(
        activation=read_imatrix(work.file(ACTIVATION_FILE)),
        gradient=read_imatrix(work.file(GRADIENT_FILE)) if GRADIENT_FILE in names else None,
        routing=read_routing(work.file(ROUTING_FILE)),
        traces=load_traces(context),
    )
    _note_unrouted(statistics, context.progress)
    _note_clamped(statistics, context.progress)
    return statistics


def run_sensitivity(
    context: Context,
    calibrated: Calibrated | None,
    types: tuple[GgmlType, ...],
    quantize_with: str,
    sample_rows: int | None,
) -> SensitivityTable:
    """The sensitivity stage; ``calibrated`` None measures without an imatrix."""
    inputs = [context.source_sha256, calibrated.made_from if calibrated else NO_IMATRIX]
    if calibrated is not None and calibrated.statistics.traces is not None:
        inputs.append(calibrated.statistics.traces.made_from)
    made_from = digest(["sensitivity 3", *inputs, sorted(t.name for t in types), quantize_with, sample_rows])
    stage, name = f"sensitivity-{quantize_with}", f"sensitivity-{quantize_with}.safetensors"
    if not context.work.has(stage, made_from):
        table = measure_sensitivity(
            context.source,
            types,
            calibrated.statistics if calibrated else Statistics(),
            quantize_with,
            load_ggml(),
            sample_rows=sample_rows,
            threads=context.threads,
            made_from=made_from,
            progress=context.progress,
        )
        write_table(table, context.work.file(name))
        context.work.record(stage, made_from, [name])
    return read_table(context.work.file(name))


def check_budget(context: Context, request: CalibrationRequest, budget: Budget | None, options: PlanOptions) -> None:
    """Raise :class:`PlanError` for a budget below the exact minimum, before anything is computed."""
    if budget is None:
        return
    datasets = read_imatrix(request.imatrix).datasets if request.imatrix is not None else (request.dataset,)
    kvs = output_kvs(context.source.kvs, 0, Imatrix({}, datasets, 0, 0), IMATRIX_NAME, Provenance())
    require_budget(context.source, kvs, budget, options)


def run_plan(
    context: Context, table: SensitivityTable, statistics: Statistics, budget: Budget | None, options: PlanOptions
) -> Plan:
    """The plan stage: seconds, so it always runs. Leaves plan.json."""
    plan = plan_only(context, table, statistics, budget, options)
    write_plan(plan, context.work.file("plan.json"))
    return plan


def plan_only(
    context: Context, table: SensitivityTable, statistics: Statistics, budget: Budget | None, options: PlanOptions
) -> Plan:
    """The plan, without leaving it in the work directory."""
    require_scores([options.sensitivity], statistics)
    kvs = _kvs(context, statistics, table.quantized_with, file_type=0, plan_sha256=None)
    return make_plan(context.source, table, kvs, budget, options)


def run_forecast(
    context: Context,
    table: SensitivityTable,
    statistics: Statistics,
    budget: Budget | None,
    options: PlanOptions,
    plan: Plan,
) -> Forecast | None:
    """What the other layout would make of the same budget; None for the paper's map, which has one layout."""
    if options.precision_map is not None:
        return None
    other = replace(options, layout=STOCK if plan.layout == PER_EXPERT else PER_EXPERT, split_bytes=None)
    stacks = [tensor for tensor in context.source.tensors if is_stack(tensor) and tensor.quantizable]
    return forecast(stacks, table, statistics.routing, plan, plan_only(context, table, statistics, budget, other))


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
    kind = quantize_with or plan.quantized_with
    types = plan.type_of()
    kvs = _final_kvs(context, plan, statistics, kind)
    total = sum(place.file_size for place in planned_files(context.source, types, kvs, split_bytes))
    if split_bytes is not None and plan.budget_bytes is not None and total > plan.budget_bytes:
        raise PlanError(
            f"{output}: in several files it has {total} bytes, {plan.budget_bytes} were allowed when it was planned; "
            "plan again with the same --split-max-size"
        )
    return _emit(context, types, kvs, statistics.imatrix(kind), output, quantizer, split_bytes)


def output_files(
    context: Context, plan: Plan, statistics: Statistics, output: Path, split_bytes: int | None
) -> tuple[Path, ...]:
    """The files that :func:`run_emit` writes; llama.cpp wants the first."""
    if split_bytes is None:
        return (output,)
    kvs = _final_kvs(context, plan, statistics, plan.quantized_with)
    return tuple(part_paths(output, len(planned_files(context.source, plan.type_of(), kvs, split_bytes))))


def _final_kvs(context: Context, plan: Plan, statistics: Statistics, kind: str) -> dict[str, KV]:
    specs = file_specs(context.source.tensors, plan.type_of())
    return _kvs(context, statistics, kind, file_type_of(specs), plan.sha256)


def source_gguf(context: Context) -> Path:
    """The source as a GGUF without loss: itself, or a copy in the work directory."""
    if context.source.kind == "gguf":
        return context.source.path
    name, made_from = "source.gguf", digest(["source 1", context.source_sha256])
    if not context.work.has("source", made_from):
        types: Types = {t.name: t.type for t in context.source.tensors}
        _emit(context, types, context.source.kvs, None, context.work.file(name))
        context.work.record("source", made_from, [name])
    return context.work.file(name)


def _emit(
    context: Context,
    types: Types,
    kvs: Mapping[str, KV],
    imatrix: Imatrix | None,
    output: Path,
    quantizer: Quantizer | None = None,
    split_bytes: int | None = None,
) -> int:
    ggml, threads, progress = quantizer or load_ggml(), context.threads, context.progress
    return emit(
        context.source, types, kvs, imatrix, ggml, output, threads=threads, progress=progress, split_bytes=split_bytes
    )


def imatrix_file(kind: str) -> str:
    """Name of the imatrix of ``kind`` in a work directory."""
    return {ACTIVATION: ACTIVATION_FILE, GRADIENT: GRADIENT_FILE}[kind]


def _kvs(context: Context, statistics: Statistics, kind: str, file_type: int, plan_sha256: str | None) -> dict[str, KV]:
    imatrix = statistics.imatrix(kind)
    provenance = Provenance(context.source_sha256, plan_sha256) if plan_sha256 else Provenance()
    return output_kvs(context.source.kvs, file_type, imatrix, IMATRIX_NAME, provenance)


def _calibrate(context: Context, request: CalibrationRequest) -> Statistics:
    if context.source.kind == "gguf":
        from mopeq_edge.calibrate.from_gguf import calibrate_gguf

        return calibrate_gguf(
            context.source,
            request.text,
            request.dataset,
            n_ctx=request.n_ctx,
            chunks=request.chunks,
            threads=context.threads,
            progress=context.progress,
        )
    from mopeq_edge.calibrate.run import calibrate_text

    return calibrate_text(
        context.source,
        request.text,
        request.dataset,
        n_ctx=request.n_ctx,
        chunks=request.chunks,
        fisher=request.fisher,
        seed=request.seed,
        threads=context.threads,
        scratch=context.work.path,
        progress=context.progress,
    )


def _run_trace(context: Context, request: CalibrationRequest, trace: TraceRequest) -> None:
    """A stage of its own: it is costly, and a new choice of probes leaves the rest of the calibration alone."""
    options = (request.n_ctx, trace.chunks, trace.probes, request.seed)
    made_from = digest(["trace 1", context.source_sha256, digest(request.text), *options])
    if context.work.has("trace", made_from):
        return
    from mopeq_edge.calibrate.trace import trace_text

    traces = trace_text(
        context.source,
        request.text,
        n_ctx=request.n_ctx,
        chunks=trace.chunks,
        probes=trace.probes,
        seed=request.seed,
        threads=context.threads,
        scratch=context.work.path,
        source_sha256=context.source_sha256,
        made_from=made_from,
        progress=context.progress,
    )
    write_traces(traces, context.work.file(TRACE_FILE))
    context.work.record("trace", made_from, [TRACE_FILE])


def load_traces(context: Context) -> Traces | None:
    """The traces in the work directory, if they are this source's."""
    if TRACE_FILE not in context.work.files("trace"):
        return None
    traces = read_traces(context.work.file(TRACE_FILE))
    return traces if traces.source_sha256 == context.source_sha256 else None


def _foreign_imatrix(context: Context, path: Path) -> Calibrated:
    imatrix = split_stacks(read_imatrix(path), {t.name: t.n_matrices for t in context.source.tensors})
    check_imatrix(imatrix, path, context.source)
    statistics = Statistics(activation=imatrix, routing=routing_from_imatrix(imatrix, context.source))
    made_from = digest(["imatrix 1", file_digest(path)])
    names = _write_statistics(context.work, statistics, made_from)
    context.work.record("calibrate", made_from, names)
    _note_unrouted(statistics, context.progress)
    return Calibrated(statistics, made_from)


def check_imatrix(imatrix: Imatrix, path: Path, source: Source) -> None:
    """Raise :class:`CalibrationError` for an imatrix of another model."""
    for tensor in source.tensors:
        entry = imatrix.entries.get(tensor.name)
        expected = (tensor.n_matrices, tensor.n_in)
        if entry is not None and entry.sums.shape != expected:
            raise CalibrationError(
                f"{path}: entry '{tensor.name}' has shape {list(entry.sums.shape)}, expected {list(expected)} "
                f"as in {source.path}; it was made for another model"
            )
        if entry is None and tensor.projection is not None:
            raise CalibrationError(
                f"{path}: has no entry for '{tensor.name}' of {source.path}; it was made for another model"
            )


def _write_statistics(work: WorkDirectory, statistics: Statistics, made_from: str) -> list[str]:
    names = [ACTIVATION_FILE, ROUTING_FILE]
    assert statistics.activation is not None
    assert statistics.routing is not None
    write_imatrix(statistics.activation, work.file(ACTIVATION_FILE))
    write_routing(statistics.routing, work.file(ROUTING_FILE), made_from)
    if statistics.gradient is not None:
        write_imatrix(statistics.gradient, work.file(GRADIENT_FILE))
        names.append(GRADIENT_FILE)
    return names


def _note_unrouted(statistics: Statistics, progress: Progress) -> None:
    unrouted = statistics.activation.unrouted if statistics.activation is not None else ()
    experts = sorted({name.split(".ffn_")[0] + "[" + name.split("[")[1] for name in unrouted})
    if experts:
        progress.note(
            f"note: never-routed experts ({len(experts)}): {_first(experts)}; priced by their layer's mean at one "
            "token, more text may reach them"
        )


def _note_clamped(statistics: Statistics, progress: Progress) -> None:
    clamped = statistics.traces.clamped if statistics.traces is not None else ()
    if clamped:
        names = [name.replace(".weight[", "[") for name in clamped]
        progress.note(
            f"note: traces that were not positive ({len(clamped)}): {_first(names)}; priced by their stack's mean per "
            "token, more --probes or --trace-chunks make them clearer"
        )


def _first(names: Sequence[str]) -> str:
    return ", ".join(names[:8]) + (", …" if len(names) > 8 else "")


def load_sensitivity(work: WorkDirectory) -> SensitivityTable:
    """The finished sensitivity stage. Raises :class:`PlanError` if there is none."""
    for kind in (GRADIENT, ACTIVATION):
        if work.files(f"sensitivity-{kind}"):
            return read_table(work.file(f"sensitivity-{kind}.safetensors"))
    raise PlanError(f"{work.path}: has no finished sensitivity; run mopeq-edge sensitivity first")


def check_plan(plan: Plan, source: Source) -> None:
    """Raise :class:`PlanError` for a plan that was made for another model."""
    planned = {t.name: t.shape for t in plan.tensors}
    for tensor in source.tensors:
        if planned.pop(tensor.name, None) != tensor.shape:
            raise PlanError(
                f"tensor '{tensor.name}' of {source.path} has shape {list(tensor.shape)} and is not so in the plan; "
                "the plan was made for another model, run mopeq-edge plan again"
            )
    if planned:
        raise PlanError(f"the plan has tensor '{next(iter(planned))}', which {source.path} lacks; plan again")
