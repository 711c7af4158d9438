"""The two streamed passes: forward through the blocks, and backward with recomputation.

Windows of text run side by side in threads, each with one torch thread; what they measured is added in
window order. So the result does not depend on the number of threads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from mopeq_edge.calibrate.blocks import BlockModel
from mopeq_edge.calibrate.experts import Recorder, Watch
from mopeq_edge.calibrate.states import HiddenStates
from mopeq_edge.calibrate.statistics import Doubles, Sums
from mopeq_edge.progress import Progress, Step

Windows = npt.NDArray[np.int32]
Positions = dict[str, Any]
T = TypeVar("T")

LOGITS_AT_ONCE = 2**22
"""Logits that one thread holds: those of a window of a large vocabulary would need more memory than a block."""


@contextmanager
def one_torch_thread() -> Iterator[None]:
    """torch's own threads would change the order of its sums, and so the last bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def each_window(work: Callable[[int], T], n_windows: int, threads: int, step: Step) -> Iterator[T]:
    """``work(window)`` for all windows, results in window order, at most ``2 * threads`` waiting."""
    with ThreadPoolExecutor(threads) as pool:
        pending = [pool.submit(work, w) for w in range(min(2 * threads, n_windows))]
        try:
            for following in range(len(pending), n_windows + len(pending)):
                result = pending.pop(0).result()
                if following < n_windows:
                    pending.append(pool.submit(work, following))
                step.advance()
                yield result
        finally:
            for future in pending:
                future.cancel()


def forward(
    model: BlockModel, windows: Windows, states: HiddenStates, *, keep: bool, threads: int, progress: Progress
) -> tuple[Sums, dict[int, Doubles]]:
    """Run all windows [n_windows, n_ctx] through all blocks, one block at a time.

    With ``keep`` slot i of ``states`` ends as the input of block i (slot n_layer: of the final norm), else
    slot 0 is overwritten. Returns the activation sums and, by layer, each expert's sum of gate weights.
    """
    n_windows, n_ctx = windows.shape
    sums = Sums()
    gate_weights: dict[int, Doubles] = {}
    for window in range(n_windows):
        states.put(0, window, model.embed(windows[window]))
    with progress.step("calibrate: forward", model.n_layer * n_windows, "windows") as step:
        for layer in range(model.n_layer):
            slots = (layer, layer + 1) if keep else (0, 0)
            positions = model.positions(n_ctx, layer)
            with model.block(layer) as block:
                run = partial(_forward_window, model, block, positions, states, slots)
                for recorder in each_window(run, n_windows, threads, step):
                    sums.merge(recorder.activation)
                    if recorder.gate_weights is not None:
                        gate_weights[layer] = gate_weights.get(layer, 0.0) + recorder.gate_weights
    return sums, gate_weights


def output_sums(
    model: BlockModel,
    states: HiddenStates,
    slot: int,
    n_windows: int,
    *,
    seed: int | None,
    threads: int,
    progress: Progress,
) -> tuple[Sums, Sums]:
    """Through the final norm to the logits. Returns activation and gradient sums of the output matrix.

    With ``seed`` the labels are drawn from the model's own distribution and slot ``slot`` becomes the
    gradient of the log-likelihood at the final norm's input; without it only activations are summed.
    """
    name = model.output_name
    matrix = model.output_matrix()
    activation, gradient = Sums(), Sums()
    with progress.step("calibrate: output", n_windows, "windows") as step, model.final_norm() as norm:

        def run(window: int) -> Recorder:
            recorder = Recorder()
            h = states.get(slot, window).requires_grad_(seed is not None)
            x = norm(h)
            flat = x.reshape(-1, x.shape[-1])
            recorder.saw_input(name, flat)
            if seed is not None:
                generator = torch.Generator().manual_seed(seed + window)
                below = torch.empty_like(flat)
                for part in token_parts(flat.shape[0], model.n_vocab):
                    logits = (flat.detach()[part] @ matrix.T).mul_(model.logits_scale)
                    g = _sampled_gradient(logits, generator).mul_(model.logits_scale)
                    recorder.saw_gradient(name, flat[part], g)
                    below[part] = g @ matrix
                (upstream,) = torch.autograd.grad(flat, h, below)
                states.put(slot, window, upstream)
            return recorder

        for recorder in each_window(run, n_windows, threads, step):
            activation.merge(recorder.activation)
            gradient.merge(recorder.gradient)
    return activation, gradient


