"""Every family through the streamed passes, against llama-imatrix and against transformers' whole model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from converters import CONVERTERS
from mopeq_edge.calibrate import passes
from mopeq_edge.calibrate.blocks import BlockModel
from mopeq_edge.calibrate.curvature import Run, record_choices
from mopeq_edge.calibrate.passes import one_torch_thread
from mopeq_edge.calibrate.run import calibrate, calibrate_text
from mopeq_edge.calibrate.states import HiddenStates
from mopeq_edge.emit import emit
from mopeq_edge.ggml.library import load_ggml
from mopeq_edge.ggml.types import F32
from mopeq_edge.imatrix import EMBEDDING, LOOKUP, read_imatrix, split_stacks
from mopeq_edge.progress import SilentProgress
from mopeq_edge.runtime.tools import run_tool
from mopeq_edge.source.huggingface import HuggingFaceSource
from mopeq_edge.source.open import open_source

from ..converters import families
from ..converters.vision_language import VISION_LANGUAGE

FAMILIES = {**families.FAMILIES, **VISION_LANGUAGE}

N_CTX, N_CHUNKS = 64, 6
QUIET = SilentProgress()
MODULES = {
    **{
        f"self_attn.{ours}_proj": f"attn_{theirs}"
        for ours, theirs in zip("qkvo", ("q", "k", "v", "output"), strict=True)
    },
    **{"self_attn.q_a_proj": "attn_q_a", "self_attn.q_b_proj": "attn_q_b"},
    "self_attn.kv_a_proj_with_mqa": "attn_kv_a_mqa",
    **{f"mlp.{which}_proj": f"ffn_{which}" for which in ("gate", "up", "down")},
    **{f"mlp.shared_expert.{which}_proj": f"ffn_{which}_shexp" for which in ("gate", "up", "down")},
    "mlp.shared_expert_gate": "ffn_gate_inp_shexp",
    **{f"mlp.shared_experts.{which}_proj": f"ffn_{which}_shexp" for which in ("gate", "up", "down")},
}
"""Linear maps of a block, as transformers' modules and in GGUF; experts are compared in the tests of OLMoE."""


def source_of(name: str, directory: Path) -> HuggingFaceSource:
    build, _ = FAMILIES[name]
    source = open_source(build(directory, "float32"), CONVERTERS, pre="gpt-2")
    assert isinstance(source, HuggingFaceSource)
    return source


def decoder(model: Any) -> Any:
    """The module with ``embed_tokens``, ``layers`` and ``norm``."""
    return getattr(model.model, "language_model", model.model)


@pytest.mark.runtime
@pytest.mark.parametrize("name", FAMILIES)
def test_activations_are_those_of_llama_imatrix(name: str, tmp_path: Path, calibration_text: str) -> None:
    source = source_of(name, tmp_path / "model")
    text = tmp_path / "text.txt"
    text.write_text(calibration_text[:4000], encoding="utf-8", newline="")
    gguf, out = tmp_path / "f32.gguf", tmp_path / "theirs.gguf"
    emit(
        source,
        dict.fromkeys((t.name for t in source.tensors), F32),
        source.kvs,
        None,
        load_ggml(),
        gguf,
        threads=1,
        progress=QUIET,
    )
    options = ["-c", str(N_CTX), "--chunks", str(N_CHUNKS), "--no-ppl", "--process-output", "-t", "1"]
    run_tool("llama-imatrix", ["-m", gguf, "-f", text, "-o", out, *options, "-ctk", "f32", "-ctv", "f32", "-fa", "off"])
    theirs = read_imatrix(out)
    ours = calibrate_text(
        *(source, text.read_text(encoding="utf-8"), "text.txt"),
        **{"n_ctx": N_CTX, "chunks": N_CHUNKS, "fisher": False, "seed": 1, "threads": 1},
        scratch=tmp_path,
        progress=QUIET,
    ).activation
    assert ours is not None
    theirs = split_stacks(theirs, {t.name: t.n_matrices for t in source.tensors})
    # llama-imatrix leaves out an output matrix that is the embedding
    assert ours.entries.keys() - theirs.entries.keys() == ({EMBEDDING} if name.endswith("-tied") else set())
    assert theirs.entries.keys() <= ours.entries.keys()
    for key, entry in theirs.entries.items():
        np.testing.assert_array_equal(ours.entries[key].counts, entry.counts, err_msg=key)
        want = entry.sums
        np.testing.assert_allclose(ours.entries[key].sums, want, rtol=2e-4, atol=1e-6 * want.mean(), err_msg=key)


