"""The streamed passes against transformers' whole model in double precision, every matrix watched."""

from __future__ import annotations

import resource
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from converters import CONVERTERS
from mopeq_edge.calibrate import passes, states
from mopeq_edge.calibrate.blocks import BlockModel
from mopeq_edge.calibrate.passes import batches, forward
from mopeq_edge.calibrate.run import calibrate
from mopeq_edge.calibrate.states import HiddenStates
from mopeq_edge.calibrate.statistics import TEXT
from mopeq_edge.calibrate.windows import Window, text_windows
from mopeq_edge.errors import OutputError
from mopeq_edge.imatrix import ACTIVATION, GRADIENT, Imatrix
from mopeq_edge.progress import SilentProgress, Step
from mopeq_edge.sensitivity.pricing import Statistics
from mopeq_edge.source.huggingface import HuggingFaceSource, open_huggingface

from ..builders import build_olmoe

N_LAYER, N_EXPERT, N_FF = 2, 8, 32
N_WINDOWS, N_CTX = 5, 24
VARIANTS = {
    "plain": {},
    # a third of the experts for each token, packed as transformers has them in memory
    "packed": {
        "packed": True,
        "dtype": "float32",
        "n_used": 3,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
    },
}


@dataclass
class Watched:
    """Sums by GGUF name, [n_matrices, n_in], over a whole-model run."""

    activation: dict[str, np.ndarray]
    gradient: dict[str, np.ndarray]
    counts: dict[str, np.ndarray]
    embedding_gradient: np.ndarray
    gate_weights: dict[int, np.ndarray]
    before_norm: Tensor
    logits: Tensor


@dataclass
class Case:
    """A model, its text, our result and the labels that were drawn for it."""

    source: HuggingFaceSource
    windows: np.ndarray
    statistics: Statistics
    labels: Tensor
    whole: Watched


def text(n_windows: int = N_WINDOWS, n_ctx: int = N_CTX, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 4096, (n_windows, n_ctx)).astype(np.int32)


def run(
    source: HuggingFaceSource,
    windows: np.ndarray,
    scratch: Path,
    *,
    threads: int = 2,
    fisher: bool = True,
    seed: int = 3,
    progress: Any = None,
) -> Statistics:
    progress = progress or SilentProgress()
    return calibrate(
        *(source, windows, "text"), fisher=fisher, seed=seed, threads=threads, scratch=scratch, progress=progress
    )


def gguf_names(model: Any) -> list[tuple[Tensor, list[tuple[str, int, int, slice]]]]:
    """Every matrix of the model with the (name, matrix, n_matrices, outputs) of the tensors that it holds."""
    found: list[tuple[Tensor, list[tuple[str, int, int, slice]]]] = []
    every = slice(None)
    for n, layer in enumerate(model.model.layers):
        for ours in ("q", "k", "v"):
            found.append(
                (getattr(layer.self_attn, f"{ours}_proj").weight, [(f"blk.{n}.attn_{ours}.weight", 0, 1, every)])
            )
        found.append((layer.self_attn.o_proj.weight, [(f"blk.{n}.attn_output.weight", 0, 1, every)]))
        found.append((layer.mlp.gate.weight, [(f"blk.{n}.ffn_gate_inp.weight", 0, 1, every)]))
        for e in range(N_EXPERT):
            stacks = [(f"blk.{n}.ffn_{p}_exps.weight", e, N_EXPERT) for p in ("gate", "up", "down")]
            halves = [(*stacks[0], slice(0, N_FF)), (*stacks[1], slice(N_FF, None))]
            found.append((layer.mlp.experts.gate_up_proj[e], halves))
            found.append((layer.mlp.experts.down_proj[e], [(*stacks[2], every)]))
    return [*found, (model.lm_head.weight, [("output.weight", 0, 1, every)])]


