"""Which graph llama.cpp builds for an architecture: the order of norms, heads and experts (``src/models``)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from mopeq_edge.memory import graph as g
from mopeq_edge.memory.blocks import SOFTMAX, SOFTMAX_OF_CHOSEN, Blocks
from mopeq_edge.memory.graph import Graph, Tensor
from mopeq_edge.memory.kv_cache import KVCache
from mopeq_edge.memory.model import Model
from mopeq_edge.memory.settings import Resolved, Settings


@dataclass(frozen=True)
class Traits:
    """How the graphs differ.

    ``flat_norms``: q and k are normed before they are cut into heads. ``normalise``: the chosen experts' weights sum to
    one (None: the key says). ``gating``: None if the key says. ``late_outputs``: all rows go through the last layer.
    ``keeps_hidden``: the last hidden states stay, for heads that predict several tokens. ``scales``: Granite's
    multipliers of residuals and logits.
    """

    flat_norms: bool = False
    normalise: bool | None = False
    gating: int | None = SOFTMAX
    ffn_norm: str = "ffn_norm"
    late_outputs: bool = False
    keeps_hidden: bool = False
    scales: bool = False


ARCHITECTURES: Mapping[str, Traits] = {
    "olmoe": Traits(flat_norms=True),
    "llama": Traits(normalise=True),
    "qwen2moe": Traits(),
    "qwen3moe": Traits(normalise=True),
    "qwen3vlmoe": Traits(normalise=True),
    "granitemoe": Traits(normalise=True, scales=True),
    "gpt-oss": Traits(gating=SOFTMAX_OF_CHOSEN, ffn_norm="post_attention_norm", late_outputs=True, keeps_hidden=True),
    "deepseek": Traits(),
    "deepseek2": Traits(normalise=None, gating=None, keeps_hidden=True),
    "deepseek2-ocr": Traits(normalise=None, gating=None, keeps_hidden=True),
}
"""Architectures whose compute buffer is checked against llama.cpp's own figure."""

SIMILAR = Traits(normalise=True, gating=None)
"""For all others: near, not exact."""


def is_exact(architecture: str) -> bool:
    """Whether the compute buffer is llama.cpp's to the byte, else an estimate from a similar graph."""
    return architecture in ARCHITECTURES


def build_graph(
    model: Model, settings: Settings, resolved: Resolved, cache: KVCache, n_tokens: int, n_outputs: int
) -> Graph:
    """The graph for one batch with a full cache."""
    architecture = model.hparams.architecture
    near = not is_exact(architecture)
    blocks = Blocks(model, settings, resolved, cache, n_tokens, n_outputs, near=near)
    return _Builder(blocks, ARCHITECTURES.get(architecture, SIMILAR)).build()


