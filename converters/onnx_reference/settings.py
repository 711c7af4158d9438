"""What a GGUF's architecture and key-values say about the computation, as switches and numbers.

One row of :data:`ARCHITECTURES` an architecture, for those that our converters write; what the rows say is what
llama.cpp's graphs of these architectures do.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum


class Pairs(Enum):
    """Which two numbers of a head rope turns together."""

    NEIGHBOURS = "2i and 2i + 1"
    HALVES = "i and i + n_rot / 2"


class Norm(Enum):
    """Over what q and k are normed before rope."""

    NONE = "nothing"
    WHOLE = "all heads together"
    HEAD = "each head"


class Gating(Enum):
    """How a router's logits become scores; the numbers are those of ``expert_gating_func``."""

    SOFTMAX = 1
    SIGMOID = 2
    SOFTMAX_OF_CHOSEN = 3
    """The logits choose, and the softmax goes over the chosen ones alone."""


class Shared(Enum):
    """The expert that all tokens have."""

    NONE = "none"
    PLAIN = "added"
    GATED = "added times a sigmoid of its own"


@dataclass(frozen=True)
class Switches:
    """How an architecture computes, whatever the sizes."""

    pairs: Pairs
    normalised: bool | None
    """Whether the weights of the chosen experts are divided by their sum; None: the file says."""
    gating: Gating | None = Gating.SOFTMAX
    """None: the file says."""
    shared: Shared = Shared.NONE
    qk_norm: Norm = Norm.NONE
    latent: bool = False
    """Multi-head latent attention, with the key matrices on the query's side."""
    sections: bool = False
    """Rope for time, height and width (and a fourth, which is 0 for text), interleaved."""
    scaled_rope: bool = True
    """Whether a scaling in the key-values is read."""
    rope_factors: bool = False
    """Whether ``rope_freqs.weight`` is read."""
    qkv_bias: bool = False
    output_bias: bool = False
    sinks: bool = False
    windows: bool = False
    router_bias: bool = False
    expert_bias: bool = False
    clamped: bool = False
    """gpt-oss's activation instead of SwiGLU."""
    dense_first: bool = False
    """Leading layers without experts; the file says how many. Such files also scale the weights of the chosen."""
    multipliers: bool = False
    """Granite's, of embeddings, residuals, attention scores and logits."""
    own_expert_width: bool = True
    """Whether ``expert_feed_forward_length`` is read; else ``feed_forward_length`` is the experts'."""
    tied: bool = True
    """Whether a missing ``output.weight`` means that of the embedding."""
    fused: bool = False
    """Whether gate and up of an expert may be one tensor."""
    ffn_norm: str = "ffn_norm.weight"


_DEEPSEEK = Switches(
    pairs=Pairs.NEIGHBOURS,
    normalised=None,
    gating=None,
    shared=Shared.PLAIN,
    latent=True,
    dense_first=True,
    fused=True,
)

ARCHITECTURES: Mapping[str, Switches] = {
    "olmoe": Switches(Pairs.HALVES, normalised=False, qk_norm=Norm.WHOLE, own_expert_width=False, tied=False),
    "llama": Switches(Pairs.NEIGHBOURS, normalised=True, rope_factors=True, own_expert_width=False),
    "granitemoe": Switches(
        Pairs.NEIGHBOURS, normalised=True, rope_factors=True, own_expert_width=False, multipliers=True
    ),
    "qwen2moe": Switches(Pairs.HALVES, normalised=False, shared=Shared.GATED, qkv_bias=True, tied=False),
    "qwen3moe": Switches(Pairs.HALVES, normalised=True, qk_norm=Norm.HEAD),
    "qwen3vlmoe": Switches(Pairs.HALVES, normalised=True, qk_norm=Norm.HEAD, sections=True),
    "deepseek2": _DEEPSEEK,
    "deepseek2-ocr": Switches(
        Pairs.HALVES,
        normalised=None,
        gating=None,
        shared=Shared.PLAIN,
        scaled_rope=False,
        dense_first=True,
        fused=True,
    ),
    "gpt-oss": Switches(
        Pairs.HALVES,
        normalised=False,
        gating=Gating.SOFTMAX_OF_CHOSEN,
        qkv_bias=True,
        output_bias=True,
        sinks=True,
        windows=True,
        router_bias=True,
        expert_bias=True,
        clamped=True,
        tied=False,
        ffn_norm="post_attention_norm.weight",
    ),
}


@dataclass(frozen=True)
class Rope:
    """Angle of pair i at position p: p * freq_base^(-2i / n_rot), scaled linearly or by yarn."""

    n_rot: int
    freq_base: float
    freq_scale: float
    """What linear scaling multiplies angles with."""
    ext_factor: float
    """0: linear; 1: yarn's mixture of scaled and unscaled angles."""
    attn_factor: float
    """What sines and cosines are multiplied with, before yarn's own factor."""
    n_ctx_orig: int
    sections: tuple[int, int, int, int] | None
    """Pairs for time, height, width and a fourth."""


@dataclass(frozen=True)
class Latent:
    """Sizes of latent attention: ranks of the query's latent (0: none) and of the keys' and values', and of a head."""

    q_rank: int
    kv_rank: int
    key: int
    """Without rope's part."""
    value: int


@dataclass(frozen=True)
class Router:
    n_expert: int
    n_used: int
    n_groups: int
    """1: all experts compete."""
    n_groups_used: int
    gating: Gating
    normalised: bool
    scale: float


@dataclass(frozen=True)
class Settings:
    """Everything about a file that is not a weight."""

    architecture: str
    switches: Switches
    n_layer: int
    n_embd: int
    n_vocab: int
    n_head: int
    n_head_kv: int
    key_length: int
    value_length: int
    eps: float
    kq_scale: float
    rope: Rope
    windowed_rope: Rope
    """Of the layers with a window."""
    windows: tuple[int, ...]
    """Positions that a token sees in each layer, itself included; 0: all."""
    latent: Latent | None
    router: Router
    n_dense: int
    """Leading layers without experts."""
    n_ff: int
    n_ff_exp: int
    n_ff_shared: int
    """0: no shared expert."""
    embedding_scale: float
    residual_scale: float
    logit_scale: float
    """What logits are divided by."""

    def has_experts(self, layer: int) -> bool:
        return layer >= self.n_dense
