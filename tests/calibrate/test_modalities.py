"""Text and pictures through the streamed passes, against the whole model in float64, each kind of token by itself."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from converters import CONVERTERS
from mopeq_edge.calibrate import passes
from mopeq_edge.calibrate.modalities import Modalities, read_modalities, routing_by_kind, write_modalities
from mopeq_edge.calibrate.run import calibrate, calibrate_mixed
from mopeq_edge.calibrate.statistics import KINDS, TEXT, VISION, Sums, Tally
from mopeq_edge.calibrate.windows import PICTURE, Window, text_windows
from mopeq_edge.errors import FormatError
from mopeq_edge.imatrix import EMBEDDING, read_imatrix, write_imatrix
from mopeq_edge.progress import SilentProgress
from mopeq_edge.source.huggingface import HuggingFaceSource
from mopeq_edge.source.open import open_source
from tools.vision_language_configs import BASE, MOLMOE, SMALL, TINY

from ..converters.vision_language import VISION_LANGUAGE
from .test_families import MODULES, decoder, of_heads

NAMES = (TINY, SMALL, BASE, MOLMOE)

Values = dict[str, dict[str, Any]]
"""[n_matrices, n_in] (or [n_matrices]) by kind and tensor."""


def mixed_windows(n_embd: int) -> list[Window]:
    """Two windows of text, one with a picture first and text behind it, one with two pictures, all of other lengths."""
    random = np.random.default_rng(5)
    found = text_windows(random.integers(0, 4096, (2, 14)).astype(np.int32))
    for runs in ((1, -17, 6), (3, -9, 2, -11, 4)):
        parts = [random.integers(0, 4096, n) if n > 0 else np.full(-n, PICTURE) for n in runs]
        rows = random.standard_normal((-sum(n for n in runs if n < 0), n_embd)).astype(np.float32) / 4
        found.append(Window(np.concatenate(parts).astype(np.int32), lambda rows=rows: rows))  # type: ignore[misc]
    return found


@dataclass
class Whole:
    """What one run of the whole model tells."""

    activation: Values
    gradient: Values
    counts: Values
    gate_weights: dict[str, dict[int, Any]]
    lookups: Any


class Loop(torch.nn.Module):
    """transformers' packed experts, a token and a slot at a time; every product is noted with its token."""

    def __init__(self, experts: Any, layer: int, noted: list[Any], gates: list[Any]) -> None:
        super().__init__()
        self.gate_up, self.down = experts.gate_up_proj, experts.down_proj
        self.layer, self.noted, self.gates = layer, noted, gates

    def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        self.gates.append((self.layer, index, weights.detach()))
        rows = []
        for token in range(len(x)):
            total = torch.zeros_like(x[token])
            for e, w in zip(index[token].tolist(), weights[token], strict=True):
                gate, up = (half @ x[token] for half in self.gate_up[e].chunk(2))
                inner = torch.nn.functional.silu(gate) * up
                down = self.down[e] @ inner
                for projection, into, out in (("gate", x[token], gate), ("up", x[token], up), ("down", inner, down)):
                    self.noted.append((f"blk.{self.layer}.ffn_{projection}_exps.weight", e, token, into.detach(), out))
                total = total + w * down
            rows.append(total)
        return torch.stack(rows)