def whole_model(directory: Path, windows: np.ndarray, labels: Tensor, monkeypatch: pytest.MonkeyPatch) -> Watched:
    """transformers' model in float64, each of its linear maps watched from outside, one backward pass."""
    from transformers import OlmoeForCausalLM

    model = OlmoeForCausalLM.from_pretrained(directory, dtype=torch.float64, experts_implementation="eager").eval()
    model.requires_grad_(False)
    known = {weight.data_ptr(): parts for weight, parts in gguf_names(model)}
    seen: list[tuple[list[tuple[str, int, int, slice]], Tensor, Tensor]] = []
    linear = torch.nn.functional.linear

    def watched(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        y = linear(x, weight, bias)
        seen.append((known[weight.data_ptr()], x.detach(), y))
        return y.clone()  # what follows may change it in place

    gate_weights: dict[int, np.ndarray] = {}
    for n, layer in enumerate(model.model.layers):

        def routed(_: object, args: object, output: tuple[Tensor, ...], n: int = n) -> None:
            _, weights, index = output
            gate_weights[n] = np.bincount(index.ravel(), weights.detach().ravel(), minlength=N_EXPERT)

        layer.mlp.gate.register_forward_hook(routed)
    norm_input: list[Tensor] = []
    model.model.norm.register_forward_pre_hook(lambda _, args: norm_input.append(args[0].detach()))
    embedded = model.model.embed_tokens(torch.from_numpy(windows).long()).requires_grad_()
    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.functional, "linear", watched)
        logits = model(inputs_embeds=embedded, use_cache=False).logits
    likelihood = torch.log_softmax(logits, -1).gather(-1, labels.unsqueeze(-1)).sum()
    *gradients, at_embedding = torch.autograd.grad(likelihood, [*(y for _, _, y in seen), embedded])

    activation: dict[str, Any] = defaultdict(float)
    gradient: dict[str, Any] = defaultdict(float)
    counts: dict[str, Any] = defaultdict(float)
    for (parts, x, _), g in zip(seen, gradients, strict=True):
        x2, flat = x.reshape(-1, x.shape[-1]).square(), g.reshape(-1, g.shape[-1])
        for name, matrix, n_matrices, outputs in parts:
            place = np.zeros((n_matrices, 1))
            place[matrix] = 1
            activation[name] += place * x2.sum(0).numpy()
            gradient[name] += place * (flat[:, outputs].square().sum(1) @ x2).numpy()
            counts[name] += place[:, 0] * len(x2)
    squares = at_embedding.square().reshape(-1, at_embedding.shape[-1]).sum(0).numpy()
    return Watched(activation, gradient, counts, squares, gate_weights, norm_input[0], logits.detach())


