"""The trace statistic of a Hugging Face directory: text in, Hutchinson's estimate for every expert matrix out."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from mopeq_edge.binding import Tokens
from mopeq_edge.calibrate.blocks import BlockModel
from mopeq_edge.calibrate.curvature import Run, curvature, record_choices
from mopeq_edge.calibrate.hutchinson import mean_and_error
from mopeq_edge.calibrate.memory import return_large_blocks
from mopeq_edge.calibrate.passes import one_torch_thread
from mopeq_edge.calibrate.states import HiddenStates
from mopeq_edge.calibrate.statistics import Doubles
from mopeq_edge.calibrate.tokens import token_windows
from mopeq_edge.calibrate.traces import Traces, with_prior
from mopeq_edge.progress import Progress
from mopeq_edge.source.huggingface import HuggingFaceSource
from mopeq_edge.source.model import Source


def trace_text(
    source: Source,
    text: str,
    *,
    n_ctx: int,
    chunks: int,
    probes: int,
    seed: int,
    threads: int,
    scratch: Path,
    source_sha256: str,
    made_from: str,
    progress: Progress,
) -> Traces:
    """Cut ``text`` into at most ``chunks`` windows of ``n_ctx`` tokens and run :func:`measure_traces` on them."""
    if not isinstance(source, HuggingFaceSource):
        raise TypeError(f"expected a Hugging Face checkpoint, got {source.kind}")
    return measure_traces(
        source,
        token_windows(source.kvs, text, n_ctx, chunks),
        probes=probes,
        seed=seed,
        threads=threads,
        scratch=scratch,
        source_sha256=source_sha256,
        made_from=made_from,
        progress=progress,
    )


def measure_traces(
    source: HuggingFaceSource,
    windows: Tokens,
    *,
    probes: int,
    seed: int,
    threads: int,
    scratch: Path,
    source_sha256: str,
    made_from: str,
    progress: Progress,
) -> Traces:
    """Mean diagonal of the Hessian of the loss on ``windows`` [n_windows, n_ctx], for every expert matrix.

    Each of the ``probes`` (two or more) costs two forward and two backward passes. ``scratch`` is a folder for states
    that do not fit in memory. The result does not depend on ``threads``.
    """
    return_large_blocks()
    n_windows, n_ctx = windows.shape
    model = BlockModel(source)
    states = HiddenStates(model.n_layer + 1, [n_ctx] * n_windows, model.n_embd, scratch)
    one_pass = (model.n_layer + 1) * n_windows
    total = one_pass + probes * 2 * (one_pass + model.n_layer * n_windows)
    try:
        with one_torch_thread(), progress.step("calibrate: trace", total, "windows") as step:
            run = Run(model, windows, states, threads, step)
            choices = record_choices(run)
            samples = [curvature(run, choices, seed=seed, probe=probe) for probe in range(probes)]
    finally:
        states.close()
    weights = {t.name: t.n_in * t.n_out for t in source.tensors}
    estimates: dict[str, Doubles] = {}
    errors: dict[str, Doubles] = {}
    for name in samples[0]:
        found = mean_and_error(sample[name] / weights[name] for sample in samples)
        estimates[name], errors[name] = np.asarray(found.mean), np.asarray(found.standard_error)
    mean_diagonal, clamped = with_prior(estimates, errors, choices.counts)
    return Traces(mean_diagonal, errors, probes, int(windows.size), choices.loss, clamped, source_sha256, made_from)