class _Builder:
    def __init__(self, blocks: Blocks, traits: Traits) -> None:
        self.b, self.traits, self.hparams = blocks, traits, blocks.hparams

    def build(self) -> Graph:
        b, traits = self.b, self.traits
        x = b.embed()
        last = self.hparams.n_layer - 1
        for layer in range(self.hparams.n_layer):
            x = self.layer(layer, x, picks=layer == last and not traits.late_outputs)
        hidden = x
        if traits.late_outputs:
            x = b.pick_outputs(x)
        x = b.norm(x, "output_norm")
        if traits.keeps_hidden:
            (hidden if traits.late_outputs else x).output = True
        x.output = True
        head = "output" if b.has("output.weight") else "token_embd"
        logits = g.mul_mat(b.need(f"{head}.weight"), x)
        if traits.scales:
            logits = g.same("scale", logits)
        logits.output = True
        b.graph.add(logits)
        return b.graph

    def layer(self, layer: int, x: Tensor, *, picks: bool) -> Tensor:
        b, traits, hparams, prefix = self.b, self.traits, self.hparams, f"blk.{layer}"
        normed = b.norm(x, f"{prefix}.attn_norm")
        if hparams.is_mla or b.has(f"{prefix}.attn_kv_a_mqa.weight"):
            y = self.latent_attention(layer, normed)
        elif b.near and not b.has(f"{prefix}.attn_k.weight"):
            # convolutions, recurrences: no scores, at most as wide as the hidden states
            y = g.same("unary", normed)
        else:
            y = self.attention(layer, normed)
        if picks:
            y, x = b.pick_outputs(y), b.pick_outputs(x)
        if traits.scales and hparams.number("residual_scale"):
            y = g.same("scale", y)
        middle = g.same("add", y, x)
        y = self.network(layer, b.norm(middle, f"{prefix}.{self.norm_name(prefix)}"))
        if traits.scales and hparams.number("residual_scale"):
            y = g.same("scale", y)
        y = g.same("add", y, middle)
        if layer < hparams.n_deepstack:
            # pictures come in with the embeddings and are added behind the first layers
            y = g.same("add", y, b.deepstack())
        return y

    def norm_name(self, prefix: str) -> str:
        names = (self.traits.ffn_norm, "ffn_norm", "post_attention_norm")
        return next((name for name in names if self.b.has(f"{prefix}.{name}.weight")), names[0])

    def attention(self, layer: int, x: Tensor) -> Tensor:
        b, hparams, prefix = self.b, self.hparams, f"blk.{layer}"
        n_head, n_head_kv, head = hparams.n_head[layer], hparams.n_head_kv[layer], hparams.head_k
        q, k, v = (b.linear(f"{prefix}.attn_{name}", x) for name in ("q", "k", "v"))
        normed = b.has(f"{prefix}.attn_q_norm.weight")
        if normed and self.traits.flat_norms:
            q, k = b.norm(q, f"{prefix}.attn_q_norm"), b.norm(k, f"{prefix}.attn_k_norm")
        q = g.reshape(q, head, n_head, b.n_tokens)
        k = g.reshape(k, head, n_head_kv, b.n_tokens)
        v = g.reshape(v, hparams.head_v, n_head_kv, b.n_tokens)
        if normed and not self.traits.flat_norms:
            q, k = b.norm(q, f"{prefix}.attn_q_norm"), b.norm(k, f"{prefix}.attn_k_norm")
        q, k = b.rope(q), b.rope(k)
        return b.attend(layer, q, k, v, b.weight(f"{prefix}.attn_sinks.weight"))

    def latent_attention(self, layer: int, x: Tensor) -> Tensor:
        """DeepSeek's MLA: queries meet the compressed keys; without the keys of MLA they are taken apart first."""
        b, hparams, prefix = self.b, self.hparams, f"blk.{layer}"
        n, n_head, rope, lora = b.n_tokens, hparams.n_head[layer], hparams.n_rot, hparams.kv_lora
        head_k = hparams.head_k_mla or hparams.head_k
        head_v = hparams.head_v_mla or hparams.head_v
        if b.has(f"{prefix}.attn_q.weight"):
            q = b.linear(f"{prefix}.attn_q", x)
        else:
            q = b.linear(f"{prefix}.attn_q_a", x)
            q = b.linear(f"{prefix}.attn_q_b", b.norm(q, f"{prefix}.attn_q_a_norm"))
        q = g.reshape(q, head_k, n_head, n)
        both = b.linear(f"{prefix}.attn_kv_a_mqa", x)
        compressed = g.view(both, (lora, n), both.nb[1:2])
        k_rope = b.rope(g.view(both, (rope, 1, n), (both.nb[1], both.nb[1])))
        compressed = b.norm(compressed, f"{prefix}.attn_kv_a_norm")
        if not hparams.is_mla:
            return self.expanded_attention(layer, q, compressed, k_rope, head_k - rope, head_v)
        q_plain = g.view(q, (head_k - rope, n_head, n), q.nb[1:3])
        q_rope = b.rope(g.view(q, (rope, n_head, n), q.nb[1:3]))
        absorbed = g.mul_mat(b.need(f"{prefix}.attn_k_b.weight"), g.permute(q_plain, 0, 2, 1, 3))
        query = g.concat(g.permute(absorbed, 0, 2, 1, 3), q_rope)
        key = g.concat(g.reshape(compressed, lora, 1, n), k_rope)
        return b.attend_latent(layer, query, key, lora)

    def expanded_attention(
        self, layer: int, q: Tensor, compressed: Tensor, k_rope: Tensor, n_plain: int, head_v: int
    ) -> Tensor:
        b, n_head, n = self.b, self.hparams.n_head[layer], self.b.n_tokens
        kv = b.linear(f"blk.{layer}.attn_kv_b", compressed)
        step = kv.type.nbytes(n_plain + head_v)
        k_plain = g.view(kv, (n_plain, n_head, n), (step, step * n_head))
        v = g.cont(g.view(kv, (head_v, n_head, n), (step, step * n_head)))
        q = b.rope(q)
        k = g.concat(k_plain, g.repeat(k_rope, k_rope.ne[0], n_head, n))
        return b.attend(layer, q, k, v)

    def network(self, layer: int, x: Tensor) -> Tensor:
        b, hparams, traits, prefix = self.b, self.hparams, self.traits, f"blk.{layer}"
        if not b.has(f"{prefix}.ffn_gate_inp.weight"):
            return b.feed_forward(x, prefix)
        normalise = traits.normalise
        if normalise is None:
            kv = hparams.keys.get(f"{hparams.architecture}.expert_weights_norm")
            normalise = bool(kv.value) if kv is not None else False
        gating = traits.gating or int(hparams.number("expert_gating_func", SOFTMAX)) or SOFTMAX
        scale = hparams.number("expert_weights_scale")
        y = b.experts(x, layer, gating=gating, normalise=normalise, scale=scale)
        if not b.has(f"{prefix}.ffn_up_shexp.weight"):
            return y
        gate = None
        if b.has(f"{prefix}.ffn_gate_inp_shexp.weight"):
            logit = g.mul_mat(b.need(f"{prefix}.ffn_gate_inp_shexp.weight"), x)
            gate = g.same("div", g.same("unary", logit), logit)
        shared = b.feed_forward(x, prefix, "_shexp")
        if gate is not None:
            shared = g.same("mul", shared, gate)
        return g.same("add", y, shared)
