"""Settings from the key-values, read as llama.cpp reads them: which keys, which defaults, in which architecture."""

from __future__ import annotations

import math
from dataclasses import replace

from converters.onnx_reference.keys import Keys
from converters.onnx_reference.settings import ARCHITECTURES, Gating, Latent, Rope, Router, Settings, Shared, Switches
from mopeq_edge.errors import FormatError, SourceError
from mopeq_edge.gguf_file import GGUFHeader

_EMBEDDING = "token_embd.weight"
_ONE_QUERY_MATRIX = (26, 27)
"""Numbers of layers of a deepseek2 in which llama.cpp does not look for the rank of the query's latent."""


def read_settings(header: GGUFHeader, *others: GGUFHeader) -> Settings:
    """The settings of a file; of a split one the first has the key-values, and any the embedding.

    Raises :class:`SourceError` for an architecture or a choice that the reference does not compute, and
    :class:`FormatError` for key-values that are missing or cannot be.
    """
    architecture = header.get("general.architecture")
    switches = ARCHITECTURES.get(architecture) if isinstance(architecture, str) else None
    if switches is None:
        raise SourceError(
            f"{header.path}: general.architecture is {architecture!r}, expected one that the ONNX reference computes: "
            f"{', '.join(ARCHITECTURES)}"
        )
    keys = Keys(header, str(architecture))
    n_layer = keys.size("block_count") - keys.integer("nextn_predict_layers", 0)
    if n_layer <= 0:
        raise keys.wrong("nextn_predict_layers", "fewer than all blocks")
    n_embd, n_vocab = keys.size("embedding_length"), _vocabulary(header, *others)
    n_head = keys.size("attention.head_count")
    if keys.integer("expert_count", 0) == 0:
        raise SourceError(f"{header.path}: has no experts; the ONNX reference is for Mixture-of-Experts models")
    key_length = keys.size("attention.key_length", n_embd // n_head)
    latent = _latent(keys, n_layer, n_vocab) if switches.latent else None
    rope = _rope(keys, switches, key_length)
    windowed = replace(rope, freq_base=keys.number("rope.freq_base_swa", rope.freq_base)) if switches.windows else rope
    n_ff = keys.integer("feed_forward_length", 0)
    router = _router(keys, switches)
    n_ff_exp = _expert_width(keys, switches, n_ff, router.n_used)
    return Settings(
        architecture=keys.architecture,
        switches=switches,
        n_layer=n_layer,
        n_embd=n_embd,
        n_vocab=n_vocab,
        n_head=n_head,
        n_head_kv=_kv_heads(keys, n_head, latent),
        key_length=key_length,
        value_length=keys.size("attention.value_length", n_embd // n_head),
        eps=keys.number("attention.layer_norm_rms_epsilon"),
        kq_scale=_kq_scale(keys, switches, rope, latent, key_length),
        rope=rope,
        windowed_rope=windowed,
        windows=_windows(keys, switches, n_layer),
        latent=latent,
        router=router,
        n_dense=min(keys.integer("leading_dense_block_count", 0), n_layer) if switches.dense_first else 0,
        n_ff=n_ff,
        n_ff_exp=n_ff_exp,
        n_ff_shared=_shared_width(keys, switches, n_ff, n_ff_exp),
        embedding_scale=_multiplier(keys, switches, "embedding_scale"),
        residual_scale=_multiplier(keys, switches, "residual_scale"),
        logit_scale=keys.number("logit_scale") if switches.multipliers else 1.0,
    )


def _vocabulary(*headers: GGUFHeader) -> int:
    for info in (info for header in headers for info in header.tensors):
        if info.name == _EMBEDDING and len(info.shape) == 2:
            return info.shape[1]
    raise FormatError(f"{headers[0].path}: tensor '{_EMBEDDING}' of two axes is missing; convert it again")


def _kv_heads(keys: Keys, n_head: int, latent: Latent | None) -> int:
    n_head_kv = keys.size("attention.head_count_kv", n_head)
    if n_head % n_head_kv or (latent is not None and n_head_kv != 1):
        raise keys.wrong("attention.head_count_kv", f"a divisor of {n_head} heads" if latent is None else "1")
    return n_head_kv


def _latent(keys: Keys, n_layer: int, n_vocab: int) -> Latent:
    if keys.number("attention.temperature_scale", 0.0) != 0:
        raise SourceError(
            f"{keys.header.path}: its attention has a temperature that grows with the text "
            f"({keys.architecture}.attention.temperature_scale), which the ONNX reference does not compute"
        )
    one_matrix = n_layer in _ONE_QUERY_MATRIX or (n_layer, n_vocab) == (48, 128256)
    n_rot = keys.size("rope.dimension_count")
    key = keys.size("attention.key_length_mla") - n_rot
    if key <= 0:
        raise keys.wrong("attention.key_length_mla", f"more than the {n_rot} numbers that rope turns")
    return Latent(
        q_rank=0 if one_matrix else keys.integer("attention.q_lora_rank"),
        kv_rank=keys.size("attention.kv_lora_rank"),
        key=key,
        value=keys.size("attention.value_length_mla"),
    )


def _rope(keys: Keys, switches: Switches, key_length: int) -> Rope:
    base = keys.number("rope.freq_base", 10000.0)
    n_rot = keys.integer("rope.dimension_count", key_length) if switches.scaled_rope else key_length
    if n_rot % 2 or n_rot == 0 or (not switches.latent and n_rot != key_length):
        raise keys.wrong("rope.dimension_count", f"the {key_length} numbers of a head")
    if not switches.scaled_rope:
        # llama.cpp turns with base 10000 and nothing else here
        return Rope(n_rot, 10000.0, 1.0, 0.0, 1.0, 0, None)
    kind = keys.text("rope.scaling.type", "linear")
    if kind not in ("none", "linear", "yarn"):
        raise SourceError(
            f"{keys.header.path}: {keys.architecture}.rope.scaling.type is {kind!r}, expected none, linear or yarn: "
            "the ONNX reference computes no other"
        )
    factor = keys.number("rope.scaling.factor", keys.number("rope.scale_linear", 0.0))
    freq_scale = 1.0 if factor == 0 or kind == "none" else 1.0 / factor
    n_ctx_orig = keys.integer("rope.scaling.original_context_length", keys.integer("context_length"))
    attn_factor = keys.number("rope.scaling.attn_factor", 1.0)
    if kind == "yarn":
        attn_factor *= _yarn_attention(keys, 1.0 / freq_scale)
    sections = _sections(keys) if switches.sections else None
    return Rope(n_rot, base, freq_scale, float(kind == "yarn"), attn_factor, n_ctx_orig, sections)


def _log_mul(keys: Keys) -> float:
    """yarn's mscale for all dimensions; the file holds a tenth of it. llama.cpp reads it for deepseek2 alone."""
    return keys.number("rope.scaling.yarn_log_multiplier", 0.0) / 0.1 if keys.architecture == "deepseek2" else 0.0


def _yarn_attention(keys: Keys, factor: float) -> float:
    """llama.cpp's factor of sines and cosines, less the one that its rope adds: 1 + 0.1 ln(factor)."""
    # with a factor of all attention llama.cpp has the same above and below the line
    found = 1.0 if _log_mul(keys) != 0 else max(1.0, 1.0 + 0.1 * math.log(factor))
    return found / (1.0 + 0.1 * math.log(factor))


def _sections(keys: Keys) -> tuple[int, int, int, int]:
    found = keys.get("rope.dimension_sections")
    if not isinstance(found, list) or len(found) != 4 or any(type(n) is not int or n < 0 for n in found):
        raise keys.wrong("rope.dimension_sections", "four numbers of rotary pairs")
    if sum(found) == 0:
        raise keys.wrong("rope.dimension_sections", "some rotary pairs")
    return (found[0], found[1], found[2], found[3])


def _kq_scale(keys: Keys, switches: Switches, rope: Rope, latent: Latent | None, key_length: int) -> float:
    if switches.multipliers:
        found = keys.number("attention.scale", 0.0)
        return found if found != 0 else 1 / math.sqrt(key_length)
    if not switches.dense_first:
        return 1 / math.sqrt(key_length)
    # the DeepSeeks put yarn's factor of all attention here
    grown = math.log(1.0 / rope.freq_scale)
    factor = rope.attn_factor * (1 + 0.1 * grown) * (1 + 0.1 * _log_mul(keys) * grown)
    head = key_length if latent is None else latent.key + rope.n_rot
    return factor * factor / math.sqrt(head)


def _windows(keys: Keys, switches: Switches, n_layer: int) -> tuple[int, ...]:
    """In gpt-oss the first layer, the third and so on, unless a pattern says otherwise."""
    if not switches.windows:
        return (0,) * n_layer
    window = keys.size("attention.sliding_window")
    key = "attention.sliding_window_pattern"
    pattern = keys.get(key)
    if isinstance(pattern, list):
        if len(pattern) < n_layer:
            raise keys.wrong(key, f"{n_layer} entries")
        return tuple(window if pattern[layer] else 0 for layer in range(n_layer))
    every = keys.integer(key, 2)
    return tuple(window if every == 0 or layer % every < every - 1 else 0 for layer in range(n_layer))


def _router(keys: Keys, switches: Switches) -> Router:
    n_expert, n_used = keys.size("expert_count"), keys.size("expert_used_count")
    if n_used > n_expert:
        raise keys.wrong("expert_used_count", f"at most {n_expert}, the number of experts")
    n_groups = max(1, keys.integer("expert_group_count", 0))
    n_groups_used = keys.integer("expert_group_used_count", 0) if n_groups > 1 else 1
    size = n_expert // n_groups
    if n_expert % n_groups or (n_groups > 1 and not (0 < n_groups_used < n_groups and size >= 2)):
        raise keys.wrong("expert_group_count", f"a divisor of {n_expert} experts and more than the groups used")
    if n_groups_used * size < n_used:
        raise keys.wrong("expert_group_used_count", f"groups that have {n_used} experts")
    return Router(
        n_expert,
        n_used,
        n_groups,
        n_groups_used,
        _gating(keys) if switches.gating is None else switches.gating,
        keys.flag("expert_weights_norm", False) if switches.normalised is None else switches.normalised,
        keys.number("expert_weights_scale", 0.0) or 1.0 if switches.dense_first else 1.0,
    )


def _gating(keys: Keys) -> Gating:
    value = keys.integer("expert_gating_func", 0) or Gating.SOFTMAX.value
    if value not in (Gating.SOFTMAX.value, Gating.SIGMOID.value):
        raise keys.wrong("expert_gating_func", "1 (softmax) or 2 (sigmoid)")
    return Gating(value)


def _expert_width(keys: Keys, switches: Switches, n_ff: int, n_used: int) -> int:
    if not switches.own_expert_width:
        return keys.size("feed_forward_length")
    assumed = None if switches.dense_first or switches.windows else n_ff // n_used or None
    return keys.size("expert_feed_forward_length", assumed)


def _shared_width(keys: Keys, switches: Switches, n_ff: int, n_ff_exp: int) -> int:
    if switches.dense_first:
        return n_ff_exp * keys.integer("expert_shared_count")
    if switches.shared is Shared.GATED:
        return keys.integer("expert_shared_feed_forward_length", 0) or n_ff
    return keys.integer("expert_shared_feed_forward_length", 0) if switches.multipliers else 0


def _multiplier(keys: Keys, switches: Switches, key: str) -> float:
    """llama.cpp takes 0 for none."""
    return keys.number(key, 0.0) or 1.0 if switches.multipliers else 1.0
