"""Our stand-in for transformers' packed experts: the same output, and sums that a loop over tokens confirms."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import GptOssConfig, OlmoeConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.olmoe.modeling_olmoe import OlmoeExperts

from converters.gpt_oss import clamped_swiglu
from mopeq_edge.calibrate.experts import ExpertWeights, Recorder, RoutedExperts, Tap, gated_by

N_TOKENS, N_EMBD, N_FF, N_EXPERT, N_USED = 23, 12, 7, 6, 2
UNUSED = 4


def drawn(*shape: int, seed: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def make_theirs(dtype: torch.dtype) -> OlmoeExperts:
    config = OlmoeConfig(hidden_size=N_EMBD, intermediate_size=N_FF, num_experts=N_EXPERT, num_experts_per_tok=N_USED)
    config._experts_implementation = "eager"
    experts = OlmoeExperts(config).to(dtype)
    experts.gate_up_proj.data = drawn(N_EXPERT, 2 * N_FF, N_EMBD, seed=1, dtype=dtype)
    experts.down_proj.data = drawn(N_EXPERT, N_EMBD, N_FF, seed=2, dtype=dtype)
    return experts.requires_grad_(False)


def make_ours(theirs: OlmoeExperts, tap: Tap) -> RoutedExperts:
    packed = theirs.gate_up_proj.data
    weights = ExpertWeights(3, packed[:, :N_FF], packed[:, N_FF:], theirs.down_proj.data)
    return RoutedExperts(weights, gated_by(nn.functional.silu), tap)


def routed(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs, two different experts a token (never the unused one), and weights that do not add up to one."""
    x = drawn(N_TOKENS, N_EMBD, seed=3, dtype=dtype)
    logits = drawn(N_TOKENS, N_EXPERT, seed=4, dtype=dtype)
    logits[:, UNUSED] = -100
    top = torch.softmax(logits, -1).topk(N_USED)
    return x, top.indices, top.values


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-13)])
def test_same_output_as_transformers(dtype: torch.dtype, tolerance: float) -> None:
    theirs = make_theirs(dtype)
    ours = make_ours(theirs, Tap())
    torch.testing.assert_close(ours(*routed(dtype)), theirs(*routed(dtype)), rtol=tolerance, atol=tolerance)


def test_sums_equal_a_loop_over_tokens() -> None:
    theirs = make_theirs(torch.float64)
    tap = Tap()
    tap.recorder = recorder = Recorder()
    x, index, weight = routed(torch.float64)
    upstream = drawn(N_TOKENS, N_EMBD, seed=5, dtype=torch.float64)
    output = make_ours(theirs, tap)(x.clone().requires_grad_(), index, weight)
    output.backward(upstream)

    names = {projection: f"blk.3.ffn_{projection}_exps.weight" for projection in ("gate", "up", "down")}
    sizes = {"gate": N_EMBD, "up": N_EMBD, "down": N_FF}
    activation = {p: np.zeros((N_EXPERT, n)) for p, n in sizes.items()}
    gradient = {p: np.zeros((N_EXPERT, n)) for p, n in sizes.items()}
    counts, gate_weights = np.zeros(N_EXPERT), np.zeros(N_EXPERT)
    for token in range(N_TOKENS):
        for slot in range(N_USED):
            e, w = int(index[token, slot]), float(weight[token, slot])
            g, u = theirs.gate_up_proj[e, :N_FF] @ x[token], theirs.gate_up_proj[e, N_FF:] @ x[token]
            s = torch.sigmoid(g)
            inner = g * s * u
            # the chain rule by hand: the gate weight, down's transpose, the derivative of silu
            d_down = w * upstream[token]
            d_inner = theirs.down_proj[e].T @ d_down
            d = {"gate": d_inner * u * (s + g * s * (1 - s)), "up": d_inner * g * s, "down": d_down}
            into = {"gate": x[token], "up": x[token], "down": inner}
            for projection in sizes:
                squares = into[projection].square().numpy()
                activation[projection][e] += squares
                gradient[projection][e] += float(d[projection].square().sum()) * squares
            counts[e] += 1
            gate_weights[e] += w
    assert counts[UNUSED] == 0
    for projection, name in names.items():
        for sums, expected in ((recorder.activation, activation), (recorder.gradient, gradient)):
            np.testing.assert_allclose(sums.values[name], expected[projection], rtol=1e-10)
            np.testing.assert_array_equal(sums.counts[name], counts)
    assert recorder.gate_weights is not None
    np.testing.assert_allclose(recorder.gate_weights, gate_weights, rtol=1e-12)


