"""OLMoE: q and k normed over the whole width, softmax over all experts, then top-k without renormalising.

Tensor names: transformers' ``OlmoeForCausalLM``, llama.cpp's ``olmoe``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from converters.key_values import add_text_parameters, as_kvs, need_number, start_writer, with_defaults
from converters.rope_settings import check_rope
from converters.tensor_table import Experts, Row, Shapes, Tables, check_only, decoder_rows, recipes_of, sizes_of
from converters.vocabulary import add_bpe_vocabulary
from mopeq_edge.gguf_file import KV
from mopeq_edge.source.converter import Config, Converter, Recipe
from mopeq_edge.source.model import SourceTensor

ARCHITECTURE = "olmoe"

_LAYER: Mapping[str, Row] = {
    "input_layernorm.weight": Row("attn_norm.weight", ("hidden",), f32=True),
    "self_attn.q_proj.weight": Row("attn_q.weight", ("hidden", "hidden")),
    "self_attn.k_proj.weight": Row("attn_k.weight", ("hidden", "hidden")),
    "self_attn.v_proj.weight": Row("attn_v.weight", ("hidden", "hidden")),
    "self_attn.o_proj.weight": Row("attn_output.weight", ("hidden", "hidden")),
    "self_attn.q_norm.weight": Row("attn_q_norm.weight", ("hidden",), f32=True),
    "self_attn.k_norm.weight": Row("attn_k_norm.weight", ("hidden",), f32=True),
    "post_attention_layernorm.weight": Row("ffn_norm.weight", ("hidden",), f32=True),
    "mlp.gate.weight": Row("ffn_gate_inp.weight", ("hidden", "expert"), f32=True),
}
_EXPERTS = Experts("mlp.experts", {"down": "down_proj", "gate": "gate_proj", "up": "up_proj"}, packed=True)
_SIZES = {"hidden": "hidden_size", "ff": "intermediate_size", "expert": "num_experts", "vocab": "vocab_size"}


def recipes(config: Config, shapes: Shapes) -> list[Recipe]:
    """Recipes in the order of ``shapes``."""
    only = {
        **{"clip_qkv": None, "norm_topk_prob": False, "hidden_act": "silu", "attention_bias": False},
        "num_key_value_heads": need_number(config, "num_attention_heads"),
    }
    check_only(config, only, "OLMoE")
    check_rope(config, ARCHITECTURE, "OLMoE")
    n_layer = need_number(config, "num_hidden_layers")
    # llama.cpp loads no OLMoE without an output matrix
    model = decoder_rows(config, shapes, needs_output=True)
    tables = Tables("an OLMoE", model, lambda _: _LAYER, _EXPERTS, sizes_of(config, _SIZES), n_layer)
    return recipes_of(tables, shapes)


def key_values(
    directory: Path, config: Config, tensors: Sequence[SourceTensor], file_type: int, pre: str | None
) -> dict[str, KV]:
    """Key-values as llama.cpp's converter writes them."""
    # what transformers' OlmoeConfig assumes where config.json says nothing
    assumed = {
        **{"max_position_embeddings": 4096, "rms_norm_eps": 1e-5},
        "num_key_value_heads": config.get("num_attention_heads"),
    }
    config = with_defaults(config, assumed)
    writer = start_writer(directory, ARCHITECTURE, tensors)
    add_text_parameters(writer, config, file_type)
    add_bpe_vocabulary(writer, directory, need_number(config, "vocab_size"), pre)
    return as_kvs(writer)


OLMOE = Converter(ARCHITECTURE, recipes, key_values)
