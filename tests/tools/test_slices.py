"""Clusters against planted groups and against every partition; the router against lengths that are linear."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
import torch

from mopeq_edge.progress import SilentProgress
from tools.slices import LOGIT_STD, coactive_neurons, ffn_states, fit_router, slice_norms

from .dense_models import random_llama


def test_neurons_that_are_active_together_are_found_whatever_their_order() -> None:
    """Each token has one of four groups of 8 neurons active: a quarter of them, with any sign."""
    random = np.random.default_rng(0)
    group_of = random.permutation(np.repeat(np.arange(4), 8))
    large = group_of[None] == random.integers(4, size=(200, 1))
    values = random.uniform(0.5, 1.0, (200, 32)) * np.where(large, 10, 1) * random.choice([-1, 1], (200, 32))
    for seed in range(5):
        found = coactive_neurons(torch.tensor(values), 4, seed).reshape(4, 8)
        expected = {tuple(np.flatnonzero(group_of == group)) for group in range(4)}
        assert {tuple(group.tolist()) for group in found} == expected


def test_the_clusters_of_few_neurons_are_the_best_of_every_partition() -> None:
    """Two noisy groups; some start among a few finds the least squared distance to the group means."""
    random = np.random.default_rng(1)
    values = random.random((60, 8)) + np.where(np.arange(60)[:, None] % 2 == (np.arange(8) < 4)[None], 0.6, 0)
    active = values >= np.sort(values, axis=1)[:, -2:-1]

    def distance(groups: list[list[int]]) -> float:
        return sum(float(active[:, group].var(axis=1).sum()) * len(group) for group in groups)

    best = min(distance([list(group), [n for n in range(8) if n not in group]]) for group in combinations(range(8), 4))
    found = [coactive_neurons(torch.tensor(values), 2, seed).reshape(2, 4).tolist() for seed in range(4)]
    assert min(map(distance, found)) == pytest.approx(best)
    assert all(sorted(groups[0] + groups[1]) == list(range(8)) for groups in found)


def test_neurons_without_any_difference_still_make_groups_of_equal_size() -> None:
    found = coactive_neurons(torch.zeros(10, 12), 3, seed=0)
    assert sorted(found.tolist()) == list(range(12))


def test_slice_norms_are_those_of_the_outputs() -> None:
    torch.manual_seed(0)
    activations, down = torch.randn(5, 6), torch.randn(4, 6)
    found = slice_norms(activations, down, torch.tensor([[0, 3, 4], [1, 2, 5]]))
    for token in range(5):
        first = sum(activations[token, n] * down[:, n] for n in (0, 3, 4))
        second = sum(activations[token, n] * down[:, n] for n in (1, 2, 5))
        torch.testing.assert_close(found[token], torch.stack([first.norm(), second.norm()]))


def test_the_router_orders_slices_as_their_lengths_do() -> None:
    """Lengths are linear in the input but for what all slices of a token share, which no router needs to know."""
    torch.manual_seed(0)
    inputs, true = torch.randn(400, 12), torch.randn(5, 12)
    shared = 20 + 5 * torch.rand(400, 1)
    router = fit_router(inputs, inputs @ true.T + shared)
    logits = inputs @ router.T
    right = (logits.topk(2).indices.sort().values == (inputs @ true.T).topk(2).indices.sort().values).all(1)
    assert right.float().mean() > 0.97
    within = logits - logits.mean(1, keepdim=True)
    assert within.square().mean().sqrt().item() == pytest.approx(LOGIT_STD, rel=1e-4)


def test_a_token_of_very_long_outputs_does_not_decide_alone() -> None:
    """One token in a hundred is a thousand times longer and ordered the other way round."""
    torch.manual_seed(0)
    inputs, true = torch.randn(400, 4), torch.randn(3, 4)
    lengths = 10 + inputs @ true.T
    odd = torch.arange(400) % 100 == 0
    lengths[odd] = 1000 * (10 - inputs[odd] @ true.T)
    logits = inputs @ fit_router(inputs, lengths).T
    right = logits.argmax(1) == (inputs @ true.T).argmax(1)
    assert right[~odd].float().mean() > 0.95


def test_lengths_that_are_all_equal_give_a_router_of_zeros() -> None:
    assert not fit_router(torch.randn(20, 4), torch.zeros(20, 3)).any()


def test_the_states_of_every_layer_are_those_of_the_whole_model() -> None:
    """The inputs of the MLPs inside a run of the whole model, and SwiGLU of them by its definition."""
    model = random_llama(vocab=50, layers=3)
    windows = torch.randint(50, (6, 8), generator=torch.Generator().manual_seed(0))
    expected: list[torch.Tensor] = []
    hooks = [
        layer.mlp.register_forward_pre_hook(lambda _, args: expected.append(args[0].reshape(48, 48)))
        for layer in model.model.layers
    ]
    with torch.no_grad():
        model(windows)
    for hook in hooks:
        hook.remove()
    found = list(ffn_states(model, windows, SilentProgress()))
    assert len(found) == len(expected) == 3
    for layer, states, inputs in zip(model.model.layers, found, expected, strict=True):
        torch.testing.assert_close(states.inputs, inputs)
        gate, up = inputs @ layer.mlp.gate_proj.weight.T, inputs @ layer.mlp.up_proj.weight.T
        torch.testing.assert_close(states.activations, gate / (1 + torch.exp(-gate)) * up)
