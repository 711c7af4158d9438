"""Which neurons of a dense FFN make an expert, and the router that chooses among the experts.

A slice is a set of neurons; the dense FFN's output is the sum over its slices. To leave slices out, neurons that are
active for the same tokens should share one, and the router should foresee which slices' outputs are long.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment

from mopeq_edge.progress import Progress

ACTIVE = 0.25
"""Share of a token's neurons, those of largest |activation|, that count as active."""
ROUNDS = 20
"""Most rounds of k-means."""
RIDGE = 1e-3
"""Ridge of the router's fit, as a share of the mean square of an input."""
LOGIT_STD = 0.01
"""Standard deviation of the router logits within a token: small, so that the chosen get almost equal weights."""
BATCH = 4
"""Windows that a block computes at once."""


@dataclass(frozen=True)
class Slicing:
    """The slices and the router of one layer."""

    neurons: torch.Tensor
    """Neurons of each slice, ascending: int64 [n_slice, ff / n_slice]."""
    router: torch.Tensor
    """float32 [n_slice, hidden]; slices of the largest logits are used."""


@dataclass(frozen=True)
class FfnStates:
    """What one FFN of the dense model saw and made, float32."""

    inputs: torch.Tensor
    """Normed hidden states [n_token, hidden]."""
    activations: torch.Tensor
    """silu(gate) · up [n_token, ff]."""


def contiguous_slicing(ff: int, n_slice: int, hidden: int) -> Slicing:
    """Neighbouring neurons; the logits are all equal, so this is for using all slices."""
    return Slicing(torch.arange(ff).reshape(n_slice, -1), torch.zeros(n_slice, hidden))


def fitted_slicing(states: FfnStates, down: torch.Tensor, n_slice: int, *, clustered: bool, seed: int) -> Slicing:
    """Slices, clustered by co-activation or contiguous, and a router for using fewer than all.

    ``down`` is [hidden, ff].
    """
    ff = down.shape[1]
    neurons = coactive_neurons(states.activations, n_slice, seed) if clustered else torch.arange(ff)
    neurons = neurons.reshape(n_slice, -1)
    lengths = slice_norms(states.activations, down, neurons)
    return Slicing(neurons, fit_router(states.inputs, lengths))


@torch.no_grad()
def ffn_states(model: Any, windows: torch.Tensor, progress: Progress) -> Iterator[FfnStates]:
    """States of every layer of a LlamaForCausalLM on token ids [n_window, window], one layer at a time.

    Only the states between two layers are kept, so memory does not grow with the number of layers.
    """
    core = model.model
    hidden = core.embed_tokens(windows)
    rope = core.rotary_emb(hidden, torch.arange(windows.shape[1]).unsqueeze(0))
    with progress.step("calibrate", len(core.layers)) as step:
        for layer in core.layers:
            inputs: list[torch.Tensor] = []
            activations: list[torch.Tensor] = []
            hooks = [
                module.register_forward_pre_hook(lambda _, args, into=into: into.append(args[0].flatten(0, -2)))
                for module, into in ((layer.mlp, inputs), (layer.mlp.down_proj, activations))
            ]
            # Without a mask the attention is causal
            hidden = torch.cat([layer(part, position_embeddings=rope) for part in hidden.split(BATCH)])
            for hook in hooks:
                hook.remove()
            yield FfnStates(torch.cat(inputs), torch.cat(activations))
            step.advance()


def coactive_neurons(activations: torch.Tensor, n_slice: int, seed: int) -> torch.Tensor:
    """Neurons grouped by balanced k-means of which tokens they are active for, int64 [ff].

    The first ff / n_slice neurons are a group, and so on; ascending in a group. ``activations`` is [n_token, ff]. A
    neuron is the 0/1 vector of the tokens for which it is among the :data:`ACTIVE` largest. Each round assigns the
    neurons to the group means in equal numbers at the least squared distance (the assignment problem, solved
    exactly), until nothing changes. Neurons that most tokens need end up together: their slice is nearly always used.
    """
    ff = activations.shape[1]
    size = ff // n_slice
    threshold = activations.abs().kthvalue(ff - round(ACTIVE * ff), dim=1, keepdim=True).values
    active = (activations.abs() > threshold).float()
    # All distances follow from how often two neurons are active together; whole numbers, exact in float32
    together = (active.T @ active).double().numpy()
    groups = _spread_neurons(together, n_slice, np.random.default_rng(seed))[:, None]
    for _ in range(ROUNDS):
        means = np.stack([together[:, group].mean(1) for group in groups], axis=1)
        squares = [together[np.ix_(group, group)].mean() for group in groups]
        distance = np.array(squares) - 2 * means
        place = linear_sum_assignment(np.repeat(distance, size, axis=1))[1] // size
        found = np.stack([np.flatnonzero(place == number) for number in range(n_slice)])
        if np.array_equal(found, groups):
            break
        groups = found
    return torch.from_numpy(groups.reshape(-1))


def _spread_neurons(together: Any, n: int, random: np.random.Generator) -> Any:
    """``n`` neurons far from each other to begin with, as in k-means++: drawn by squared distance to those drawn."""
    often = np.diagonal(together)
    chosen = [int(random.integers(len(often)))]
    nearest = np.full(len(often), np.inf)
    while len(chosen) < n:
        last = chosen[-1]
        nearest = np.minimum(nearest, often + often[last] - 2 * together[:, last])
        # Neurons that are all alike have no distance to draw by
        weights = nearest if nearest.any() else np.isin(np.arange(len(often)), chosen, invert=True).astype(float)
        chosen.append(int(random.choice(len(often), p=weights / weights.sum())))
    return np.array(chosen)


def slice_norms(activations: torch.Tensor, down: torch.Tensor, neurons: torch.Tensor) -> torch.Tensor:
    """Length of each slice's output, [n_token, n_slice]; ``neurons`` is [n_slice, ff / n_slice]."""
    return torch.stack([(activations[:, group] @ down[:, group].T).norm(dim=1) for group in neurons], dim=1)


def fit_router(inputs: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Router [n_slice, hidden] whose logits order the slices of a token like ``lengths`` [n_token, n_slice].

    Ridge regression without bias, which Mixtral's router has not. Only the order within a token counts, so what is
    fitted is the difference to the token's mean; and a token weighs by one over that mean squared, so that the few
    tokens of very long outputs do not decide alone.
    """
    mean = lengths.mean(dim=1, keepdim=True)
    weight = torch.where(mean > 0, 1 / mean, 0.0)
    x, y = (inputs * weight).double(), ((lengths - mean) * weight).double()
    gram = x.T @ x
    gram += (RIDGE * float(gram.diagonal().mean()) or 1.0) * torch.eye(len(gram), dtype=gram.dtype)
    router = torch.linalg.solve(gram, x.T @ y).T
    logits = inputs.double() @ router.T
    spread = float((logits - logits.mean(dim=1, keepdim=True)).square().mean().sqrt())
    scaled: torch.Tensor = router * (LOGIT_STD / spread if spread > 0 else 0.0)
    return scaled.float()
