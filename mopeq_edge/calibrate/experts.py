"""The routed experts of one block as a torch module that tells what goes through each expert."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from mopeq_edge.calibrate.statistics import TEXT, Doubles, Sums


class Watch(Protocol):
    """What the matrices of a block report to, one window of text at a time."""

    def route(self, index: Tensor, weights: Tensor, n_expert: int) -> tuple[Tensor, Tensor]:
        """The router chose ``index`` with gate ``weights`` [n_tokens, k]; returns what shall be used."""

    def saw_input(
        self, name: str, x: Tensor, matrix: int = 0, n_matrices: int = 1, *, tokens: Tensor | None = None
    ) -> None:
        """``x`` [n_tokens, n_in] goes into one matrix of the GGUF tensor ``name``.

        ``tokens`` says which of the window's tokens the rows are; all of them without.
        """

    def watch_output(
        self,
        name: str,
        x: Tensor,
        y: Tensor,
        matrix: int = 0,
        n_matrices: int = 1,
        *,
        transposed: bool = False,
        tokens: Tensor | None = None,
    ) -> None:
        """``x`` made ``y`` [n_tokens, n_out], which a gradient may reach later; ``transposed``: by the transpose."""


class HookedOutputs:
    """Waits for gradients by hooks on outputs."""

    def watch_output(
        self,
        name: str,
        x: Tensor,
        y: Tensor,
        matrix: int = 0,
        n_matrices: int = 1,
        *,
        transposed: bool = False,
        tokens: Tensor | None = None,
    ) -> None:
        """When the gradient g [n_tokens, n_out] reaches ``y``, add sum_t |g_t|^2 x_tj^2.

        A gradient of the weight is g_t x_t^T; where the GGUF has the transpose, its columns are those of g, so the two
        change places: sum_t |x_t|^2 g_tj^2.
        """
        if not y.requires_grad:
            return
        x = x.detach()

        def saw(g: Tensor) -> None:
            g = g.reshape(len(x), -1)
            self.saw_gradient(name, *((g, x) if transposed else (x, g)), matrix, n_matrices, tokens=tokens)

        y.register_hook(saw)  # type: ignore[no-untyped-call]

    def saw_gradient(
        self, name: str, x: Tensor, g: Tensor, matrix: int = 0, n_matrices: int = 1, *, tokens: Tensor | None = None
    ) -> None:
        """``x`` [n_tokens, n_in] made an output that got the gradient ``g``, n_out numbers a token."""
        raise NotImplementedError


@dataclass
class Recorder(HookedOutputs):
    """Statistics of one window of text through one block."""

    activation: Sums = field(default_factory=Sums)
    gradient: Sums = field(default_factory=Sums)
    gate_weights: Doubles | None = None

    def by_kind(self) -> Mapping[str, Recorder]:
        """What was counted of each kind of tokens: all are text."""
        return {TEXT: self}

    def route(self, index: Tensor, weights: Tensor, n_expert: int) -> tuple[Tensor, Tensor]:
        """Sum the gate weights of each expert; the router's choice stands."""
        sums = torch.zeros(n_expert, dtype=torch.float64)
        sums.index_add_(0, index.reshape(-1), weights.detach().reshape(-1).to(torch.float64))
        self.gate_weights = np.asarray(sums.numpy())
        return index, weights

    def saw_input(
        self, name: str, x: Tensor, matrix: int = 0, n_matrices: int = 1, *, tokens: Tensor | None = None
    ) -> None:
        """``x`` [n_tokens, n_in] goes into one matrix of the GGUF tensor ``name``."""
        squares = x.detach().square().sum(dim=0, dtype=torch.float64).numpy()
        self.activation.add(name, n_matrices, matrix, squares, x.shape[0])

    def saw_gradient(
        self, name: str, x: Tensor, g: Tensor, matrix: int = 0, n_matrices: int = 1, *, tokens: Tensor | None = None
    ) -> None:
        """``x`` [n_tokens, n_in] made an output that got the gradient ``g``, n_out numbers a token."""
        weights = g.reshape(len(x), -1).square().sum(dim=1, dtype=torch.float64)
        squares = weights @ x.detach().square().to(torch.float64)
        self.gradient.add(name, n_matrices, matrix, squares.numpy(), x.shape[0])


class Tap:
    """Who watches the running thread; None while nothing is measured."""

    def __init__(self) -> None:
        self._local = threading.local()

    @property
    def recorder(self) -> Watch | None:
        found: Watch | None = getattr(self._local, "recorder", None)
        return found

    @recorder.setter
    def recorder(self, value: Watch | None) -> None:
        self._local.recorder = value


@dataclass(frozen=True)
class ExpertWeights:
    """One layer's experts: gate, up [n_expert, n_ff, n_embd], down [n_expert, n_embd, n_ff].

    In float32, or in the checkpoint's smaller type: then each expert becomes float32 only while it computes.
    ``biases`` are the projections' [n_expert, n_out], where they have any.
    """

    layer: int
    gate: Tensor
    up: Tensor
    down: Tensor
    biases: Mapping[str, Tensor] = field(default_factory=dict)


def gated_by(activation: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """``activation(gate) * up``, what most families compute."""
    return lambda gate, up: activation(gate) * up


class RoutedExperts(nn.Module):
    """Stands in for transformers' packed experts: same call, one expert after the other, recorded.

    ``forward(hidden_states [n_tokens, n_embd], top_k_index, top_k_weights [n_tokens, k])``; ``gated(gate, up)`` is
    what goes into down.
    """

    def __init__(self, weights: ExpertWeights, gated: Callable[[Tensor, Tensor], Tensor], tap: Tap) -> None:
        super().__init__()
        self.weights, self.gated, self.tap = weights, gated, tap

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        w, recorder = self.weights, self.tap.recorder
        n_expert = w.gate.shape[0]
        output = torch.zeros_like(hidden_states)
        if recorder is not None:
            top_k_index, top_k_weights = recorder.route(top_k_index, top_k_weights, n_expert)
        for expert in range(n_expert):
            token, slot = torch.where(top_k_index == expert)
            if not len(token):
                continue
            x = hidden_states[token]
            gate = _linear(x, w.gate[expert])
            up = _linear(x, w.up[expert])
            inner = self.gated(self._biased("gate", gate, expert), self._biased("up", up, expert))
            down = _linear(inner, w.down[expert])
            if recorder is not None:
                for projection, into, out in (("gate", x, gate), ("up", x, up), ("down", inner, down)):
                    name = f"blk.{w.layer}.ffn_{projection}_exps.weight"
                    recorder.saw_input(name, into, expert, n_expert, tokens=token)
                    recorder.watch_output(name, into, out, expert, n_expert, tokens=token)
            weighted = self._biased("down", down, expert) * top_k_weights[token, slot, None]
            output = output.index_add(0, token, weighted)
        return output

    def _biased(self, projection: str, product: Tensor, expert: int) -> Tensor:
        bias = self.weights.biases.get(projection)
        return product if bias is None else product + bias[expert].to(product.dtype)


class _Linear(torch.autograd.Function):
    """x W^T with W in any type: the graph keeps W as it is, where torch's own would keep a float32 copy."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return nn.functional.linear(x, weight.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None]:
        (weight,) = ctx.saved_tensors
        (g,) = upstream
        return g @ weight.to(g.dtype), None


def _linear(x: Tensor, weight: Tensor) -> Tensor:
    y: Tensor = _Linear.apply(x, weight)  # type: ignore[no-untyped-call]
    return y
