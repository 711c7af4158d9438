"""Qwen2-MoE (Qwen1.5-MoE too): biases in q, k and v, routed experts without renormalising, one gated shared expert.

Tensor names: transformers' ``Qwen2MoeForCausalLM``, llama.cpp's ``qwen2moe``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from converters.key_values import add_text_parameters, as_kvs, need_number, start_writer, with_defaults
from converters.rope_settings import check_rope
from converters.tensor_table import Experts, Row, Shapes, Tables, check_only, decoder_rows, recipes_of, sizes_of
from converters.vocabulary import add_bpe_vocabulary
from mopeq_edge.gguf_file import KV
from mopeq_edge.source.converter import Config, Converter, Recipe
from mopeq_edge.source.model import SourceTensor

ARCHITECTURE = "qwen2moe"

_LAYER: Mapping[str, Row] = {
    "input_layernorm.weight": Row("attn_norm.weight", ("hidden",), f32=True),
    "self_attn.q_proj.weight": Row("attn_q.weight", ("hidden", "hidden")),
    "self_attn.q_proj.bias": Row("attn_q.bias", ("hidden",), f32=True),
    "self_attn.k_proj.weight": Row("attn_k.weight", ("hidden", "kv")),
    "self_attn.k_proj.bias": Row("attn_k.bias", ("kv",), f32=True),
    "self_attn.v_proj.weight": Row("attn_v.weight", ("hidden", "kv")),
    "self_attn.v_proj.bias": Row("attn_v.bias", ("kv",), f32=True),
    "self_attn.o_proj.weight": Row("attn_output.weight", ("hidden", "hidden")),
    "post_attention_layernorm.weight": Row("ffn_norm.weight", ("hidden",), f32=True),
    "mlp.gate.weight": Row("ffn_gate_inp.weight", ("hidden", "expert"), f32=True),
    "mlp.shared_expert_gate.weight": Row("ffn_gate_inp_shexp.weight", ("hidden", "one"), f32=True),
    "mlp.shared_expert.gate_proj.weight": Row("ffn_gate_shexp.weight", ("hidden", "shared")),
    "mlp.shared_expert.up_proj.weight": Row("ffn_up_shexp.weight", ("hidden", "shared")),
    "mlp.shared_expert.down_proj.weight": Row("ffn_down_shexp.weight", ("shared", "hidden")),
}
_EXPERTS = Experts("mlp.experts", {"down": "down_proj", "gate": "gate_proj", "up": "up_proj"}, packed=True)
_SIZES = {
    **{"hidden": "hidden_size", "ff": "moe_intermediate_size", "shared": "shared_expert_intermediate_size"},
    **{"expert": "num_experts", "vocab": "vocab_size"},
}
_ASSUMED: Mapping[str, Any] = {
    **{"max_position_embeddings": 32768, "num_key_value_heads": 16, "rms_norm_eps": 1e-6, "num_experts": 60},
    **{"intermediate_size": 5632, "moe_intermediate_size": 1408, "shared_expert_intermediate_size": 5632},
    "num_experts_per_tok": 4,
}


def recipes(config: Config, shapes: Shapes) -> list[Recipe]:
    """Recipes in the order of ``shapes``."""
    config = with_defaults(config, _ASSUMED)
    hidden, heads = need_number(config, "hidden_size"), need_number(config, "num_attention_heads")
    only = {
        **{"hidden_act": "silu", "qkv_bias": True, "norm_topk_prob": False},
        **{"use_sliding_window": False, "decoder_sparse_step": 1, "mlp_only_layers": []},
        "head_dim": hidden // heads,
    }
    check_only(config, only, "Qwen2-MoE")
    check_rope(config, ARCHITECTURE, "Qwen2-MoE")
    if isinstance(kinds := config.get("layer_types"), list):
        check_only(config, {"layer_types": ["full_attention"] * len(kinds)}, "Qwen2-MoE")
    sizes = {**sizes_of(config, _SIZES), "kv": need_number(config, "num_key_value_heads") * (hidden // heads), "one": 1}
    n_layer = need_number(config, "num_hidden_layers")
    # llama.cpp loads no Qwen2-MoE without an output matrix
    model = decoder_rows(config, shapes, needs_output=True)
    return recipes_of(Tables("a Qwen2-MoE", model, lambda _: _LAYER, _EXPERTS, sizes, n_layer), shapes)


def key_values(
    directory: Path, config: Config, tensors: Sequence[SourceTensor], file_type: int, pre: str | None
) -> dict[str, KV]:
    """Key-values as llama.cpp's converter writes them."""
    config = with_defaults(config, _ASSUMED)
    extras = [
        ("add_expert_feed_forward_length", need_number(config, "moe_intermediate_size")),
        ("add_expert_shared_feed_forward_length", need_number(config, "shared_expert_intermediate_size")),
    ]
    writer = start_writer(directory, ARCHITECTURE, tensors)
    add_text_parameters(writer, config, file_type, extras)
    add_bpe_vocabulary(writer, directory, need_number(config, "vocab_size"), pre)
    return as_kvs(writer)


QWEN2_MOE = Converter(ARCHITECTURE, recipes, key_values)
