"""Qwen3-MoE: q and k normed head by head, softmax over all experts, top-k, weights renormalised.

Tensor names: transformers' ``Qwen3MoeForCausalLM``, llama.cpp's ``qwen3moe``. Its text tables serve Qwen3-VL-MoE too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from converters.key_values import add_text_parameters, as_kvs, need_number, start_writer, with_defaults
from converters.rope_settings import check_rope
from converters.tensor_table import Experts, Row, Shapes, Sizes, Tables, check_only, decoder_rows, recipes_of, sizes_of
from converters.vocabulary import add_bpe_vocabulary
from mopeq_edge.gguf_file import KV
from mopeq_edge.source.converter import Config, Converter, Recipe
from mopeq_edge.source.model import SourceTensor

ARCHITECTURE = "qwen3moe"

LAYER: Mapping[str, Row] = {
    "input_layernorm.weight": Row("attn_norm.weight", ("hidden",), f32=True),
    "self_attn.q_proj.weight": Row("attn_q.weight", ("hidden", "q")),
    "self_attn.k_proj.weight": Row("attn_k.weight", ("hidden", "kv")),
    "self_attn.v_proj.weight": Row("attn_v.weight", ("hidden", "kv")),
    "self_attn.o_proj.weight": Row("attn_output.weight", ("q", "hidden")),
    "self_attn.q_norm.weight": Row("attn_q_norm.weight", ("head_dim",), f32=True),
    "self_attn.k_norm.weight": Row("attn_k_norm.weight", ("head_dim",), f32=True),
    "post_attention_layernorm.weight": Row("ffn_norm.weight", ("hidden",), f32=True),
    "mlp.gate.weight": Row("ffn_gate_inp.weight", ("hidden", "expert"), f32=True),
}
_EXPERTS = Experts("mlp.experts", {"down": "down_proj", "gate": "gate_proj", "up": "up_proj"}, packed=True)
_SIZES = {"hidden": "hidden_size", "ff": "moe_intermediate_size", "expert": "num_experts", "vocab": "vocab_size"}
ONLY: Mapping[str, object] = {
    **{"hidden_act": "silu", "attention_bias": False, "use_sliding_window": False},
    **{"decoder_sparse_step": 1, "mlp_only_layers": []},
}
"""What llama.cpp's graph computes: full attention without biases, experts in every layer."""

_ASSUMED: Mapping[str, Any] = {
    **{"max_position_embeddings": 32768, "num_key_value_heads": 4, "rms_norm_eps": 1e-6, "norm_topk_prob": False},
    **{"intermediate_size": 6144, "moe_intermediate_size": 768, "num_experts": 128, "num_experts_per_tok": 8},
}


def recipes(config: Config, shapes: Shapes) -> list[Recipe]:
    """Recipes in the order of ``shapes``."""
    config = _with_defaults(config)
    check_only(config, {**ONLY, "norm_topk_prob": True}, "Qwen3-MoE")
    check_rope(config, ARCHITECTURE, "Qwen3-MoE")
    model = decoder_rows(config, shapes)
    n_layer = need_number(config, "num_hidden_layers")
    return recipes_of(Tables("a Qwen3-MoE", model, lambda _: LAYER, _EXPERTS, sizes(config), n_layer), shapes)


def sizes(config: Config) -> Sizes:
    """Sizes that the axes of :data:`LAYER` and of the experts have."""
    heads, heads_kv = need_number(config, "num_attention_heads"), need_number(config, "num_key_value_heads")
    said = config.get("head_dim") is not None
    head_dim = need_number(config, "head_dim") if said else need_number(config, "hidden_size") // heads
    return {**sizes_of(config, _SIZES), "head_dim": head_dim, "q": heads * head_dim, "kv": heads_kv * head_dim}


def key_values(
    directory: Path, config: Config, tensors: Sequence[SourceTensor], file_type: int, pre: str | None
) -> dict[str, KV]:
    """Key-values as llama.cpp's converter writes them."""
    config = _with_defaults(config)
    writer = start_writer(directory, ARCHITECTURE, tensors)
    extras = [("add_expert_feed_forward_length", need_number(config, "moe_intermediate_size"))]
    add_text_parameters(writer, config, file_type, extras)
    add_bpe_vocabulary(writer, directory, need_number(config, "vocab_size"), pre)
    return as_kvs(writer)


QWEN3_MOE = Converter(ARCHITECTURE, recipes, key_values)


def _with_defaults(config: Config) -> Config:
    """``config`` with what transformers' ``Qwen3MoeConfig`` assumes; it knows the number of experts by two names."""
    if config.get("num_local_experts") is not None:
        config = {**config, "num_experts": config["num_local_experts"]}
    return with_defaults(config, _ASSUMED)