def whole_model(model: Any, windows: list[Window], labels: list[Tensor], shapes: dict[str, Any]) -> Whole:
    """Window by window in float64: sums over the tokens of each kind, with labels where text is predicted."""
    found = Whole(*({kind: defaultdict(float) for kind in KINDS} for _ in range(4)), lookups=0.0)
    inner = decoder(model)
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    latents: dict[str, tuple[Tensor, Tensor]] = {}
    noted: list[Any] = []
    gates: list[Any] = []
    for full, module in list(inner.layers.named_modules()):
        layer, _, rest = full.partition(".")
        if (own := MODULES.get(rest)) is not None:
            key = f"blk.{layer}.{own}.weight"
            module.register_forward_hook(lambda _m, x, y, key=key: seen.update({key: (flat(x[0]), y)}))
        elif rest.endswith("kv_b_proj"):
            module.register_forward_hook(lambda _m, x, y, key=layer: latents.update({key: (flat(x[0]), y)}))
        elif rest.endswith("experts") and hasattr(module, "gate_up_proj"):
            parent = inner.layers.get_submodule(full.rpartition(".")[0])
            parent.experts = Loop(module, int(layer), noted, gates)
    for window, chosen in zip(windows, labels, strict=True):
        seen.clear()
        latents.clear()
        noted.clear()
        gates.clear()
        is_picture = window.tokens < 0
        rows = torch.zeros(len(window), inner.embed_tokens.weight.shape[1], dtype=torch.float64)
        rows[~is_picture] = inner.embed_tokens(torch.from_numpy(window.tokens[~is_picture]).long())
        if window.embeddings is not None:
            rows[is_picture] = torch.from_numpy(window.embeddings()).double()
        leaf = rows.detach().requires_grad_()
        hidden = inner(inputs_embeds=leaf[None], use_cache=False).last_hidden_state[0]
        # by hand: a position counts if the next is text, or if there is none
        at = [t for t in range(len(window)) if t + 1 == len(window) or window.tokens[t + 1] >= 0]
        logits = model.lm_head(hidden[at])
        likelihood = torch.log_softmax(logits, -1).gather(-1, chosen[:, None]).sum()
        outputs = [y for _, y in (*seen.values(), *latents.values())]
        *gradients, at_rows = torch.autograd.grad(likelihood, [*outputs, *(n[4] for n in noted), logits, leaf])
        *gradients, at_logits = gradients
        add = _Adder(found, is_picture)
        for (key, (x, _)), g in zip(seen.items(), gradients, strict=False):
            add(key, 1, 0, range(len(window)), x, flat(g))
        for (layer, (c, _)), g in zip(latents.items(), gradients[len(seen) :], strict=False):
            for kind, mask in ((TEXT, ~is_picture), (VISION, is_picture)):
                if mask.any():
                    for key, sums in of_heads(f"blk.{layer}.attn_", c[mask], flat(g)[mask], shapes).items():
                        found.gradient[kind][key] += sums
        for (key, e, token, x, _), g in zip(noted, gradients[len(seen) + len(latents) :], strict=True):
            add(key, shapes[key][2], e, [token], x[None], g[None])
        add("output.weight", 1, 0, at, hidden[at].detach(), at_logits)
        for layer, index, weights in gates:
            for kind, mask in ((TEXT, ~is_picture), (VISION, is_picture)):
                own = np.bincount(
                    index[mask].ravel(), weights[mask].ravel(), minlength=shapes[f"blk.{layer}.ffn_up_exps.weight"][2]
                )
                found.gate_weights[kind][layer] += own
        found.lookups = found.lookups + at_rows[~is_picture].square().sum(0).numpy()
    return found


def flat(x: Tensor) -> Tensor:
    """[n_tokens, n]."""
    return x.detach().reshape(-1, x.shape[-1])


class _Adder:
    def __init__(self, found: Whole, is_picture: Any) -> None:
        self.found, self.is_picture = found, is_picture

    def __call__(self, name: str, n: int, matrix: int, tokens: Any, x: Tensor, g: Tensor) -> None:
        for row, token in enumerate(tokens):
            kind = VISION if self.is_picture[token] else TEXT
            place = np.zeros((n, 1))
            place[matrix] = 1
            squares = x[row].square().numpy()
            self.found.activation[kind][name] += place * squares
            self.found.gradient[kind][name] += place * float(g[row].square().sum()) * squares
            self.found.counts[kind][name] += place[:, 0]


@dataclass
class Case:
    source: HuggingFaceSource
    windows: list[Window]
    measured: Modalities
    whole: Whole


def run(source: HuggingFaceSource, windows: list[Window], scratch: Path, threads: int = 2) -> Modalities:
    return calibrate_mixed(
        *(source, windows, ("text.txt", "pictures")),
        **{"n_ctx": 14, "fisher": True, "seed": 3, "threads": threads},
        scratch=scratch,
        progress=SilentProgress(),
    )


