"""Streamed curvature against exact Hessian-vector products of transformers' whole model in float64."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from converters import CONVERTERS
from mopeq_edge.calibrate import directions
from mopeq_edge.calibrate.blocks import BlockModel
from mopeq_edge.calibrate.curvature import Choices, Run, curvature, record_choices
from mopeq_edge.calibrate.directions import HeldRouting
from mopeq_edge.calibrate.hutchinson import probe_generator, rademacher
from mopeq_edge.calibrate.passes import one_torch_thread
from mopeq_edge.calibrate.states import HiddenStates
from mopeq_edge.calibrate.trace import measure_traces
from mopeq_edge.calibrate.traces import Traces
from mopeq_edge.errors import CalibrationError
from mopeq_edge.progress import SilentProgress
from mopeq_edge.source.huggingface import HuggingFaceSource, open_huggingface

from ..builders import build_olmoe
from ..converters.families import build_deepseek_v3

N_LAYER, N_EXPERT, FF = 2, 8, 32


@dataclass
class Whole:
    """transformers' model in float64: the loss, its gradients at the packed experts, and those themselves."""

    loss: Tensor
    weights: list[Tensor]
    gradients: tuple[Tensor, ...]
    layers: list[int]
    ff: int

    @classmethod
    def load(cls, directory: Path, windows: np.ndarray) -> Whole:
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(
            directory, dtype=torch.float64, experts_implementation="eager", attn_implementation="eager"
        ).eval()
        model.requires_grad_(False)
        layers = [n for n, layer in enumerate(model.model.layers) if hasattr(layer.mlp, "experts")]
        experts = [model.model.layers[n].mlp.experts for n in layers]
        weights = [w.requires_grad_() for e in experts for w in (e.gate_up_proj, e.down_proj)]
        tokens = torch.from_numpy(windows).long()
        logits = model(tokens, use_cache=False).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), tokens[:, 1:].reshape(-1))
        gradients = torch.autograd.grad(loss, weights, create_graph=True)
        return cls(loss, weights, gradients, layers, experts[0].down_proj.shape[2])

    def stacks(self) -> dict[str, tuple[int, slice]]:
        """By GGUF name: the packed tensor and its rows."""
        found = {}
        for at, n in enumerate(self.layers):
            found[f"blk.{n}.ffn_gate_exps.weight"] = (2 * at, slice(0, self.ff))
            found[f"blk.{n}.ffn_up_exps.weight"] = (2 * at, slice(self.ff, None))
            found[f"blk.{n}.ffn_down_exps.weight"] = (2 * at + 1, slice(None))
        return found

    def product(self, direction: list[Tensor]) -> list[Tensor]:
        return list(torch.autograd.grad(self.gradients, self.weights, direction, retain_graph=True))

    def form(self, seed: int, probe: int) -> dict[str, np.ndarray]:
        """v_e . (H u)_e / eps_e of every stack, for u = eps v with eps in proportion to the stack's weights."""
        v = [torch.zeros_like(w) for w in self.weights]
        u = [torch.zeros_like(w) for w in self.weights]
        scale = {}
        for name, (at, rows) in self.stacks().items():
            stack = self.weights[at][:, rows].detach()
            scale[name] = stack.square().mean().sqrt()
            for e in range(len(stack)):
                v[at][e, rows] = rademacher(tuple(stack.shape[1:]), probe_generator(seed, probe, f"{name}[{e}]")).to(
                    v[0]
                )
            u[at][:, rows] = scale[name] * v[at][:, rows]
        products = [(a * b).detach() for a, b in zip(v, self.product(u), strict=True)]
        return {n: (products[at][:, rows].sum((1, 2)) / scale[n]).numpy() for n, (at, rows) in self.stacks().items()}


def text(n_windows: int, n_ctx: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 4096, (n_windows, n_ctx)).astype(np.int32)


def opened(directory: Path) -> HuggingFaceSource:
    return open_huggingface(directory, CONVERTERS, pre="gpt-2")


class _Step:
    def advance(self, amount: float = 1.0) -> None:
        pass


def run(source: HuggingFaceSource, windows: np.ndarray, scratch: Path, threads: int = 2, **probe: int) -> Any:
    """(choices, curvature) of one probe."""
    model = BlockModel(source)
    states = HiddenStates(model.n_layer + 1, [windows.shape[1]] * len(windows), model.n_embd, scratch)
    with one_torch_thread():
        prepared = Run(model, windows, states, threads, _Step())
        choices = record_choices(prepared)
        return choices, curvature(prepared, choices, **probe)


def traces(source: HuggingFaceSource, windows: np.ndarray, scratch: Path, **changes: Any) -> Traces:
    given = {"probes": 2, "seed": 1, "threads": 2, "source_sha256": "s", "made_from": "m", **changes}
    return measure_traces(source, windows, scratch=scratch, progress=SilentProgress(), **given)


def off(found: dict[str, np.ndarray], exact: dict[str, np.ndarray]) -> float:
    """Largest error, over the root mean square of the exact values."""
    assert found.keys() == exact.keys()
    a, b = (np.concatenate([values[name] for name in sorted(exact)]) for values in (found, exact))
    return float(np.abs(a - b).max() / np.sqrt((b**2).mean()))


@pytest.mark.parametrize("config", [{}, {"n_used": 3, "dtype": "float32", "packed": True}])
def test_a_probe_is_the_exact_product(tmp_path: Path, config: dict[str, Any]) -> None:
    directory = build_olmoe(tmp_path / "m", n_layer=N_LAYER, n_expert=N_EXPERT, ff=FF, **config)
    windows = text(3, 24)
    whole = Whole.load(directory, windows)
    for probe in (0, 1):
        choices, found = run(opened(directory), windows, tmp_path, seed=7, probe=probe)
        assert off(found, whole.form(7, probe)) < 2e-3
    assert choices.loss == pytest.approx(whole.loss.item(), rel=1e-6)
    for layer in range(N_LAYER):
        assert choices.counts[layer].sum() == windows.size * config.get("n_used", 2)


