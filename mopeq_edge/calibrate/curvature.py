"""Curvature of the calibration loss along random directions, streamed: one sample of every expert's trace at once.

The loss L is the cross-entropy of the next token, mean per predicted token, in nats. For a probe v and steps eps_e (see
``directions``) the product of the Hessian H with u = (eps_e v_e) is half the difference of the gradients at W + u and
W - u, and v_e . (H u)_e / eps_e has the mean tr(H_ee): other experts' v are independent of v_e. A pass needs the
memory of one block and one byte a weight for its probe; the error of the difference is O(STEP^2).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from mopeq_edge.binding import Tokens
from mopeq_edge.calibrate.blocks import BlockModel
from mopeq_edge.calibrate.directions import Chooser, Direction, HeldRouting, Slopes
from mopeq_edge.calibrate.passes import Positions, backward_window, each_window, forward_window, token_parts
from mopeq_edge.calibrate.states import HiddenStates
from mopeq_edge.calibrate.statistics import Doubles
from mopeq_edge.progress import Step


@dataclass(frozen=True)
class Run:
    """A model and its windows [n_windows, n_ctx], with ``states`` of n_layer + 1 slots: what every pass needs."""

    model: BlockModel
    windows: Tokens
    states: HiddenStates
    threads: int
    step: Step

    @property
    def n_windows(self) -> int:
        return int(self.windows.shape[0])

    @property
    def n_predicted(self) -> int:
        """Tokens that have one before them in their window."""
        return int(self.n_windows * (self.windows.shape[1] - 1))

    @property
    def top(self) -> int:
        """The slot of the final norm's input, and then of the gradient."""
        return self.model.n_layer


@dataclass(frozen=True)
class Choices:
    """The unmoved model's routing: ``index[layer, window]`` int16 [n_ctx, k], ``counts[layer]`` [n_expert] tokens.

    ``loss`` is the model's own, in nats per predicted token.
    """

    index: Mapping[tuple[int, int], Tensor]
    counts: Mapping[int, Doubles]
    loss: float


def record_choices(run: Run) -> Choices:
    """One forward pass; leaves the embeddings in slot 0 of the states."""
    index: dict[tuple[int, int], Tensor] = {}
    counts: dict[int, Doubles] = {}
    for window in range(run.n_windows):
        run.states.put(0, window, run.model.embed(run.windows[window]))
    for layer in range(run.top):
        positions = run.model.positions(run.windows.shape[1], layer)

        def note(block: nn.Module, positions: Positions, layer: int, window: int) -> Chooser:
            chooser = Chooser()
            forward_window(run.model, block, positions, run.states, (layer, layer + 1), window, chooser)
            return chooser

        with run.model.block(layer) as block:
            work = partial(note, block, positions, layer)
            for window, chooser in enumerate(each_window(work, run.n_windows, run.threads, run.step)):
                if chooser.index is not None:  # a dense layer has no router
                    index[layer, window] = chooser.index
                    tokens = np.bincount(chooser.index.numpy().reshape(-1), minlength=chooser.n_expert)
                    counts[layer] = counts.get(layer, 0.0) + tokens.astype(np.float64)
    return Choices(index, counts, loss_gradient(run))


def curvature(run: Run, choices: Choices, *, seed: int, probe: int) -> dict[str, Doubles]:
    """v_e . (H u)_e / eps_e by stack [n_expert], in nats per token and squared weight.

    The same ``seed`` and ``probe`` give the same bits, whatever the number of threads. Experts that no token reaches
    have 0.
    """
    ahead, behind = Direction(seed, probe, 1), Direction(seed, probe, -1)
    plus, minus = (_slopes(run, choices, direction) for direction in (ahead, behind))
    return {name: (plus[name] - minus[name]) / (2 * ahead.eps[name]) for name in plus}


def _slopes(run: Run, choices: Choices, direction: Direction) -> dict[str, Doubles]:
    """v_e . dL/dW_e [n_expert] by stack, at the weights moved by ``direction``."""
    n_ctx = run.windows.shape[1]
    found: dict[str, Doubles] = {}

    def one(
        pass_over: Callable[..., None], block: nn.Module, layer: int, slots: tuple[int, int], window: int
    ) -> Slopes:
        held = choices.index.get((layer, window), torch.empty(n_ctx, 0)).long()
        slopes = Slopes(held, direction.open)
        positions = run.model.positions(n_ctx, layer)
        with HeldRouting(held, len(choices.counts.get(layer, ()))):
            pass_over(run.model, block, positions, run.states, slots, window, slopes)
        return slopes

    def through(layer: int, pass_over: Callable[..., None], slots: tuple[int, int]) -> None:
        direction.open.clear()
        with run.model.block(layer, direction.move) as block:
            for name, v in direction.open.items():
                found.setdefault(name, np.zeros(len(v)))
            work = partial(one, pass_over, block, layer, slots)
            for slopes in each_window(work, run.n_windows, run.threads, run.step):
                for name, values in slopes.values.items():
                    found[name] += values

    for layer in range(run.top):
        through(layer, forward_window, (layer, layer + 1))
    loss_gradient(run)
    for layer in reversed(range(run.top)):
        through(layer, backward_window, (layer, run.top))
    return found


def loss_gradient(run: Run) -> float:
    """Turn the top slot, the final norm's input, into the gradient of the loss there. Returns the loss in nats."""
    matrix = run.model.output_matrix()
    with run.model.final_norm() as norm:

        def one(window: int) -> float:
            h = run.states.get(run.top, window).requires_grad_()
            x = norm(h).reshape(-1, run.model.n_embd)
            # the last token of a window predicts nothing that is known
            labels = torch.from_numpy(run.windows[window, 1:]).long()[:, None]
            loss, g = 0.0, torch.zeros_like(x)
            for part in token_parts(len(labels), run.model.n_vocab):
                log_p = torch.log_softmax((x.detach()[part] @ matrix.T).mul_(run.model.logits_scale), dim=-1)
                loss -= float(log_p.gather(1, labels[part]).sum(dtype=torch.float64))
                g[part] = _minus_label(log_p.exp_(), labels[part]) @ matrix * run.model.logits_scale / run.n_predicted
            (upstream,) = torch.autograd.grad(x, h, g)
            run.states.put(run.top, window, upstream)
            return loss

        return sum(each_window(one, run.n_windows, run.threads, run.step), 0.0) / run.n_predicted


def _minus_label(p: Tensor, labels: Tensor) -> Tensor:
    """p - onehot(labels), in place."""
    return p.scatter_add_(1, labels, torch.full_like(labels, -1, dtype=p.dtype))
