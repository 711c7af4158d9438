"""Mixtral: softmax over the chosen experts; llama.cpp's ``llama``, whose rope wants the rows of q and k interleaved.

Tensor names: the released checkpoints'. Which of the three vocabularies it has is told by the files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from converters.key_values import add_text_parameters, as_kvs, need_number, start_writer, with_defaults
from converters.llama_vocabulary import add_llama_vocabulary
from converters.rope_settings import check_rope
from converters.tensor_table import Experts, Row, Shapes, Tables, check_only, decoder_rows, recipes_of, sizes_of
from mopeq_edge.gguf_file import KV
from mopeq_edge.source.converter import Config, Converter, Recipe, Skeleton
from mopeq_edge.source.model import SourceTensor

ARCHITECTURE = "llama"

_LAYER: Mapping[str, Row] = {
    "input_layernorm.weight": Row("attn_norm.weight", ("hidden",), f32=True),
    "self_attn.q_proj.weight": Row("attn_q.weight", ("hidden", "q"), heads="head"),
    "self_attn.k_proj.weight": Row("attn_k.weight", ("hidden", "kv"), heads="head_kv"),
    "self_attn.v_proj.weight": Row("attn_v.weight", ("hidden", "kv")),
    "self_attn.o_proj.weight": Row("attn_output.weight", ("q", "hidden")),
    "post_attention_layernorm.weight": Row("ffn_norm.weight", ("hidden",), f32=True),
    "block_sparse_moe.gate.weight": Row("ffn_gate_inp.weight", ("hidden", "expert"), f32=True),
}
_EXPERTS = Experts("block_sparse_moe.experts", {"gate": "w1", "down": "w2", "up": "w3"})
_SIZES = {
    **{"hidden": "hidden_size", "ff": "intermediate_size", "expert": "num_local_experts", "vocab": "vocab_size"},
    **{"head": "num_attention_heads", "head_kv": "num_key_value_heads"},
}


def recipes(config: Config, shapes: Shapes) -> list[Recipe]:
    """Recipes in the order of ``shapes``."""
    check_only(config, {"hidden_act": "silu", "sliding_window": None}, "Mixtral")
    config = _with_defaults(config)
    check_rope(config, ARCHITECTURE, "Mixtral")
    sizes, head_dim = sizes_of(config, _SIZES), _head_dim(config)
    sizes |= {"q": sizes["head"] * head_dim, "kv": sizes["head_kv"] * head_dim}
    model = decoder_rows(config, shapes)
    n_layer = need_number(config, "num_hidden_layers")
    return recipes_of(Tables("a Mixtral", model, lambda _: _LAYER, _EXPERTS, sizes, n_layer), shapes)


def key_values(
    directory: Path, config: Config, tensors: Sequence[SourceTensor], file_type: int, pre: str | None
) -> dict[str, KV]:
    """Key-values as llama.cpp's converter writes them."""
    config = _with_defaults(config)
    n_vocab = need_number(config, "vocab_size")
    writer = start_writer(directory, ARCHITECTURE, tensors)
    extras: list[tuple[str, Any]] = [("add_vocab_size", n_vocab), ("add_rope_dimension_count", _head_dim(config))]
    add_text_parameters(writer, config, file_type, extras)
    add_llama_vocabulary(writer, directory, n_vocab, pre)
    return as_kvs(writer)


MIXTRAL = Converter(ARCHITECTURE, recipes, key_values, Skeleton(renamed={"mlp.": "block_sparse_moe."}))


def _with_defaults(config: Config) -> Config:
    """``config`` with what transformers' ``MixtralConfig`` assumes where it says nothing."""
    assumed = {
        **{"max_position_embeddings": 4096 * 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-5},
        **{"num_local_experts": 8, "num_experts_per_tok": 2},
    }
    return with_defaults(config, assumed, rope_theta=1e6)


def _head_dim(config: Config) -> int:
    if config.get("head_dim") is not None:
        return need_number(config, "head_dim")
    return need_number(config, "hidden_size") // need_number(config, "num_attention_heads")
