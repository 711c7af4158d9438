"""A random direction for the experts' weights, and what a block reports when its weights move along it.

The direction of a stack is eps v with v = +1 or -1 for each weight and ``eps`` :data:`STEP` times the root mean square
of the stack's weights: large against float32's rounding, small against the weights (see the tests).

Routing is held while weights move: a router's choice of experts jumps, and a derivative does not see jumps.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from mopeq_edge.calibrate.hutchinson import probe_generator, rademacher
from mopeq_edge.calibrate.statistics import Doubles
from mopeq_edge.errors import CalibrationError

STEP = 5e-3
"""``eps`` over the root mean square of a stack's weights."""


@dataclass
class Direction:
    """One direction for all stacks: drawn again whenever a block is opened, the same each time.

    ``sign`` is +1 or -1. ``eps`` keeps each stack's step, in the unit of its weights; ``open`` has v
    of the open block's stacks, int8 [n_expert, n_out, n_in].
    """

    seed: int
    probe: int
    sign: int
    eps: dict[str, float] = field(default_factory=dict)
    open: dict[str, Tensor] = field(default_factory=dict)

    def move(self, name: str, stack: Tensor) -> None:
        """Add sign * eps * v to the float32 ``stack`` [n_expert, n_out, n_in] in place, and keep v open."""
        if name not in self.eps:
            rms = float(torch.linalg.vector_norm(stack)) / stack.numel() ** 0.5
            self.eps[name] = STEP * (rms if rms > 0 else 1.0)
        v = torch.empty(stack.shape, dtype=torch.int8)
        for expert in range(len(stack)):
            generator = probe_generator(self.seed, self.probe, f"{name}[{expert}]")
            v[expert] = rademacher(tuple(stack.shape[1:]), generator)
            stack[expert].add_(v[expert].to(stack.dtype), alpha=self.sign * self.eps[name])
        self.open[name] = v


@dataclass
class Chooser:
    """Notes the router's choice [n_tokens, k] in one window and block."""

    index: Tensor | None = None
    n_expert: int = 0

    def route(self, index: Tensor, weights: Tensor, n_expert: int) -> tuple[Tensor, Tensor]:
        """Keep the choice."""
        self.index, self.n_expert = index.to(torch.int16), n_expert
        return index, weights

    def saw_input(
        self, name: str, x: Tensor, matrix: int = 0, n_matrices: int = 1, *, tokens: Tensor | None = None
    ) -> None:
        """Nothing to do."""

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
        """Nothing to do."""


@dataclass
class Slopes:
    """Sums v_e . dL/dW_e over the tokens of one window and block: ``values[name]`` [n_expert].

    dL/dW_e is a sum over tokens, sum_t g_t x_t^T, so its product with v_e is sum_t g_t . (V_e x_t) and the gradient of
    a weight is never held. ``held`` [n_tokens, k] is the routing that :class:`HeldRouting` holds.
    """

    held: Tensor
    probes: Mapping[str, Tensor]
    values: dict[str, Doubles] = field(default_factory=dict)

    def route(self, index: Tensor, weights: Tensor, n_expert: int) -> tuple[Tensor, Tensor]:
        """Raise :class:`CalibrationError` for a router that does not let its choice be held."""
        if not torch.equal(index, self.held):
            raise CalibrationError(
                "the router's choice of experts cannot be held: expected a router that chooses by topk; "
                "--trace cannot be measured for this architecture, leave it out"
            )
        return index, weights

    def saw_input(
        self, name: str, x: Tensor, matrix: int = 0, n_matrices: int = 1, *, tokens: Tensor | None = None
    ) -> None:
        """Nothing to do."""

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
        """When the gradient g [n_tokens, n_out] reaches ``y``, add sum_t g_t . (V x_t)."""
        stack = self.probes.get(name)
        if stack is None or not y.requires_grad:
            return
        v, x = stack[matrix], x.detach()

        def add(g: Tensor) -> None:
            moved = torch.nn.functional.linear(x, v.to(x.dtype))
            found = self.values.setdefault(name, np.zeros(n_matrices))
            found[matrix] += float((g.to(torch.float64) * moved).sum())

        y.register_hook(add)  # type: ignore[no-untyped-call]


class HeldRouting(TorchFunctionMode):
    """While it is open in a thread, ``topk`` of scores [n_tokens, n_expert] gives the values at ``held`` [n_tokens, k]
    instead of the largest ones; of anything else, such as groups of experts, it is as ever.

    So every kind of router computes its gate weights, and their derivatives, for the choice that is held.
    """

    def __init__(self, held: Tensor, n_expert: int) -> None:
        super().__init__()
        self.held, self.scores = held, (len(held), n_expert)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Replace topk, pass everything else through."""
        if func in (torch.topk, Tensor.topk) and tuple(args[0].shape) == self.scores:
            return torch.return_types.topk((args[0].gather(-1, self.held), self.held))
        return func(*args, **(kwargs or {}))