def test_a_router_that_chooses_in_groups(tmp_path: Path) -> None:
    """DeepSeek-V3: its groups and its bias only choose, and the choice is held."""
    directory = build_deepseek_v3(tmp_path / "m", "float32")
    windows = text(3, 24)
    found = run(opened(directory), windows, tmp_path, seed=7, probe=0)[1]
    assert off(found, Whole.load(directory, windows).form(7, 0)) < 2e-3


def test_the_step_is_between_rounding_and_truncation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Larger steps: an error of second order. Much smaller ones: float32's rounding."""
    directory = build_olmoe(tmp_path / "m", n_layer=N_LAYER, n_expert=N_EXPERT, ff=FF)
    windows = text(3, 24)
    exact = Whole.load(directory, windows).form(7, 0)
    errors = {}
    for step in (0.1, 0.05, directions.STEP, directions.STEP / 500):
        monkeypatch.setattr(directions, "STEP", step)
        errors[step] = off(run(opened(directory), windows, tmp_path, seed=7, probe=0)[1], exact)
    large, half, ours, tiny = errors.values()
    assert 3 < large / half < 5
    assert ours < half / 20
    assert ours < tiny / 3


def test_traces_are_the_mean_of_probes_per_weight(tmp_path: Path) -> None:
    directory = build_olmoe(tmp_path / "m", n_layer=N_LAYER, n_expert=N_EXPERT, ff=FF)
    windows = text(3, 24)
    whole = Whole.load(directory, windows)
    found = traces(opened(directory), windows, tmp_path, probes=6, seed=7)
    assert (found.n_probes, found.n_tokens) == (6, 72)
    assert found.loss == pytest.approx(whole.loss.item(), rel=1e-6)
    forms = [whole.form(7, probe) for probe in range(6)]
    clamped = []
    for name in whole.stacks():
        samples = np.array([form[name] for form in forms]) / (64 * FF)
        noise = 2e-3 * np.sqrt((samples**2).mean())
        positive = samples.mean(axis=0) > 0
        clamped += [f"{name}[{e}]" for e in np.flatnonzero(~positive)]
        np.testing.assert_allclose(found.mean_diagonal[name][positive], samples.mean(axis=0)[positive], atol=noise)
        np.testing.assert_allclose(found.standard_error[name], samples.std(axis=0, ddof=1) / 6**0.5, atol=noise)
    assert sorted(found.clamped) == sorted(clamped)


def test_threads_change_no_bit_and_the_seed_changes_all(tmp_path: Path) -> None:
    source = opened(build_olmoe(tmp_path / "m"))
    one, three, other = (
        traces(source, text(4, 16), tmp_path, threads=threads, seed=seed) for threads, seed in ((1, 1), (3, 1), (2, 2))
    )
    for name, values in one.mean_diagonal.items():
        np.testing.assert_array_equal(values, three.mean_diagonal[name])
        np.testing.assert_array_equal(one.standard_error[name], three.standard_error[name])
        assert (one.standard_error[name] != other.standard_error[name]).all()


def test_experts_that_no_token_reached_are_named(tmp_path: Path) -> None:
    source = opened(build_olmoe(tmp_path / "m", n_layer=1))
    windows = text(1, 2)
    idle = np.flatnonzero(_choices(source, windows, tmp_path).counts[0] == 0)
    assert 4 <= len(idle) <= 6
    found = traces(source, windows, tmp_path)
    stacks = [f"blk.0.ffn_{p}_exps.weight" for p in ("gate", "up", "down")]
    assert {f"{name}[{e}]" for name in stacks for e in idle} <= set(found.clamped)
    for name in stacks:
        assert (found.mean_diagonal[name] > 0).all()
        assert (found.standard_error[name][idle] == 0).all()


def _choices(source: HuggingFaceSource, windows: np.ndarray, scratch: Path) -> Choices:
    found: Choices = run(source, windows, scratch, seed=0, probe=0)[0]
    return found


def test_held_routing_gives_other_experts_and_their_own_weights() -> None:
    scores = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.2, 0.7]], requires_grad=True)
    held = torch.tensor([[2, 0], [1, 2]])
    with HeldRouting(held, 3):
        values, index = torch.topk(scores, 2, dim=-1)
        assert torch.topk(scores[:, :2], 1).indices.tolist() == [[0], [1]]
        assert scores.topk(2).indices.tolist() == held.tolist()
    assert index.tolist() == held.tolist()
    np.testing.assert_allclose(values.tolist(), [[0.2, 0.5], [0.2, 0.7]])
    (gradient,) = torch.autograd.grad(values[:, 0].sum(), scores)
    assert gradient.tolist() == [[0, 0, 1], [0, 1, 0]]
    assert torch.topk(scores, 1).indices.tolist() == [[0], [2]]


def test_a_router_that_cannot_be_held_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        HeldRouting, "__torch_function__", lambda _, func, types, args=(), kw=None: func(*args, **(kw or {}))
    )
    # far enough for the second router to choose other experts
    monkeypatch.setattr(directions, "STEP", 1.0)
    source = opened(build_olmoe(tmp_path / "m", n_layer=2))
    with pytest.raises(CalibrationError, match="router's choice of experts cannot be held"):
        run(source, text(2, 24), tmp_path, seed=0, probe=0)
