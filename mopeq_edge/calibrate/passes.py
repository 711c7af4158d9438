"""The two streamed passes: forward through the blocks, and backward with recomputation.

Windows run side by side in threads, each with one torch thread; what they measured is added in window order. So the
result does not depend on the number of threads. A window has its own length: nothing is padded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from mopeq_edge.calibrate.blocks import BlockModel
from mopeq_edge.calibrate.experts import Recorder, Watch
from mopeq_edge.calibrate.kinds import KindsRecorder, recorder_of
from mopeq_edge.calibrate.states import HiddenStates
from mopeq_edge.calibrate.statistics import Doubles, Tallies, new_tallies
from mopeq_edge.calibrate.windows import Window
from mopeq_edge.progress import Progress, Step

Positions = dict[str, Any]
T = TypeVar("T")

FORWARD_TOKENS, BACKWARD_TOKENS = 2048, 512
"""Tokens of windows that go through a block together, at the most (one window at least): so each expert gets more of
them at a time. Backward every product is kept until its gradient comes."""

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


def each_window(
    work: Callable[[int], T], n_windows: int, threads: int, step: Step, size: Callable[[int], int] = lambda window: 1
) -> Iterator[T]:
    """``work(window)`` for all windows, results in window order, at most ``2 * threads`` waiting.

    ``size`` says how far each is on the way, where the windows are batches of them.
    """
    with ThreadPoolExecutor(threads) as pool:
        pending = [pool.submit(work, w) for w in range(min(2 * threads, n_windows))]
        try:
            for window in range(n_windows):
                result = pending.pop(0).result()
                following = window + len(pending) + 1
                if following < n_windows:
                    pending.append(pool.submit(work, following))
                step.advance(size(window))
                yield result
        finally:
            for future in pending:
                future.cancel()


def batches(windows: Sequence[Window], n_tokens: int) -> list[range]:
    """Numbers of windows that go together: of text, of one length, and of ``n_tokens`` tokens at most; else one."""
    found: list[range] = []
    for number, window in enumerate(windows):
        last = windows[found[-1].start] if found else window
        plain = window.embeddings is None and last.embeddings is None and len(window) == len(last)
        if found and plain and (len(found[-1]) + 1) * len(window) <= n_tokens:
            found[-1] = range(found[-1].start, number + 1)
        else:
            found.append(range(number, number + 1))
    return found


def forward(
    model: BlockModel, windows: Sequence[Window], states: HiddenStates, *, keep: bool, threads: int, progress: Progress
) -> Tallies:
    """Run all windows through all blocks, one block at a time.

    With ``keep`` slot i of ``states`` ends as the input of block i (slot n_layer: of the final norm), else slot 0 is
    overwritten. Returns the activation sums, and each expert's sum of gate weights.
    """
    found = new_tallies()
    together = batches(windows, FORWARD_TOKENS)
    for number, window in enumerate(windows):
        states.put(0, number, embedded(model, window))
    with progress.step("calibrate: forward", model.n_layer * len(windows), "windows") as step:
        for layer in range(model.n_layer):
            slots = (layer, layer + 1) if keep else (0, 0)
            positions = _positions(model, windows, layer)
            with model.block(layer) as block:
                run = partial(_batch, forward_window, model, block, positions, windows, states, slots, together)
                for recorder in each_window(run, len(together), threads, step, lambda n: len(together[n])):
                    for kind, own in recorder.by_kind().items():
                        found[kind].activation.merge(own.activation)
                        if own.gate_weights is not None:
                            found[kind].add_gate_weights(layer, own.gate_weights)
    return found


def embedded(model: BlockModel, window: Window) -> Tensor:
    """What block 0 reads [n_tokens, n_embd]: rows of the token embedding, and what pictures became as it is."""
    if window.embeddings is None:
        return model.embed(window.tokens)
    seen = window.seen
    rows = torch.empty(len(window), model.n_embd)
    rows[torch.from_numpy(~seen)] = model.embed(window.tokens[~seen])
    rows[torch.from_numpy(seen)] = torch.from_numpy(window.embeddings())
    return rows


def _positions(model: BlockModel, windows: Sequence[Window], layer: int) -> dict[int, Positions]:
    """For every length of a window what block ``layer`` takes."""
    return {n: model.positions(n, layer) for n in {len(window) for window in windows}}


def output_sums(
    model: BlockModel,
    windows: Sequence[Window],
    states: HiddenStates,
    slot: int,
    *,
    seed: int | None,
    threads: int,
    progress: Progress,
) -> Tallies:
    """Through the final norm to the logits, where text is predicted. Activation and gradient sums of the output matrix.

    With ``seed`` the labels are drawn from the model's own distribution and slot ``slot`` becomes the gradient of the
    log-likelihood at the final norm's input; without it only activations are summed.
    """
    name = model.output_name
    matrix = model.output_matrix()
    found = new_tallies()
    with progress.step("calibrate: output", len(windows), "windows") as step, model.final_norm() as norm:

        def run(number: int) -> Recorder | KindsRecorder:
            window = windows[number]
            recorder = recorder_of(window)
            tokens = torch.from_numpy(window.predicts_text.nonzero()[0])
            h = states.get(slot, number).requires_grad_(seed is not None)
            x = norm(h).reshape(-1, model.n_embd)[tokens]
            recorder.saw_input(name, x, tokens=tokens)
            if seed is not None:
                generator = torch.Generator().manual_seed(seed + number)
                below = torch.empty_like(x)
                for part in token_parts(len(x), model.n_vocab):
                    logits = (x.detach()[part] @ matrix.T).mul_(model.logits_scale)
                    g = _sampled_gradient(logits, generator).mul_(model.logits_scale)
                    recorder.saw_gradient(name, x[part], g, tokens=tokens[part])
                    below[part] = g @ matrix
                (upstream,) = torch.autograd.grad(x, h, below)
                states.put(slot, number, upstream)
            return recorder

        for recorder in each_window(run, len(windows), threads, step):
            for kind, own in recorder.by_kind().items():
                found[kind].activation.merge(own.activation)
                found[kind].gradient.merge(own.gradient)
    return found


def backward(
    model: BlockModel, windows: Sequence[Window], states: HiddenStates, *, threads: int, progress: Progress
) -> tuple[Tallies, Doubles]:
    """Gradients through all blocks from last to first; slot n_layer holds the gradient to start from.

    Each block is run again from its kept input. Returns the gradient sums of all matrices and, for the rows of the
    token embedding before they are scaled, sum_t g_tj^2 [n_embd] over the tokens of text: pictures look none up.
    """
    found = new_tallies()
    together = batches(windows, BACKWARD_TOKENS)
    top = model.n_layer
    with progress.step("calibrate: backward", model.n_layer * len(windows), "windows") as step:
        for layer in reversed(range(model.n_layer)):
            positions = _positions(model, windows, layer)
            with model.block(layer) as block:
                run = partial(_batch, backward_window, model, block, positions, windows, states, (layer, top), together)
                for recorder in each_window(run, len(together), threads, step, lambda n: len(together[n])):
                    for kind, own in recorder.by_kind().items():
                        found[kind].gradient.merge(own.gradient)
    embedding = np.zeros(model.n_embd)
    for number, window in enumerate(windows):
        g = states.get(top, number).reshape(-1, model.n_embd)[torch.from_numpy(~window.seen)]
        embedding += g.square().sum(dim=0, dtype=torch.float64).numpy()
    return found, embedding * model.embedding_scale**2


def _batch(
    work: Callable[..., None],
    model: BlockModel,
    block: nn.Module,
    positions: dict[int, Positions],
    windows: Sequence[Window],
    states: HiddenStates,
    slots: tuple[int, int],
    together: Sequence[range],
    number: int,
) -> Recorder | KindsRecorder:
    """``work``, :func:`forward_window` or :func:`backward_window`, on one batch of windows."""
    batch = together[number]
    window = windows[batch.start]
    recorder = recorder_of(window)
    work(model, block, positions[len(window)], states, slots, batch.start, recorder, len(batch))
    return recorder


def forward_window(
    model: BlockModel,
    block: nn.Module,
    positions: Positions,
    states: HiddenStates,
    slots: tuple[int, int],
    window: int,
    watch: Watch,
    n: int = 1,
) -> None:
    """One window, or ``n`` of the same length, through an open block, from the first slot to the second."""
    source, target = slots
    model.tap.recorder = watch
    with torch.no_grad():  # grad mode is per thread
        states.put(target, window, _first(block(states.get(source, window, n), **positions)))
    model.tap.recorder = None


def backward_window(
    model: BlockModel,
    block: nn.Module,
    positions: Positions,
    states: HiddenStates,
    slots: tuple[int, int],
    window: int,
    watch: Watch,
    n: int = 1,
) -> None:
    """A window's gradient, or those of ``n`` of the same length, back through an open block.

    Its input is in the first slot, the gradient in the second.
    """
    source, upstream = slots
    x = states.get(source, window, n).requires_grad_()
    model.tap.recorder = watch
    y = _first(block(x, **positions))
    model.tap.recorder = None
    (g,) = torch.autograd.grad(y, x, states.get(upstream, window, n))
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
