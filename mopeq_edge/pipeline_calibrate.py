"""The calibrate stage on a work directory: text, pictures or a foreign imatrix in, statistics and traces out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mopeq_edge.artifacts import digest, file_digest, read_json, write_json
from mopeq_edge.calibrate.modalities import (
    Modalities,
    RoutingByKind,
    read_modalities,
    routing_by_kind,
    write_modalities,
)
from mopeq_edge.calibrate.statistics import read_routing, routing_from_imatrix, write_routing
from mopeq_edge.calibrate.traces import Traces, read_traces, write_traces
from mopeq_edge.errors import CalibrationError, FormatError
from mopeq_edge.imatrix import NO_IMATRIX, Imatrix, open_imatrix, read_imatrix, split_stacks, write_imatrix
from mopeq_edge.pipeline_context import Context as Context
from mopeq_edge.pipeline_context import open_context as open_context
from mopeq_edge.progress import Progress
from mopeq_edge.sensitivity.pricing import Statistics, require_scores
from mopeq_edge.sensitivity.scores import NEEDS_TRACES
from mopeq_edge.source.model import Source
from mopeq_edge.workdir import WorkDirectory

if TYPE_CHECKING:
    from mopeq_edge.pipeline_pictures import Eyes, PicturesRequest

ACTIVATION_FILE, GRADIENT_FILE, ROUTING_FILE = "imatrix.gguf", "gradient.gguf", "routing.safetensors"
TRACE_FILE = "trace.safetensors"
MODALITIES_FILE, BY_KIND_FILE = "modalities.safetensors", "routing-by-kind.json"
BY_KIND_FORMAT, BY_KIND_VERSION = "mopeq-edge routing by kind", 1


@dataclass(frozen=True)
class TraceRequest:
    """Measure Hessian traces on the first ``chunks`` windows with ``probes`` random probes (two or more)."""

    chunks: int = 8
    probes: int = 8


@dataclass(frozen=True)
class CalibrationRequest:
    """Where the statistics come from: a text, or an imatrix that llama-imatrix made.

    ``text`` is the calibration text itself and ``dataset`` its name; ``trace`` adds Hessian traces, which need
    ``fisher``; ``pictures`` are read with it, and exclude traces.
    """

    text: str = ""
    dataset: str = ""
    n_ctx: int = 512
    chunks: int | None = None
    fisher: bool = True
    seed: int = 1
    imatrix: Path | None = None
    trace: TraceRequest | None = None
    pictures: PicturesRequest | None = None


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
    if request.pictures is not None:
        _check_pictures(context, request, request.pictures)
    if request.imatrix is not None:
        return
    if not request.text:
        raise CalibrationError(f"{context.source.path}: no text to calibrate on; give --text FILE or --imatrix FILE")
    if request.fisher and context.source.kind != "huggingface":
        raise CalibrationError(
            f"{context.source.path}: gradients need the Hugging Face directory, this is a GGUF; "
            "calibrate that directory, or leave out --fisher and use --sensitivity imatrix"
        )


def _check_pictures(context: Context, request: CalibrationRequest, pictures: PicturesRequest) -> None:
    for given, option, why in (
        (request.imatrix, "--imatrix", "an imatrix is there already"),
        (request.trace, "--trace", "the loss that it differentiates is that of text"),
    ):
        if given is not None:
            raise CalibrationError(
                f"{pictures.directory}: --images does not go with {option}: {why}; leave out one of them"
            )
    from mopeq_edge.pipeline_pictures import open_eyes

    open_eyes(context, pictures)


def check_sensitivity(context: Context, request: CalibrationRequest, sensitivity: str) -> None:
    """Raise :class:`CalibrationError` for a score of traces that are neither there nor asked for, before any work."""
    if sensitivity in NEEDS_TRACES and request.trace is None and (request.pictures or load_traces(context) is None):
        require_scores([sensitivity], Statistics())


def run_calibrate(context: Context, request: CalibrationRequest) -> Calibrated:
    """The calibrate stage, reused when source, text and options are the same."""
    check_calibration(context, request)
    if request.imatrix is not None:
        return _foreign_imatrix(context, request.imatrix)
    options = (request.n_ctx, request.chunks, request.fisher, request.seed)
    made_from = digest(["calibration 1", context.source_sha256, digest(request.text), *options])
    if request.pictures is not None:
        return _run_with_pictures(context, request, request.pictures, made_from)
    if not context.work.has("calibrate", made_from):
        statistics = _calibrate(context, request)
        names = _write_statistics(context.work, statistics, made_from)
        context.work.record("calibrate", made_from, names)
    if request.trace is not None:
        _run_trace(context, request, request.trace)
    return Calibrated(load_statistics(context), made_from)


def _run_with_pictures(
    context: Context, request: CalibrationRequest, pictures: PicturesRequest, text_from: str
) -> Calibrated:
    """Two stages: what was measured keeps both kinds of tokens apart, and another weight only adds them up again."""
    from mopeq_edge.pipeline_pictures import open_eyes

    eyes = open_eyes(context, pictures)
    measured_from = digest(["modalities 1", text_from, eyes.made_from(context.source_sha256)])
    work, path = context.work, context.work.file(MODALITIES_FILE)
    if not work.has("modalities", measured_from):
        found = _calibrate_mixed(context, request, pictures, eyes)
        work.forget("modalities")
        write_modalities(found, path, measured_from)
        work.record("modalities", measured_from, [MODALITIES_FILE])
    made_from = digest(["weighed 1", measured_from, pictures.weight])
    if not work.has("calibrate", made_from):
        found = read_modalities(path)
        names = _write_statistics(work, found.statistics(pictures.weight), made_from)
        by_kind = found.routing(pictures.weight).as_dict()
        write_json(work.file(BY_KIND_FILE), BY_KIND_FORMAT, BY_KIND_VERSION, by_kind)
        work.record("calibrate", made_from, [*names, MODALITIES_FILE, BY_KIND_FILE])
    return Calibrated(load_statistics(context), made_from)


def _calibrate_mixed(
    context: Context, request: CalibrationRequest, pictures: PicturesRequest, eyes: Eyes
) -> Modalities:
    from mopeq_edge.calibrate.run import calibrate_mixed
    from mopeq_edge.calibrate.tokens import token_windows
    from mopeq_edge.calibrate.windows import text_windows
    from mopeq_edge.pipeline_pictures import see_pictures

    source = eyes.source
    texts = text_windows(token_windows(source.kvs, request.text, request.n_ctx, request.chunks))
    return calibrate_mixed(
        source,
        [*texts, *see_pictures(context, eyes, request.n_ctx)],
        (request.dataset, pictures.directory.resolve().name),
        n_ctx=request.n_ctx,
        fisher=request.fisher,
        seed=request.seed,
        threads=context.threads,
        scratch=context.work.path,
        progress=context.progress,
    )


def load_routing_by_kind(work: WorkDirectory) -> RoutingByKind | None:
    """Which experts text and pictures went to, if the finished calibration read pictures."""
    if BY_KIND_FILE not in work.files("calibrate"):
        return None
    path = work.file(BY_KIND_FILE)
    try:
        return routing_by_kind(read_json(path, BY_KIND_FORMAT, BY_KIND_VERSION))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise FormatError(f"{path}: not routing as calibrate writes it ({error!r}); calibrate again") from None


def load_statistics(context: Context, *, entries: bool = True) -> Statistics:
    """Statistics of the finished calibrate stage, with the source's traces if they were measured.

    Without ``entries`` those of an imatrix are left unread until one is asked for: a gigabyte in a large model.
    Raises :class:`CalibrationError` if there is no finished stage.
    """
    work = context.work
    names = work.files("calibrate")
    if ACTIVATION_FILE not in names:
        raise CalibrationError(f"{work.path}: has no finished calibration; run mopeq-edge calibrate first")
    read = read_imatrix if entries else open_imatrix
    statistics = Statistics(
        activation=read(work.file(ACTIVATION_FILE)),
        gradient=read(work.file(GRADIENT_FILE)) if GRADIENT_FILE in names else None,
        routing=read_routing(work.file(ROUTING_FILE)),
        # they are of text alone
        traces=load_traces(context) if BY_KIND_FILE not in names else None,
    )
    _note_unrouted(statistics, context.progress)
    _note_clamped(statistics, context.progress)
    return statistics


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
    context.work.forget("trace")
    write_traces(traces, context.work.file(TRACE_FILE))
    context.work.record("trace", made_from, [TRACE_FILE])


def load_calibrated(context: Context, kind: str, *, entries: bool = True) -> Calibrated | None:
    """The finished calibrate stage for work with the imatrix ``kind``; None if that is none."""
    if kind == NO_IMATRIX:
        return None
    return Calibrated(load_statistics(context, entries=entries), context.work.made_from("calibrate") or "")


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
    work.forget("calibrate")
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
