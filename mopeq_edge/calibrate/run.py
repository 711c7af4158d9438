"""The calibrate stage on a Hugging Face directory: windows of text in, statistics out."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from mopeq_edge.binding import Tokens
from mopeq_edge.calibrate.blocks import BlockModel
from mopeq_edge.calibrate.passes import backward, forward, one_torch_thread, output_sums
from mopeq_edge.calibrate.states import HiddenStates
from mopeq_edge.calibrate.statistics import Doubles, Routing, Sums
from mopeq_edge.calibrate.tokens import token_windows
from mopeq_edge.heap import keep_freed_memory
from mopeq_edge.imatrix import EMBEDDING, GRADIENT, LOOKUP, Imatrix
from mopeq_edge.progress import Progress
from mopeq_edge.sensitivity.pricing import Statistics
from mopeq_edge.source.huggingface import HuggingFaceSource
from mopeq_edge.source.model import Source


def calibrate_text(
    source: Source,
    text: str,
    dataset: str,
    *,
    n_ctx: int,
    chunks: int | None,
    fisher: bool,
    seed: int,
    threads: int,
    scratch: Path,
    progress: Progress,
) -> Statistics:
    """Cut ``text`` into at most ``chunks`` windows of ``n_ctx`` tokens and run :func:`calibrate` on them."""
    if not isinstance(source, HuggingFaceSource):
        raise TypeError(f"expected a Hugging Face checkpoint, got {source.kind}")
    windows = token_windows(source.kvs, text, n_ctx, chunks)
    return calibrate(
        source, windows, dataset, fisher=fisher, seed=seed, threads=threads, scratch=scratch, progress=progress
    )


def calibrate(
    source: HuggingFaceSource,
    windows: Tokens,
    dataset: str,
    *,
    fisher: bool,
    seed: int,
    threads: int,
    scratch: Path,
    progress: Progress,
) -> Statistics:
    """Stream ``windows`` [n_windows, n_ctx] through the model block by block.

    ``dataset`` names the text in the imatrix; ``fisher`` adds the backward pass, whose labels ``seed`` draws;
    ``scratch`` is a folder for states that do not fit in memory. The result does not depend on ``threads``.
    """
    keep_freed_memory()
    n_windows, n_ctx = windows.shape
    model = BlockModel(source)
    slots = model.n_layer + 1 if fisher else 1
    last = slots - 1
    gradient: Imatrix | None = None
    states = HiddenStates(slots, n_windows, n_ctx, model.n_embd, scratch)
    try:
        with one_torch_thread():
            sums, gate_weights = forward(model, windows, states, keep=fisher, threads=threads, progress=progress)
            first_seed = seed * n_windows if fisher else None
            out, out_gradient = output_sums(
                model, states, last, n_windows, seed=first_seed, threads=threads, progress=progress
            )
            sums.merge(out)
            if fisher:
                gradients, embedding = backward(model, windows, states, threads=threads, progress=progress)
                gradients.merge(out_gradient)
                tied = model.output_name == EMBEDDING
                gradients.add(LOOKUP if tied else EMBEDDING, 1, 0, embedding, windows.size)
                gradient = _gradient_imatrix(gradients, sums, dataset, windows.shape)
    finally:
        states.close()
    entries, unrouted = sums.entries()
    activation = Imatrix(entries, (dataset,), n_windows, n_ctx, unrouted=unrouted)
    routing = Routing(
        n_tokens=windows.size,
        counts=_expert_counts(sums, model.n_layer),
        gate_weights=gate_weights,
        token_counts=np.bincount(windows.reshape(-1), minlength=model.n_vocab).astype(np.float64),
    )
    return Statistics(activation, gradient, routing)


def _gradient_imatrix(gradients: Sums, activations: Sums, dataset: str, shape: tuple[int, ...]) -> Imatrix:
    """Scaled so that the mean weight is 1: the quantizers work in float32 and raw gradients are tiny."""
    for name, values in activations.values.items():
        # a stack with experts that no gradient reached still needs its shape
        if name in gradients.values or "_exps." not in name:
            continue
        gradients.values[name], gradients.counts[name] = np.zeros_like(values), np.zeros(len(values))
    total = sum(float(v.sum()) for v in gradients.values.values())
    weights = sum(float(gradients.counts[name].sum()) * v.shape[1] for name, v in gradients.values.items())
    scale = total / weights if total > 0 else 1.0
    entries, unrouted = gradients.entries(scale)
    return Imatrix(entries, (dataset,), shape[0], shape[1], kind=GRADIENT, scale=scale, unrouted=unrouted)


def _expert_counts(sums: Sums, n_layer: int) -> Mapping[int, Doubles]:
    names = {layer: f"blk.{layer}.ffn_down_exps.weight" for layer in range(n_layer)}
    return {layer: sums.counts[name] for layer, name in names.items() if name in sums.counts}
