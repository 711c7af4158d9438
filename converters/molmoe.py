"""MolmoE, text side: OLMoE under other names, q, k and v in one tensor; llama.cpp's ``olmoe``.

``wte.new_embedding`` has more rows of the embedding than the output has: those of tokens that stand for pictures, which
the model never says. llama.cpp counts as many tokens in both matrices, so these rows, their tokens and the vision model
are left out. Names and settings: the released ``modeling_molmoe.py``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from converters import olmoe
from converters.key_values import add_text_parameters, as_kvs, need_number, start_writer
from converters.tensor_table import Experts, Fused, Row, Shapes, Tables, check_count, check_only, recipes_of
from converters.vocabulary import add_bpe_vocabulary
from mopeq_edge.errors import SourceError
from mopeq_edge.gguf_file import KV
from mopeq_edge.source.converter import Config, Converter, Recipe, Skeleton
from mopeq_edge.source.model import SourceTensor

MODEL_TYPE = "molmo"
PREFIX = "model.transformer."
NEW_EMBEDDING = f"{PREFIX}wte.new_embedding"
VISION = "model.vision_backbone."

_MODEL: Mapping[str, Row] = {
    f"{PREFIX}wte.embedding": Row("token_embd.weight", ("hidden", "vocab")),
    f"{PREFIX}ln_f.weight": Row("output_norm.weight", ("hidden",), f32=True),
    f"{PREFIX}ff_out.weight": Row("output.weight", ("hidden", "vocab")),
}
_LAYER: Mapping[str, Row | Fused] = {
    "att_proj.weight": Fused(tuple(Row(f"attn_{which}.weight", ("hidden", "hidden")) for which in "qkv")),
    "attn_out.weight": Row("attn_output.weight", ("hidden", "hidden")),
    "attn_norm.weight": Row("attn_norm.weight", ("hidden",), f32=True),
    "q_norm.weight": Row("attn_q_norm.weight", ("hidden",), f32=True),
    "k_norm.weight": Row("attn_k_norm.weight", ("hidden",), f32=True),
    "ff_norm.weight": Row("ffn_norm.weight", ("hidden",), f32=True),
    "mlp.gate.weight": Row("ffn_gate_inp.weight", ("hidden", "expert"), f32=True),
}
_EXPERTS = Experts("mlp.experts", {"down": "down_proj", "gate": "gate_proj", "up": "up_proj"})
_ONLY: Mapping[str, object] = {
    **{"activation_type": "swiglu", "layer_norm_type": "rms", "norm_after": False, "clip_qkv": None, "alibi": False},
    **{"multi_query_attention": False, "head_dim": None, "qkv_bias": False, "scale_logits": False},
    **{"attn_logit_softcapping": None, "final_logit_softcapping": None, "normalize_input_embeds": False},
    **{"moe_shared_expert": False, "moe_interleave": False},
}
# settings of which the released code assumes something else where config.json says nothing
_SAID: Mapping[str, object] = {"attention_layer_norm": True, "rope": True, "rope_impl": "llama", "weight_tying": False}


def recipes(config: Config, shapes: Shapes) -> list[Recipe]:
    """Recipes in the order of ``shapes``."""
    check_only(config, {**_ONLY, "n_kv_heads": need_number(config, "n_heads")}, "OLMoE, which is MolmoE's text side,")
    for key, value in _SAID.items():
        if config.get(key) != value:
            raise SourceError(
                f"config.json has {key} {config.get(key)!r}, expected {value}: llama.cpp computes OLMoE, which is "
                "MolmoE's text side, like that only, so no GGUF of this checkpoint would be right"
            )
    text = in_olmoe_words(config)
    sizes = {"hidden": text["hidden_size"], "ff": text["intermediate_size"], "expert": text["num_experts"]}
    sizes["vocab"] = text["vocab_size"]
    check_count("moe_num_experts", sizes["expert"], shapes)
    check_count("n_layers", text["num_hidden_layers"], shapes)
    tables = Tables(
        "a MolmoE",
        _MODEL,
        lambda _: _LAYER,
        _EXPERTS,
        sizes,
        text["num_hidden_layers"],
        layers_prefix=f"{PREFIX}blocks.",
        skipped=(VISION, NEW_EMBEDDING),
    )
    return recipes_of(tables, shapes)


def key_values(
    directory: Path, config: Config, tensors: Sequence[SourceTensor], file_type: int, pre: str | None
) -> dict[str, KV]:
    """Key-values as llama.cpp's converter writes them for an OLMoE."""
    text = in_olmoe_words(config)
    writer = start_writer(directory, olmoe.ARCHITECTURE, tensors)
    add_text_parameters(writer, text, file_type)
    add_bpe_vocabulary(writer, directory, text["vocab_size"], pre, n_further=_further(config))
    return as_kvs(writer)