@pytest.fixture(scope="module", autouse=True)
def two_windows_at_once() -> Iterator[None]:
    """Two batches of two windows and one of one, for the threads to share."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(passes, "FORWARD_TOKENS", 2 * N_CTX)
        patch.setattr(passes, "BACKWARD_TOKENS", 2 * N_CTX)
        yield


@pytest.fixture(scope="module", params=list(VARIANTS))
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    folder = tmp_path_factory.mktemp(request.param)
    directory = build_olmoe(folder / "model", n_layer=N_LAYER, n_expert=N_EXPERT, **VARIANTS[request.param])
    source = open_huggingface(directory, CONVERTERS, pre="gpt-2")
    with pytest.MonkeyPatch.context() as patch:
        labels: dict[int, Tensor] = {}
        drawn = passes._sampled_gradient

        def noting(logits: Tensor, generator: torch.Generator) -> Tensor:
            g = drawn(logits, generator)
            labels[generator.initial_seed()] = g.argmax(-1)  # the only place where 1 - p is positive
            return g

        patch.setattr(passes, "_sampled_gradient", noting)
        statistics = run(source, text(), folder / "scratch")
        in_order = torch.stack([labels[seed] for seed in sorted(labels)])
        yield Case(source, text(), statistics, in_order, whole_model(directory, text(), in_order, patch))


def assert_entries(imatrix: Imatrix | None, expected: dict[str, np.ndarray], counts: dict[str, np.ndarray]) -> None:
    assert imatrix is not None
    assert imatrix.unrouted == ()
    assert set(imatrix.entries) == set(expected)
    for name, entry in imatrix.entries.items():
        sums = entry.sums.astype(np.float64) * imatrix.scale
        np.testing.assert_array_equal(entry.counts, counts[name], err_msg=name)
        np.testing.assert_allclose(sums, expected[name], rtol=1e-4, err_msg=name)


def test_activation_sums(case: Case) -> None:
    assert_entries(case.statistics.activation, case.whole.activation, case.whole.counts)


def test_gradient_sums(case: Case) -> None:
    # routers stay F32 and have no gradient; the embedding has one that a linear map does not show
    expected = {name: sums for name, sums in case.whole.gradient.items() if "ffn_gate_inp" not in name}
    expected["token_embd.weight"] = case.whole.embedding_gradient[None]
    counts = {**case.whole.counts, "token_embd.weight": np.array([N_WINDOWS * N_CTX])}
    assert_entries(case.statistics.gradient, expected, counts)
    assert case.statistics.gradient is not None
    entries = case.statistics.gradient.entries.values()
    total, weights = (
        sum(e.sums.sum(dtype=float) for e in entries),
        sum(e.counts.sum() * e.sums.shape[1] for e in entries),
    )
    assert total / weights == pytest.approx(1, rel=1e-6)


def test_routing(case: Case) -> None:
    routing = case.statistics.routing
    assert routing is not None
    assert routing.n_tokens == N_WINDOWS * N_CTX
    np.testing.assert_array_equal(routing.token_counts, np.bincount(case.windows.ravel(), minlength=4100))
    assert routing.unrouted() == []
    for layer in range(N_LAYER):
        counts = routing.counts[layer]
        np.testing.assert_array_equal(counts, case.whole.counts[f"blk.{layer}.ffn_up_exps.weight"])
        assert counts.sum() == N_WINDOWS * N_CTX * case.source.config["num_experts_per_tok"]
        np.testing.assert_allclose(routing.gate_weights[layer], case.whole.gate_weights[layer], rtol=1e-5)


def test_hidden_states_and_logits(case: Case, tmp_path: Path) -> None:
    model = BlockModel(case.source)
    kept = HiddenStates(N_LAYER + 1, [N_CTX] * N_WINDOWS, model.n_embd, tmp_path)
    forward(model, text_windows(case.windows), kept, keep=True, threads=2, progress=SilentProgress())
    got = torch.cat([kept.get(N_LAYER, window) for window in range(N_WINDOWS)])
    torch.testing.assert_close(got.double(), case.whole.before_norm, rtol=1e-4, atol=1e-5)
    with model.final_norm() as norm:
        logits = norm(got) @ model.output_matrix().T
    torch.testing.assert_close(logits.double(), case.whole.logits, rtol=1e-4, atol=1e-5)


def test_without_keeping_the_states_everything_is_the_same(case: Case, tmp_path: Path) -> None:
    results = []
    for keep in (True, False):
        model = BlockModel(case.source)
        kept = HiddenStates(N_LAYER + 1 if keep else 1, [N_CTX] * N_WINDOWS, model.n_embd, tmp_path)
        tally = forward(model, text_windows(case.windows), kept, keep=keep, threads=1, progress=SilentProgress())[TEXT]
        last = [kept.get(N_LAYER if keep else 0, w).numpy() for w in range(N_WINDOWS)]
        gates = {f"gates {n}": g for n, g in tally.gate_weights.items()}
        results.append({**tally.activation.values, **gates, "last": np.array(last)})
    assert results[0].keys() == results[1].keys()
    for name, values in results[0].items():
        np.testing.assert_array_equal(values, results[1][name], err_msg=name)
    without = run(case.source, case.windows, tmp_path, fisher=False)
    assert without.gradient is None
    assert_same(without, Statistics(case.statistics.activation, None, case.statistics.routing))


def assert_same(one: Statistics, other: Statistics) -> None:
    """Equal to the last bit."""
    for a, b in ((one.activation, other.activation), (one.gradient, other.gradient)):
        assert (a is None) == (b is None)
        if a is None or b is None:
            continue
        assert a.entries.keys() == b.entries.keys()
        assert (a.scale, a.unrouted, a.n_tokens) == (b.scale, b.unrouted, b.n_tokens)
        for name, entry in a.entries.items():
            np.testing.assert_array_equal(entry.sums, b.entries[name].sums, err_msg=name)
            np.testing.assert_array_equal(entry.counts, b.entries[name].counts, err_msg=name)
    assert one.routing is not None
    assert other.routing is not None
    for layer, counts in one.routing.counts.items():
        np.testing.assert_array_equal(counts, other.routing.counts[layer])
        np.testing.assert_array_equal(one.routing.gate_weights[layer], other.routing.gate_weights[layer])


@pytest.mark.parametrize("tokens", [1, 1000])
def test_batches_change_rounding_alone(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokens: int
) -> None:
    monkeypatch.setattr(passes, "FORWARD_TOKENS", tokens)
    monkeypatch.setattr(passes, "BACKWARD_TOKENS", tokens)
    got = run(case.source, case.windows, tmp_path)
    for kind in (ACTIVATION, GRADIENT):
        mine, other = got.imatrix(kind), case.statistics.imatrix(kind)
        assert mine is not None
        assert other is not None
        for name, entry in mine.entries.items():
            np.testing.assert_array_equal(entry.counts, other.entries[name].counts)
            np.testing.assert_allclose(entry.sums, other.entries[name].sums, rtol=1e-4, err_msg=name)


def test_which_windows_go_together() -> None:
    def of(n: int, *, seen: bool = False) -> Window:
        return Window(np.zeros(n, dtype=np.int32), (lambda: np.zeros((0, 4), dtype=np.float32)) if seen else None)

    windows = [of(8), of(8), of(8), of(4), of(8), of(8, seen=True), of(8), of(40), of(40)]
    assert batches(windows, 16) == [range(i, j) for i, j in pairwise((0, 2, 3, 4, 5, 6, 7, 8, 9))]
    assert batches(windows, 1) == [range(i, i + 1) for i in range(9)]
    assert batches([], 16) == []


@pytest.mark.parametrize("threads", [1, 3])
def test_threads_change_no_bit(case: Case, tmp_path: Path, threads: int) -> None:
    assert_same(run(case.source, case.windows, tmp_path, threads=threads), case.statistics)


def test_a_few_logits_at_a_time_are_the_same(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert [(p.start, p.stop) for p in passes.token_parts(7, passes.LOGITS_AT_ONCE // 3)] == [(0, 3), (3, 6), (6, 7)]
    monkeypatch.setattr(passes, "LOGITS_AT_ONCE", 5 * 4100)
    parts = run(case.source, case.windows, tmp_path).gradient
    assert parts is not None
    # the labels are the same: with others the sums of a few windows would differ at once
    expected = {**case.whole.gradient, "token_embd.weight": case.whole.embedding_gradient[None]}
    for name, entry in parts.entries.items():
        np.testing.assert_allclose(entry.sums.astype(np.float64) * parts.scale, expected[name], rtol=1e-4, err_msg=name)
    assert parts.entries["output.weight"].counts == N_WINDOWS * N_CTX


def test_the_seed_draws_other_labels(case: Case, tmp_path: Path) -> None:
    other = run(case.source, case.windows, tmp_path, seed=4)
    assert case.statistics.gradient is not None
    assert other.gradient is not None
    name = "output.weight"
    assert (other.gradient.entries[name].sums != case.statistics.gradient.entries[name].sums).mean() > 0.9
    assert_same(
        Statistics(other.activation, None, other.routing),
        Statistics(case.statistics.activation, None, case.statistics.routing),
    )


class _Listing(SilentProgress):
    """The sizes of the files of a folder that are mapped, in whole pages, at the start of every step."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.seen: list[list[int]] = []

    @contextmanager
    def step(self, title: str, total: float | None, unit: str = "") -> Iterator[Step]:
        maps = [line for line in Path("/proc/self/maps").read_text().splitlines() if str(self._folder) in line]
        # a killed process leaves nothing: the files have no names any more
        assert all(line.endswith("(deleted)") for line in maps)
        places = [[int(address, 16) for address in line.split()[0].split("-")] for line in maps]
        self.seen.append([last - first for first, last in places])
        with super().step(title, total) as step:
            yield step


