"""The calibrate stage on a Hugging Face directory: windows of text in, statistics out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from mopeq_edge.calibrate.blocks import BlockModel
from mopeq_edge.calibrate.passes import backward, forward, one_torch_thread, output_sums
from mopeq_edge.calibrate.states import HiddenStates
from mopeq_edge.calibrate.statistics import Doubles, Routing, Sums
from mopeq_edge.imatrix import GRADIENT, Imatrix
from mopeq_edge.progress import Progress
from mopeq_edge.sensitivity.pricing import Statistics
from mopeq_edge.source.huggingface import HuggingFaceSource


@dataclass(frozen=True)
class CalibrationOptions:
    """How to calibrate. ``fisher`` adds the backward pass; ``seed`` draws its labels."""

    n_ctx: int = 512
    chunks: int | None = 128
    fisher: bool = True
    seed: int = 1
    threads: int = 1


def calibrate(
    source: HuggingFaceSource,
    windows: npt.NDArray[np.int32],
    dataset: str,
    options: CalibrationOptions,
    scratch: Path,
    progress: Progress,
) -> Statistics:
    """Stream ``windows`` [n_windows, n_ctx] through the model block by block.

    ``dataset`` names the text in the imatrix; ``scratch`` is a folder for states that do not fit in
    memory. The result does not depend on ``options.threads``.
    """
    n_windows, n_ctx = windows.shape
    model = BlockModel(source)
    slots = model.n_layer + 1 if options.fisher else 1
    last = slots - 1
    gradient: Imatrix | None = None
    states = HiddenStates(slots, n_windows, n_ctx, model.n_embd, scratch)
    try:
        with one_torch_thread():
            sums, gate_weights = forward(
                model, windows, states, keep=options.fisher, threads=options.threads, progress=progress
            )
            seed = options.seed * n_windows if options.fisher else None
            out, out_gradient = output_sums(
                model, states, last, n_windows, seed=seed, threads=options.threads, progress=progress
            )
            sums.merge(out)
            if options.fisher:
                gradients, embedding = backward(model, windows, states, threads=options.threads, progress=progress)
                gradients.merge(out_gradient)
                gradients.add("token_embd.weight", 1, 0, embedding, windows.size)
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
    weights = sum(float((c[:, None] * np.ones(v.shape[1])).sum()) for v, c in _pairs(gradients))
    scale = total / weights if total > 0 else 1.0
    entries, unrouted = gradients.entries(scale)
    return Imatrix(entries, (dataset,), shape[0], shape[1], kind=GRADIENT, scale=scale, unrouted=unrouted)


def _pairs(sums: Sums) -> list[tuple[Doubles, Doubles]]:
    return [(values, sums.counts[name]) for name, values in sums.values.items()]


def _expert_counts(sums: Sums, n_layer: int) -> Mapping[int, Doubles]:
    names = {layer: f"blk.{layer}.ffn_down_exps.weight" for layer in range(n_layer)}
    return {layer: sums.counts[name] for layer, name in names.items() if name in sums.counts}