def test_biases_and_an_activation_of_its_own() -> None:
    """gpt-oss, also beyond its limit: output, gradient, and the sums that autograd gives one expert at a time."""
    config = GptOssConfig(hidden_size=N_EMBD, intermediate_size=N_FF, num_local_experts=N_EXPERT)
    config._experts_implementation = "eager"
    theirs = GptOssExperts(config).to(torch.float64).requires_grad_(False)
    for seed, (name, value) in enumerate(theirs.named_parameters()):
        value.data = drawn(*value.shape, seed=10 + seed, dtype=torch.float64) * (3 if "gate_up" in name else 1)
    packed, bias = theirs.gate_up_proj.data.transpose(1, 2), theirs.gate_up_proj_bias.data
    biases = {"gate": bias[:, ::2], "up": bias[:, 1::2], "down": theirs.down_proj_bias.data}
    weights = ExpertWeights(3, packed[:, ::2], packed[:, 1::2], theirs.down_proj.data.transpose(1, 2), biases)
    tap = Tap()
    tap.recorder = recorder = Recorder()
    x, index, weight = routed(torch.float64)
    upstream = drawn(N_TOKENS, N_EMBD, seed=5, dtype=torch.float64)
    results = []
    for experts in (RoutedExperts(weights, clamped_swiglu, tap), theirs):
        into = x.clone().requires_grad_()
        output = experts(into, index, weight)
        results.append((output, *torch.autograd.grad(output, into, upstream)))
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)
    beyond = 0
    for e in range(N_EXPERT):
        token, slot = torch.where(index == e)
        both = (x[token] @ theirs.gate_up_proj[e] + bias[e]).requires_grad_()
        beyond += int((both.abs() > 7).sum())
        inner = theirs._apply_gate(both)
        down = inner @ theirs.down_proj[e]
        g_both, g_down = torch.autograd.grad(down * weight[token, slot, None], (both, down), upstream[token])
        for name, into, g in (
            ("gate", x[token], g_both[:, ::2]),
            ("up", x[token], g_both[:, 1::2]),
            ("down", inner, g_down),
        ):
            key = f"blk.3.ffn_{name}_exps.weight"
            squares = into.detach().square()
            np.testing.assert_allclose(recorder.activation.values[key][e], squares.sum(0).numpy(), rtol=1e-10)
            np.testing.assert_allclose(
                recorder.gradient.values[key][e], (g.square().sum(1) @ squares).numpy(), rtol=1e-10
            )
    assert beyond > 100


def test_nothing_is_recorded_without_a_recorder_or_without_gradients() -> None:
    theirs = make_theirs(torch.float32)
    tap = Tap()
    ours = make_ours(theirs, tap)
    x, index, weight = routed(torch.float32)
    plain = ours(x, index, weight)
    tap.recorder = recorder = Recorder()
    torch.testing.assert_close(ours(x, index, weight), plain, rtol=0, atol=0)
    assert recorder.activation.values
    assert recorder.gradient.values == {}


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
def test_weights_in_the_checkpoint_s_type_are_the_same_numbers(stored: torch.dtype) -> None:
    x, index, weight = routed(torch.float32)
    upstream = drawn(N_TOKENS, N_EMBD, seed=5, dtype=torch.float32)
    small = ExpertWeights(
        3,
        drawn(N_EXPERT, N_FF, N_EMBD, seed=1, dtype=torch.float32).to(stored),
        drawn(N_EXPERT, N_FF, N_EMBD, seed=2, dtype=torch.float32).to(stored),
        drawn(N_EXPERT, N_EMBD, N_FF, seed=3, dtype=torch.float32).to(stored),
    )
    wide = ExpertWeights(3, small.gate.float(), small.up.float(), small.down.float())
    results = []
    for weights in (small, wide):
        into = x.clone().requires_grad_()
        output = RoutedExperts(weights, gated_by(nn.functional.silu), Tap())(into, index, weight)
        results.append((output, *torch.autograd.grad(output, into, upstream)))
    for ours, expected in zip(*results, strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, expected, rtol=0, atol=0)