def test_states_on_disk_change_no_bit_and_leave_nothing(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(states, "IN_MEMORY_BYTES", 1000)
    progress = _Listing(tmp_path / "s")
    (tmp_path / "s").mkdir()
    assert_same(run(case.source, case.windows, tmp_path / "s", progress=progress), case.statistics)
    nbytes = (N_LAYER + 1) * N_WINDOWS * N_CTX * 64 * 4
    assert progress.seen == [[-(-nbytes // resource.getpagesize()) * resource.getpagesize()]] * 3
    assert list((tmp_path / "s").iterdir()) == []

    def refuse(*args: object) -> None:
        raise RuntimeError("stop")

    monkeypatch.setattr(passes, "_batch", refuse)
    with pytest.raises(RuntimeError, match="stop"):
        run(case.source, case.windows, tmp_path / "s")
    assert list((tmp_path / "s").iterdir()) == []


def test_a_full_disk_is_one_line_before_anything_is_computed(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(states, "IN_MEMORY_BYTES", 1000)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
    try:
        with pytest.raises(OutputError) as caught:
            run(case.source, case.windows, tmp_path / "s")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert f"{tmp_path / 's'}: 92.160 kB for the hidden states" in str(caught.value)
    assert "cannot be written (File too large); free space" in str(caught.value)
    assert list((tmp_path / "s").iterdir()) == []


def test_labels_follow_the_model_s_distribution() -> None:
    p = torch.tensor([0.5, 0.3, 0.15, 0.05])
    g = passes._sampled_gradient(p.log().repeat(20000, 1), torch.Generator().manual_seed(1))
    labels = g.argmax(-1)
    torch.testing.assert_close(g, torch.nn.functional.one_hot(labels, 4) - p)
    frequency = np.bincount(labels.numpy(), minlength=4) / 20000
    np.testing.assert_allclose(frequency, p, atol=4 * 0.5 / 20000**0.5)

    def again(seed: int) -> Tensor:
        return passes._sampled_gradient(p.log().repeat(50, 1), torch.Generator().manual_seed(seed))

    assert torch.equal(again(1), again(1))
    assert not torch.equal(again(1), again(2))


def test_experts_that_no_token_reached_get_the_prior_and_are_named(tmp_path: Path) -> None:
    directory = build_olmoe(tmp_path / "model", n_layer=1)
    source = open_huggingface(directory, CONVERTERS, pre="gpt-2")
    # two tokens reach at most four of the eight experts
    found = run(source, text(1, 2), tmp_path)
    assert found.routing is not None
    idle = np.flatnonzero(found.routing.counts[0] == 0)
    assert 4 <= len(idle) <= 6
    assert found.routing.unrouted() == [(0, int(e)) for e in idle]
    assert found.routing.counts[0].sum() == 4
    for imatrix in (found.activation, found.gradient):
        assert imatrix is not None
        stacks = [f"blk.0.ffn_{p}_exps.weight" for p in ("gate", "up", "down")]
        assert sorted(imatrix.unrouted) == sorted(f"{name}[{e}]" for name in stacks for e in idle)
        for name in stacks:
            entry = imatrix.entries[name]
            busy = np.setdiff1d(np.arange(N_EXPERT), idle)
            np.testing.assert_array_equal(entry.counts[busy], found.routing.counts[0][busy])
            np.testing.assert_array_equal(entry.counts[idle], 1)
            prior = entry.sums[busy].sum(0, dtype=np.float64) / 4
            np.testing.assert_allclose(entry.sums[idle], np.tile(prior, (len(idle), 1)), rtol=1e-5)
            assert (entry.sums > 0).all()
