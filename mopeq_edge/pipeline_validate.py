"""``validate``: the checks one after the other, each left out for a stated reason where what it needs is not there."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from converters import CONVERTERS
from converters.vocabulary import NO_VOCABULARY
from mopeq_edge.errors import ExtraMissingError, FormatError, MopeqError, RuntimeMissingError, SourceError
from mopeq_edge.evaluate.chunks import read_text
from mopeq_edge.evaluate.run import evaluate, make_reference
from mopeq_edge.ggml.types import I32
from mopeq_edge.gguf_file import GGUFHeader
from mopeq_edge.plan.artifact import Plan, read_plan
from mopeq_edge.progress import Progress
from mopeq_edge.runtime.locate import import_llama_cpp, library_dir
from mopeq_edge.runtime.per_expert import why_it_does_not_load
from mopeq_edge.source.gguf import GGUFSource
from mopeq_edge.source.huggingface import open_huggingface
from mopeq_edge.source.model import Source
from mopeq_edge.source.padded import ExpertPadding, PaddedSource, expert_padding
from mopeq_edge.split import read_parts
from mopeq_edge.summary import Summary, summarise
from mopeq_edge.units import plural
from mopeq_edge.validate import against, damage, key_values, measured, planned, second_opinion
from mopeq_edge.validate.check import Check, failed, skipped
from mopeq_edge.validate.llama_run import run_llama
from mopeq_edge.validate.measured import Thresholds, check_evaluation, check_prediction
from mopeq_edge.validate.scan import scan
from mopeq_edge.validate.second_opinion import Agreement
from mopeq_edge.validate.stored import StoredModel, stored_model
from mopeq_edge.validate.structure import check_structure, find_plan, zeroed_tail
from mopeq_edge.validate.text import N_TOKENS, TEXT, tokens_of
from mopeq_edge.validate.tolerance import tolerance_of
from mopeq_edge.validate.weights import CannotDequantizeError, compare_weights

ROWS = 16
"""Rows of every matrix that are compared with the source's."""

RUNS = "runs"
"""Name of the check that llama.cpp loads and computes the file."""


@dataclass(frozen=True)
class ValidateRequest:
    """What to hold ``path`` against, and how thoroughly. ``work`` holds what the source's logits need."""

    path: Path
    work: Path
    plan: Path | None = None
    against: Path | None = None
    text: Path | None = None
    n_tokens: int = N_TOKENS
    run: bool = True
    """Whether to run the file in llama.cpp at all."""
    thresholds: Thresholds = field(default_factory=Thresholds)
    n_ctx: int = 512
    n_chunks: int | None = None
    threads: int = 1
    n_gpu_layers: int = 0
    source_gguf: Callable[[], Path] | None = None
    """Makes the GGUF of a source that is a directory: its vocabulary needs more than this module may."""


@dataclass(frozen=True)
class Validated:
    """``seconds`` by part, in the order in which they ran."""

    summary: Summary
    checks: tuple[Check, ...]
    seconds: dict[str, float]
    routing: tuple[Agreement, ...] = ()
    """Of llama.cpp's routers with the reference's; empty where that was left out."""

    @property
    def failed(self) -> list[Check]:
        """The most specific first."""
        return failed(self.checks)

    @property
    def passed(self) -> bool:
        return not self.failed

    def as_dict(self) -> dict[str, Any]:
        """The summary's plain values, and those of the checks."""
        checks = [check.as_dict() for check in self.checks]
        routing = [layer.as_dict() for layer in self.routing]
        own = {"passed": self.passed, "checks": checks, "routing": routing, "seconds": self.seconds}
        return {**self.summary.as_dict(), **own}


def validate(request: ValidateRequest, progress: Progress) -> Validated:
    """Check ``request.path`` in every way that the request allows.

    Raises :class:`MopeqError` for what is no sound GGUF, and for a plan, a source or a text that cannot be read.
    """
    seconds: dict[str, float] = {}

    @contextmanager
    def timed(part: str) -> Iterator[None]:
        start = time.monotonic()
        yield
        seconds[part] = round(time.monotonic() - start, 3)

    with timed("structure"):
        headers = read_parts(request.path)
        try:
            summary = summarise(request.path)
        except FormatError as error:
            raise zeroed_tail(headers[-1]) or error from None
        plan, why_no_plan = _plan(request, headers)
        checks = [check_structure(summary)]
        if plan is not None:
            checks += planned.check_plan(headers, plan)
        else:
            checks.append(skipped(planned.PLAN, "plan.json", why_no_plan))
    if summary.architecture is None:
        checks.append(skipped(damage.SCALES, "weights", f"no model but a file of type '{summary.kind}'"))
        return Validated(summary, tuple(checks), seconds)
    model = stored_model(headers)
    source, why_no_source = _source(request, model)
    padding = plan.expert_padding if plan is not None else _padding_of(model, source)
    if source is not None and padding is not None and expert_padding(source) == padding:
        source = PaddedSource(source, padding)
    with timed("weights"):
        found = scan(model, request.threads, progress)
        broken = damage.check_scales(found)
        checks += broken + damage.check_zeros(model, found, padding, source)
    with timed("source"):
        checks += _against(request, model, source, padding, why_no_source, progress)
    with timed("run"):
        damaged = [check for check in broken if check.passed is False]
        ran, routing = _run(request, model, damaged, progress)
        checks += ran
    with timed("evaluation"):
        checks += _evaluate(request, plan, damaged, progress)
    return Validated(summary, tuple(checks), seconds, routing)


