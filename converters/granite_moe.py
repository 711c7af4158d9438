"""GraniteMoE: Llama's attention, packed experts, softmax over the chosen ones; embeddings, residuals, attention scores
and logits with multipliers of their own.

Tensor names: the released checkpoints' (``GraniteMoeForCausalLM``), llama.cpp's ``granitemoe``, whose rope wants the
rows of q and k interleaved.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from converters.key_values import add_text_parameters, as_kvs, need_number, start_writer, with_defaults
from converters.llama_vocabulary import add_llama_vocabulary
from converters.rope_settings import check_rope
from converters.tensor_table import Experts, Row, Shapes, Tables, check_only, decoder_rows, recipes_of, sizes_of
from mopeq_edge.errors import SourceError
from mopeq_edge.gguf_file import KV
from mopeq_edge.source.converter import Config, Converter, Recipe, Skeleton
from mopeq_edge.source.model import SourceTensor

ARCHITECTURE = "granitemoe"

_LAYER: Mapping[str, Row] = {
    "input_layernorm.weight": Row("attn_norm.weight", ("hidden",), f32=True),
    "self_attn.q_proj.weight": Row("attn_q.weight", ("hidden", "hidden"), heads="head"),
    "self_attn.k_proj.weight": Row("attn_k.weight", ("hidden", "kv"), heads="head_kv"),
    "self_attn.v_proj.weight": Row("attn_v.weight", ("hidden", "kv")),
    "self_attn.o_proj.weight": Row("attn_output.weight", ("hidden", "hidden")),
    "post_attention_layernorm.weight": Row("ffn_norm.weight", ("hidden",), f32=True),
    "block_sparse_moe.router.layer.weight": Row("ffn_gate_inp.weight", ("hidden", "expert"), f32=True),
}
_EXPERTS = Experts(
    "block_sparse_moe",
    dict.fromkeys(("gate", "up", "down"), ""),
    packed=True,
    single=False,
    gate_up="input_linear.weight",
    down="output_linear.weight",
)
_SIZES = {
    **{"hidden": "hidden_size", "ff": "intermediate_size", "expert": "num_local_experts", "vocab": "vocab_size"},
    **{"head": "num_attention_heads", "head_kv": "num_key_value_heads"},
}
_MULTIPLIERS: Mapping[str, str] = {
    "attention_multiplier": "add_attention_scale",
    "embedding_multiplier": "add_embedding_scale",
    "residual_multiplier": "add_residual_scale",
    "logits_scaling": "add_logit_scale",
}
"""Where config.json has them, and the writer's methods."""


def recipes(config: Config, shapes: Shapes) -> list[Recipe]:
    """Recipes in the order of ``shapes``."""
    config = _with_defaults(config)
    head_dim = need_number(config, "hidden_size") // need_number(config, "num_attention_heads")
    only = {
        **{"hidden_act": "silu", "attention_bias": False, "head_dim": head_dim},
        **{"spatial_target_layers": None, "deepstack_layer_map": None},
    }
    check_only(config, only, "GraniteMoE")
    check_rope(config, ARCHITECTURE, "GraniteMoE")
    for key in _MULTIPLIERS:
        _multiplier(config, key)
    sizes = sizes_of(config, _SIZES)
    sizes["kv"] = sizes["head_kv"] * head_dim
    model = decoder_rows(config, shapes)
    n_layer = need_number(config, "num_hidden_layers")
    return recipes_of(Tables("a GraniteMoE", model, lambda _: _LAYER, _EXPERTS, sizes, n_layer), shapes)


def key_values(
    directory: Path, config: Config, tensors: Sequence[SourceTensor], file_type: int, pre: str | None
) -> dict[str, KV]:
    """Key-values as llama.cpp's converter writes them."""
    # llama.cpp takes the heads' width from the hidden size alone
    config = {key: value for key, value in _with_defaults(config).items() if key != "head_dim"}
    n_vocab = need_number(config, "vocab_size")
    extras: list[tuple[str, Any]] = [
        ("add_vocab_size", n_vocab),
        ("add_rope_dimension_count", need_number(config, "hidden_size") // need_number(config, "num_attention_heads")),
        *((method, _multiplier(config, key)) for key, method in _MULTIPLIERS.items()),
    ]
    writer = start_writer(directory, ARCHITECTURE, tensors)
    add_text_parameters(writer, config, file_type, extras)
    add_llama_vocabulary(writer, directory, n_vocab, pre)
    return as_kvs(writer)


GRANITE_MOE = Converter(
    ARCHITECTURE,
    recipes,
    key_values,
    Skeleton(
        renamed={"block_sparse_moe.router.": "block_sparse_moe.router.layer."},
        experts="block_sparse_moe.experts",
        embedding_multiplier="embedding_multiplier",
        logits_divisor="logits_scaling",
    ),
)


def _with_defaults(config: Config) -> Config:
    """``config`` with what transformers' ``GraniteMoeConfig`` assumes where it says nothing."""
    assumed = {
        **{"max_position_embeddings": 2048, "num_key_value_heads": config.get("num_attention_heads")},
        **{"rms_norm_eps": 1e-6, "num_local_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 11008},
        **dict.fromkeys(_MULTIPLIERS, 1.0),
    }
    return with_defaults(config, assumed)


def _multiplier(config: Config, key: str) -> float:
    """A positive number: llama.cpp takes 0 for none, transformers for 0."""
    value = config[key]
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < math.inf:
        raise SourceError(f"config.json has {key} {value!r}, expected a positive number; use the one of these weights")
    return value