def left_out(_: Config, shapes: Shapes) -> list[str]:
    """The rows of the embedding and how many tensors see pictures."""
    lines = []
    if NEW_EMBEDDING in shapes:
        lines.append(
            f"{shapes[NEW_EMBEDDING][0]} rows of '{NEW_EMBEDDING}' are left out, with their tokens: they stand for "
            "pictures, and llama.cpp counts as many tokens as the output has rows"
        )
    if seeing := sum(name.startswith(VISION) for name in shapes):
        lines.append(f"{seeing} tensors that see pictures are left out ({VISION}*); the GGUF holds the text side")
    return lines


def in_olmoe_words(config: Config) -> dict[str, Any]:
    """The settings as an OLMoE's config.json says them, with what the released code assumes where nothing is said."""
    hidden = need_number(config, "d_model")
    if config.get("mlp_hidden_size") is not None:
        # gate and up together
        ff = need_number(config, "mlp_hidden_size")
    else:
        ff = need_number({"mlp_ratio": 4, **config}, "mlp_ratio") * hidden
    return {
        **{"hidden_size": hidden, "intermediate_size": ff // 2, "num_hidden_layers": need_number(config, "n_layers")},
        "num_attention_heads": need_number(config, "n_heads"),
        "num_key_value_heads": need_number(config, "n_heads"),
        "num_experts": need_number(config, "moe_num_experts"),
        "num_experts_per_tok": need_number(config, "moe_top_k"),
        "vocab_size": need_number(config, "vocab_size" if config.get("embedding_size") is None else "embedding_size"),
        "max_position_embeddings": need_number(config, "max_sequence_length"),
        "rms_norm_eps": config.get("layer_norm_eps") or 1e-5,
        "rope_theta": 10000.0 if config.get("rope_theta") is None else config["rope_theta"],
    }


def skeleton(_: Path, config: Config) -> tuple[Any, Any]:
    """transformers' OLMoE."""
    from transformers import OlmoeConfig, OlmoeModel

    text = in_olmoe_words(config)
    theta = text.pop("rope_theta")
    rope = {"rope_type": "default", "rope_theta": theta}
    olmoe_config = OlmoeConfig(rope_parameters=rope, bos_token_id=None, eos_token_id=None, pad_token_id=None, **text)
    olmoe_config._attn_implementation = "sdpa"
    return olmoe_config, OlmoeModel(olmoe_config)


MOLMOE = Converter(
    olmoe.ARCHITECTURE,
    recipes,
    key_values,
    Skeleton(
        skeleton,
        prefix=PREFIX,
        layers="blocks.",
        norm="ln_f.",
        renamed={
            **{"input_layernorm.": "attn_norm.", "post_attention_layernorm.": "ff_norm."},
            **{"self_attn.o_proj.": "attn_out.", "self_attn.q_norm.": "q_norm.", "self_attn.k_norm.": "k_norm."},
        },
        fused={f"self_attn.{which}_proj.weight": ("att_proj.weight", at, 3) for at, which in enumerate("qkv")},
    ),
    left_out,
)


def choose(config: Config) -> Converter:
    """MolmoE; dense models of the same makers share its name."""
    if config.get("model_type") != MODEL_TYPE or not config.get("moe_num_experts"):
        raise SourceError(
            f"an OLMoForCausalLM with model_type {config.get('model_type')!r} and moe_num_experts "
            f"{config.get('moe_num_experts')!r}, expected {MODEL_TYPE!r} and some: of the models of this name "
            "mopeq-edge knows MolmoE alone; use llama.cpp's own tools for a dense one"
        )
    return MOLMOE


def _further(config: Config) -> int:
    """How many tokens the model knows behind those that it can say."""
    return need_number(config, "additional_vocab_size") if config.get("additional_vocab_size") else 0
