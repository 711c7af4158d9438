"""The plain-attention DeepSeek (DeepSeek-OCR, and inside DeepSeek-VL2-Tiny): llama.cpp's ``deepseek2-ocr``, text side.

No latent attention: q, k and v as in Llama, with half-split rope. Leading dense layers, then routed and shared experts;
softmax over all experts, then top-k. In a vision-language checkpoint the text settings are under ``language_config``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from converters.deepseek_tensors import ALONE, Place, deepseek_tables, expert_extras, leading_dense
from converters.key_values import add_text_parameters, as_kvs, need_number, start_writer
from converters.rope_settings import check_rope
from converters.tensor_table import Row, Shapes, check_only, recipes_of
from converters.vocabulary import add_bpe_vocabulary
from mopeq_edge.gguf_file import KV
from mopeq_edge.source.converter import Config, Converter, Recipe, Skeleton
from mopeq_edge.source.model import SourceTensor

ARCHITECTURE = "deepseek2-ocr"
CHAT_TEMPLATE = "{% for m in messages %}{{m['content']}}{% endfor %}"
"""The one that llama.cpp's converter gives models of this kind."""

_ATTENTION: Mapping[str, Row] = {
    "self_attn.q_proj.weight": Row("attn_q.weight", ("hidden", "hidden")),
    "self_attn.k_proj.weight": Row("attn_k.weight", ("hidden", "hidden")),
    "self_attn.v_proj.weight": Row("attn_v.weight", ("hidden", "hidden")),
    "self_attn.o_proj.weight": Row("attn_output.weight", ("hidden", "hidden")),
}
_SKELETON_KEYS = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "rms_norm_eps"),
    *("num_key_value_heads", "max_position_embeddings", "n_routed_experts", "n_shared_experts", "num_experts_per_tok"),
    *("moe_intermediate_size", "routed_scaling_factor"),
)


def recipes(config: Config, shapes: Shapes, place: Place = ALONE) -> list[Recipe]:
    """Recipes in the order of ``shapes``; ``place`` is where in the checkpoint the text model is."""
    config = _text_config(config)
    only = {
        **{"use_mla": False, "hidden_act": "silu", "attention_bias": False, "scoring_func": "softmax"},
        **{"topk_method": "greedy", "moe_layer_freq": 1},
        # llama.cpp ends the process for another base, and does not read a scaling
        **{"rope_theta": 10000, "rope_scaling": None},
        "num_key_value_heads": need_number(config, "num_attention_heads"),
    }
    check_only(config, only, "this kind of DeepSeek")
    check_rope(config, ARCHITECTURE, "this kind of DeepSeek")
    return recipes_of(deepseek_tables(config, shapes, _ATTENTION, place=place), shapes)


def key_values(
    directory: Path,
    config: Config,
    tensors: Sequence[SourceTensor],
    file_type: int,
    pre: str | None,
    chat_template: str | None = CHAT_TEMPLATE,
) -> dict[str, KV]:
    """Key-values as llama.cpp's converter writes them."""
    config = {"rope_theta": 10000.0, "rms_norm_eps": 1e-6, **_text_config(config)}
    extras: list[tuple[str, Any]] = [
        ("add_leading_dense_block_count", leading_dense(config)),
        ("add_vocab_size", need_number(config, "vocab_size")),
        *expert_extras(config),
        ("add_rope_dimension_count", config.get("qk_rope_head_dim", 0)),
    ]
    writer = start_writer(directory, ARCHITECTURE, tensors, chat_template)
    add_text_parameters(writer, config, file_type, extras)
    add_bpe_vocabulary(writer, directory, need_number(config, "vocab_size"), pre)
    return as_kvs(writer)


def skeleton(_: Path, config: Config) -> tuple[Any, Any]:
    """transformers has this decoder inside DeepSeek-OCR-2 only."""
    from transformers.models.deepseek_ocr2.configuration_deepseek_ocr2 import DeepseekOcr2TextConfig
    from transformers.models.deepseek_ocr2.modeling_deepseek_ocr2 import DeepseekOcr2TextModel

    config = _text_config(config)
    n_layer, n_dense = need_number(config, "num_hidden_layers"), leading_dense(config)
    known = {key: config[key] for key in _SKELETON_KEYS if key in config}
    text = DeepseekOcr2TextConfig(
        mlp_layer_types=["dense"] * n_dense + ["sparse"] * (n_layer - n_dense),
        head_dim=config["hidden_size"] // config["num_attention_heads"],
        rope_parameters={"rope_type": "default", "rope_theta": config.get("rope_theta", 10000.0)},
        **known,
    )
    text._attn_implementation = "sdpa"
    return text, DeepseekOcr2TextModel(text)


DEEPSEEK_OCR = Converter(ARCHITECTURE, recipes, key_values, Skeleton(skeleton))


def _text_config(config: Config) -> dict[str, Any]:
    """The text settings, where the checkpoint keeps them."""
    text = config.get("language_config") or {}
    return {key: value for key, value in {**config, **text}.items() if value is not None}