def _plan(request: ValidateRequest, headers: Sequence[GGUFHeader]) -> tuple[Plan | None, str]:
    if request.plan is not None:
        return read_plan(request.plan), ""
    return find_plan(headers, request.work)


def _source(request: ValidateRequest, model: StoredModel) -> tuple[Source | None, str]:
    """The source without its vocabulary, for which a directory would need transformers."""
    path = request.against
    if path is None:
        return None, "no source given; give --against SOURCE"
    if not path.exists():
        raise SourceError(f"{path}: does not exist; give the source as a checkpoint directory or a GGUF file")
    if not path.is_dir():
        return GGUFSource(path), ""
    keep_mtp = model.number("nextn_predict_layers") > 0
    return open_huggingface(path, CONVERTERS, NO_VOCABULARY, keep_mtp=keep_mtp), ""


def _padding_of(model: StoredModel, source: Source | None) -> ExpertPadding | None:
    """How the file's experts are padded, told from the width that it and its source have."""
    padding = expert_padding(source) if source is not None else None
    kv = model.kvs.get(padding.key) if padding is not None else None
    return padding if padding is not None and kv is not None and kv.value == padding.padded else None


def _against(
    request: ValidateRequest,
    model: StoredModel,
    source: Source | None,
    padding: ExpertPadding | None,
    why_not: str,
    progress: Progress,
) -> list[Check]:
    if source is None:
        return [skipped(name, "SOURCE", why_not) for name in (key_values.KEY_VALUES, against.WEIGHTS)]
    # a padded source has the padded width already
    checks = key_values.check_key_values(model.kvs, source.kvs, None if isinstance(source, PaddedSource) else padding)
    checks += against.check_tensors(model, source)
    try:
        compared = compare_weights(model, source, ROWS, request.threads, progress)
    except CannotDequantizeError as error:
        return [*checks, skipped(against.WEIGHTS, "weights", str(error))]
    return checks + against.check_weights(model, compared, source)


def _run(
    request: ValidateRequest, model: StoredModel, damaged: list[Check], progress: Progress
) -> tuple[list[Check], tuple[Agreement, ...]]:
    """llama.cpp, and the ONNX reference beside it."""
    why_not = _why_not_run(request, model, damaged)
    if why_not:
        return [skipped(RUNS, "llama.cpp", why_not)], ()
    text = read_text(request.text) if request.text is not None else TEXT
    try:
        tokens = tokens_of(model, text, request.n_tokens)
        if not len(tokens):
            raise MopeqError(f"{request.text}: has no tokens; give a longer text")
        with progress.step("running llama.cpp", None):
            run = run_llama(model.path, tokens, threads=request.threads, n_gpu_layers=request.n_gpu_layers)
    except FormatError:
        raise
    except MopeqError as error:
        return [Check(RUNS, "llama.cpp", None, None, False, str(error))], ()
    checks = [Check(RUNS, plural(len(tokens), "token"), None, None, True, "llama.cpp loads and computes it")]
    tolerance = tolerance_of(matrix.type for matrix in model.matrices if matrix.type is not I32)
    checks.append(second_opinion.check_steps(run, tokens, tolerance))
    # onnxruntime takes a second to import
    from converters.onnx_reference import run_reference

    routing = {layer: routed.ids for layer, routed in run.routed.items()}
    try:
        reference = run_reference(model.path, tokens, threads=request.threads, progress=progress, routing=routing)
    except SourceError as error:
        return [*checks, skipped(second_opinion.LOGITS, "ONNX reference", str(error))], ()
    except (FormatError, ValueError) as error:
        # also where llama.cpp has no experts and the file has
        return [*checks, Check(second_opinion.LOGITS, "ONNX reference", None, None, False, str(error))], ()
    checks.append(second_opinion.check_logits(run, reference, tokens, tolerance))
    checks += second_opinion.check_routing(run, reference, tolerance)
    return checks, second_opinion.agreement(run, reference, tolerance)


def _why_not_run(request: ValidateRequest, model: StoredModel, damaged: list[Check]) -> str:
    """Why the file is not run in llama.cpp, or nothing."""
    if not request.run:
        return "not wanted (--no-run)"
    if damaged:
        return "weights are no numbers, see above"
    if "token_embd.weight" not in model.tensors:
        return "has no token_embd.weight: it is no whole model"
    try:
        import_llama_cpp()
        return why_it_does_not_load(model.path, library_dir()) or ""
    except RuntimeMissingError as error:
        return str(error)


def _evaluate(request: ValidateRequest, plan: Plan | None, damaged: list[Check], progress: Progress) -> list[Check]:
    """llama.cpp against the source's logits."""
    why_not = "" if request.run else "not wanted (--no-run)"
    if request.against is None or request.text is None:
        why_not = "needs --against SOURCE and --text FILE"
    elif damaged:
        why_not = "weights are no numbers, see above"
    if why_not or request.against is None or request.text is None:
        return [skipped(measured.EVALUATION, "SOURCE", why_not)]
    try:
        is_directory = request.against.is_dir() and request.source_gguf is not None
        source = request.source_gguf() if is_directory and request.source_gguf is not None else request.against
        reference = make_reference(
            source,
            request.text,
            request.work,
            n_ctx=request.n_ctx,
            n_chunks=request.n_chunks,
            n_threads=request.threads,
            progress=progress,
        )
        found = evaluate(request.path, reference, n_threads=request.threads, progress=progress)
    except (RuntimeMissingError, ExtraMissingError) as error:
        return [skipped(measured.EVALUATION, "SOURCE", str(error))]
    checks = check_evaluation(found, request.thresholds)
    return checks if plan is None else [*checks, check_prediction(found, plan)]