def of_heads(
    prefix: str, c: torch.Tensor, g: torch.Tensor, shapes: dict[str, tuple[int, ...]]
) -> dict[str, np.ndarray]:
    """Column sums [n_head, n_in] of the diagonal Fisher of the GGUF's matrices: every token's gradient of every weight.

    ``c`` [n_tokens, n_latent] are latents, ``g`` the gradients at keys and values, head after head. The GGUF's matrix
    of a key has a row for each number of the latent.
    """
    n_key, _, n_head = shapes[f"{prefix}k_b.weight"]
    keys, values = g.reshape(len(g), n_head, -1).split([n_key, g.shape[1] // n_head - n_key], dim=-1)
    of_key = torch.einsum("ti,thj->thij", c, keys).square().sum((0, 2))
    of_value = torch.einsum("thi,tj->thij", values, c).square().sum((0, 2))
    return {f"{prefix}k_b.weight": of_key.numpy(), f"{prefix}v_b.weight": of_value.numpy()}


@pytest.mark.parametrize("name", FAMILIES)
def test_gradients_are_those_of_the_whole_model(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """sum_t |g_t|^2 x_tj^2 of every matrix that is no expert, by one backward pass in float64."""
    source = source_of(name, tmp_path / "model")
    windows = np.random.default_rng(0).integers(0, 4096, (3, 20)).astype(np.int32)
    labels: dict[int, torch.Tensor] = {}
    drawn = passes._sampled_gradient

    def noting(logits: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        g = drawn(logits, generator)
        labels[generator.initial_seed()] = g.argmax(-1)
        return g

    monkeypatch.setattr(passes, "_sampled_gradient", noting)
    options: dict[str, Any] = {"fisher": True, "seed": 3, "threads": 1, "scratch": tmp_path, "progress": QUIET}
    statistics = calibrate(source, windows, "text", **options)
    ours, activations = statistics.gradient, statistics.activation
    assert ours is not None
    assert activations is not None

    model = FAMILIES[name][1](tmp_path / "model").to(torch.float64)
    model.requires_grad_(False)
    seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    watched = {"output.weight": model.lm_head}
    latents: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    for full, module in decoder(model).layers.named_modules():
        layer, _, rest = full.partition(".")
        if (own := MODULES.get(rest)) is not None:
            watched[f"blk.{layer}.{own}.weight"] = module
        elif rest.endswith("kv_b_proj"):
            module.register_forward_hook(lambda _m, x, y, key=layer: latents.update({key: (x[0].detach(), y)}))
    for key, module in watched.items():
        module.register_forward_hook(lambda _m, x, y, key=key: seen.update({key: (x[0].detach(), y)}))
    embedded: list[torch.Tensor] = []

    def leaf(_m: object, _x: object, y: torch.Tensor) -> torch.Tensor:
        embedded.append(y.detach().requires_grad_())
        return embedded[0]

    decoder(model).embed_tokens.register_forward_hook(leaf)
    found = model(torch.from_numpy(windows).long())
    logits = found if isinstance(found, torch.Tensor) else found.logits
    chosen = torch.stack([labels[seed] for seed in sorted(labels)])
    likelihood = torch.log_softmax(logits, -1).gather(-1, chosen.unsqueeze(-1)).sum()
    outputs = [y for _, y in (*seen.values(), *latents.values())]
    *gradients, at_embedding = torch.autograd.grad(likelihood, [*outputs, embedded[0]])
    expected = {
        key: (g.flatten(0, -2).square().sum(1) @ x.flatten(0, -2).square()).numpy()
        for (key, (x, _)), g in zip(seen.items(), gradients[: len(seen)], strict=True)
    }
    for (layer, (c, _)), g in zip(latents.items(), gradients[len(seen) :], strict=True):
        shapes = {t.name: t.shape for t in source.tensors}
        expected |= of_heads(f"blk.{layer}.attn_", c.flatten(0, -2), g.flatten(0, -2), shapes)
    x2 = {key: x.flatten(0, -2).square().sum(0).numpy() for key, (x, _) in seen.items()}
    lookups = at_embedding.square().flatten(0, 1).sum(0).numpy()
    if name.endswith("-tied"):
        expected |= {EMBEDDING: expected.pop("output.weight"), LOOKUP: lookups}
        x2[EMBEDDING] = x2.pop("output.weight")
    else:
        expected[EMBEDDING] = lookups
    assert {key for key in ours.entries if "_exps." not in key} == set(expected)
    for key, want in expected.items():
        found = ours.entries[key].sums
        np.testing.assert_allclose(found.reshape(want.shape) * ours.scale, want, rtol=2e-4, err_msg=key)
    for key, want in x2.items():
        np.testing.assert_allclose(activations.entries[key].sums[0], want, rtol=2e-4, err_msg=key)


@pytest.mark.parametrize("name", FAMILIES)
def test_loss_and_its_gradient_are_those_of_the_whole_model(name: str, tmp_path: Path) -> None:
    """What the trace differentiates: the loss in nats per predicted token, its gradient at the final norm's input."""
    source = source_of(name, tmp_path / "model")
    windows = np.random.default_rng(1).integers(0, 4096, (2, 20)).astype(np.int32)
    blocks = BlockModel(source)
    states = HiddenStates(blocks.n_layer + 1, [windows.shape[1]] * len(windows), blocks.n_embd, tmp_path)
    with one_torch_thread(), QUIET.step("", 1) as step:
        choices = record_choices(Run(blocks, windows, states, 1, step))
    got = np.stack([states.get(blocks.n_layer, window).reshape(-1, blocks.n_embd).numpy() for window in range(2)])

    model = FAMILIES[name][1](tmp_path / "model").to(torch.float64)
    model.requires_grad_(False)
    into: list[torch.Tensor] = []

    def leaf(_module: object, args: tuple[torch.Tensor, ...]) -> torch.Tensor:
        into.append(args[0].detach().requires_grad_())
        return into[0]

    decoder(model).norm.register_forward_pre_hook(leaf)
    tokens = torch.from_numpy(windows).long()
    found = model(tokens)
    logits = found if isinstance(found, torch.Tensor) else found.logits
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    (want,) = torch.autograd.grad(loss, into[0])
    assert choices.loss == pytest.approx(loss.item(), rel=1e-6)
    np.testing.assert_allclose(got, want.numpy(), rtol=1e-3, atol=1e-5 * float(want.abs().max()))