def backward(
    model: BlockModel, windows: Windows, states: HiddenStates, *, threads: int, progress: Progress
) -> tuple[Sums, Doubles]:
    """Gradients through all blocks from last to first; slot n_layer holds the gradient to start from.

    Each block is run again from its kept input. Returns the gradient sums of all matrices and, for the rows of the
    token embedding before they are scaled, sum_t g_tj^2 [n_embd].
    """
    n_windows, n_ctx = windows.shape
    sums = Sums()
    top = model.n_layer
    with progress.step("calibrate: backward", model.n_layer * n_windows, "windows") as step:
        for layer in reversed(range(model.n_layer)):
            positions = model.positions(n_ctx, layer)
            with model.block(layer) as block:
                run = partial(_backward_window, model, block, positions, states, (layer, top))
                for recorder in each_window(run, n_windows, threads, step):
                    sums.merge(recorder.gradient)
    embedding = np.zeros(model.n_embd)
    for window in range(n_windows):
        embedding += states.get(top, window).reshape(-1, model.n_embd).square().sum(dim=0, dtype=torch.float64).numpy()
    return sums, embedding * model.embedding_scale**2


def _forward_window(
    model: BlockModel, block: nn.Module, positions: Positions, states: HiddenStates, slots: tuple[int, int], window: int
) -> Recorder:
    recorder = Recorder()
    forward_window(model, block, positions, states, slots, window, recorder)
    return recorder


def _backward_window(
    model: BlockModel, block: nn.Module, positions: Positions, states: HiddenStates, slots: tuple[int, int], window: int
) -> Recorder:
    recorder = Recorder()
    backward_window(model, block, positions, states, slots, window, recorder)
    return recorder


def forward_window(
    model: BlockModel,
    block: nn.Module,
    positions: Positions,
    states: HiddenStates,
    slots: tuple[int, int],
    window: int,
    watch: Watch,
) -> None:
    """One window through an open block, from the first slot to the second."""
    source, target = slots
    model.tap.recorder = watch
    with torch.no_grad():  # grad mode is per thread
        states.put(target, window, _first(block(states.get(source, window), **positions)))
    model.tap.recorder = None


def backward_window(
    model: BlockModel,
    block: nn.Module,
    positions: Positions,
    states: HiddenStates,
    slots: tuple[int, int],
    window: int,
    watch: Watch,
) -> None:
    """One window's gradient back through an open block: its input is in the first slot, the gradient in the second."""
    source, upstream = slots
    x = states.get(source, window).requires_grad_()
    model.tap.recorder = watch
    y = _first(block(x, **positions))
    model.tap.recorder = None
    (g,) = torch.autograd.grad(y, x, states.get(upstream, window))
    states.put(upstream, window, g)


def token_parts(n_tokens: int, n_vocab: int) -> Iterator[slice]:
    """Stretches of a window whose logits have at most :data:`LOGITS_AT_ONCE` numbers, one token at least."""
    size = max(1, LOGITS_AT_ONCE // n_vocab)
    return (slice(start, min(start + size, n_tokens)) for start in range(0, n_tokens, size))


def _sampled_gradient(logits: Tensor, generator: torch.Generator) -> Tensor:
    """d log p(y) / d logits with y ~ p for each token: [n_tokens, n_vocab]."""
    p = torch.softmax(logits, dim=-1)
    labels = torch.multinomial(p, 1, generator=generator)
    return p.neg_().scatter_add_(1, labels, torch.ones_like(labels, dtype=p.dtype))


def _first(output: Tensor | tuple[Tensor, ...]) -> Tensor:
    return output[0] if isinstance(output, tuple) else output