@pytest.fixture(scope="module", params=NAMES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    folder = tmp_path_factory.mktemp("mixed")
    build, opened = VISION_LANGUAGE[request.param]
    source = open_source(build(folder / "model", "float32"), CONVERTERS, pre="gpt-2")
    assert isinstance(source, HuggingFaceSource)
    windows = mixed_windows(64)
    labels: dict[int, Tensor] = {}
    drawn = passes._sampled_gradient
    with pytest.MonkeyPatch.context() as patch:

        def noting(logits: Tensor, generator: torch.Generator) -> Tensor:
            g = drawn(logits, generator)
            labels[generator.initial_seed()] = g.argmax(-1)
            return g

        patch.setattr(passes, "_sampled_gradient", noting)
        measured = run(source, windows, folder)
    model = opened(folder / "model").to(torch.float64)
    model.requires_grad_(False)
    shapes = {t.name: t.shape for t in source.tensors}
    return Case(source, windows, measured, whole_model(model, windows, [labels[s] for s in sorted(labels)], shapes))


def test_sums_of_each_kind_are_those_of_the_whole_model(case: Case) -> None:
    for kind in KINDS:
        tally = case.measured.tallies[kind]
        of_kind = case.whole.activation[kind], case.whole.gradient[kind]
        for ours, whole in zip((tally.activation, tally.gradient), of_kind, strict=True):
            expected = dict(whole)
            if ours is tally.gradient and kind == TEXT:
                expected[EMBEDDING] = case.whole.lookups[None]
            # latent attention's activations are llama.cpp's, compared with llama-imatrix; routers are not watched here
            extra = {name for name in ours.values if name not in expected}
            assert all("_b.weight" in name or "ffn_gate_inp.weight" in name for name in extra)
            assert expected.keys() <= ours.values.keys()
            for name, want in expected.items():
                want = np.reshape(want, ours.values[name].shape)
                np.testing.assert_allclose(ours.values[name], want, rtol=3e-4, atol=1e-7 * want.mean(), err_msg=name)
                if name in case.whole.counts[kind]:
                    np.testing.assert_array_equal(ours.counts[name], case.whole.counts[kind][name], err_msg=name)
        for layer, want in case.whole.gate_weights[kind].items():
            np.testing.assert_allclose(tally.gate_weights[layer], want, rtol=1e-5)
    # text reaches pictures' positions by its gradient alone
    assert case.measured.tallies[VISION].gradient.values["blk.1.attn_output.weight"].sum() > 0


def test_counts_add_up(case: Case) -> None:
    n_text = sum(int((w.tokens >= 0).sum()) for w in case.windows)
    n_vision = sum(int((w.tokens < 0).sum()) for w in case.windows)
    assert case.measured.n_tokens == {TEXT: n_text, VISION: n_vision} == {TEXT: 44, VISION: 37}
    together = case.measured.statistics(None)
    assert together.routing is not None
    assert together.routing.n_tokens == n_text + n_vision
    assert together.routing.token_counts.sum() == n_text
    n_used = next(kv.value for key, kv in case.source.kvs.items() if key.endswith(".expert_used_count"))
    by_kind = case.measured.routing(None)
    for layer, counts in together.routing.counts.items():
        np.testing.assert_array_equal(counts, by_kind.counts[layer][TEXT] + by_kind.counts[layer][VISION])
        assert by_kind.counts[layer][VISION].sum() == n_used * n_vision
        assert counts.sum() == n_used * (n_text + n_vision)
    assert routing_by_kind(by_kind.as_dict()).as_dict() == by_kind.as_dict()


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_a_weight_gives_pictures_that_share(case: Case, weight: float, tmp_path: Path) -> None:
    found = case.measured.statistics(weight)
    assert found.activation is not None
    assert found.gradient is not None
    assert found.routing is not None
    # 44 tokens of text, 37 of pictures
    text, vision = (1 - weight) * 81 / 44, weight * 81 / 37
    kinds = [(case.measured.tallies[TEXT], text), (case.measured.tallies[VISION], vision)]
    for imatrix, which in ((found.activation, "activation"), (found.gradient, "gradient")):
        for name, entry in imatrix.entries.items():
            sums = sum(f * getattr(t, which).values.get(name, np.zeros(1)) for t, f in kinds)
            counts = sum(f * getattr(t, which).counts.get(name, np.zeros(1)) for t, f in kinds)
            reached = np.broadcast_to(counts > 0, len(entry.counts))
            np.testing.assert_allclose(entry.counts[reached], counts[reached], rtol=1e-6)
            # what is nowhere felt gets a prior, as ever
            felt = np.broadcast_to((sums > 0) & (counts > 0)[..., None], entry.sums.shape)
            assert felt.any() or weight == 1
            got = entry.sums.astype(np.float64) * imatrix.scale
            np.testing.assert_allclose(got[felt], np.broadcast_to(sums, felt.shape)[felt], rtol=1e-5, err_msg=name)
            assert (entry.sums > 0).all()
            np.testing.assert_array_equal(entry.counts[~reached], 1)
    attention = found.activation.entries["blk.0.attn_output.weight"]
    assert attention.counts[0] == pytest.approx(81)
    assert found.routing.n_tokens == 81
    write_imatrix(found.activation, tmp_path / "imatrix.gguf")
    assert read_imatrix(tmp_path / "imatrix.gguf").datasets == ("text.txt", "pictures")


def test_threads_and_a_file_change_no_bit(case: Case, tmp_path: Path) -> None:
    write_modalities(case.measured, tmp_path / "a.safetensors", "x")
    write_modalities(run(case.source, case.windows, tmp_path, threads=1), tmp_path / "b.safetensors", "x")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    again = read_modalities(tmp_path / "a.safetensors")
    for kind in KINDS:
        for name, values in case.measured.tallies[kind].gradient.values.items():
            np.testing.assert_array_equal(again.tallies[kind].gradient.values[name], values)
    assert again.routing(0.5).as_dict() == case.measured.routing(0.5).as_dict()
    (tmp_path / "a.safetensors").write_bytes((tmp_path / "a.safetensors").read_bytes()[:-3])
    with pytest.raises(FormatError, match="calibrate with --images again"):
        read_modalities(tmp_path / "a.safetensors")


def test_text_alone_is_as_ever(case: Case, tmp_path: Path) -> None:
    """The windows of text by themselves give what they give beside pictures' tally of nothing."""
    tokens = np.stack([w.tokens for w in case.windows[:2]])
    options: dict[str, Any] = {"fisher": True, "seed": 3, "threads": 1, "progress": SilentProgress()}
    alone = calibrate(case.source, tokens, "text.txt", scratch=tmp_path, **options)
    assert alone.activation is not None
    mixed = run(case.source, case.windows[:2], tmp_path)
    assert mixed.n_tokens[VISION] == 0
    for weight in (None, 0.5):
        other = mixed.statistics(weight).activation
        assert other is not None
        for name, entry in alone.activation.entries.items():
            np.testing.assert_array_equal(other.entries[name].sums, entry.sums)


def test_who_goes_where() -> None:
    """By hand: four experts; one that only pictures reach, one that only text reaches."""

    def tally(*counts: float) -> Tally:
        name = "blk.2.ffn_down_exps.weight"
        return Tally(Sums({name: np.ones((4, 3))}, {name: np.array(counts)}))

    tallies = {TEXT: tally(6, 2, 0, 0), VISION: tally(0, 2, 2, 0)}
    options: dict[str, Any] = {"n_windows": 2, "n_ctx": 8, "n_pictures": 1, "fisher": False}
    found = Modalities(tallies, {TEXT: 8, VISION: 4}, np.ones(9), ("a", "b"), **options).routing(0.5)
    assert found.alone(VISION) == [(2, 2)]
    assert found.alone(TEXT) == [(2, 0)]
    # shares 3/4, 1/4, 0, 0 and 0, 1/2, 1/2, 0
    assert found.distance() == pytest.approx(0.75)
    assert dict(found.rows())["pictures"] == "1 picture, 4 of 12 tokens, counted as 50 %"
    assert dict(found.rows())["routing"].startswith(
        "of 4 experts 1 see pictures alone, 1 text alone; shares differ by 0.75"
    )
