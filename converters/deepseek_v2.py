"""DeepSeek-V2 and V3: multi-head latent attention; llama.cpp's ``deepseek2``.

Keys and values are made of one latent a token. llama.cpp multiplies the query with each head's key matrix instead, and
the latents that a head attends to, summed, with its value matrix: so ``kv_b_proj`` becomes two stacks of a matrix a
head, the key's transposed. Rope turns neighbouring pairs on both sides, so no rows move. V2 routes by softmax; V3 by
sigmoid, with a bias that only chooses, in groups. Tensor names: transformers' ``DeepseekV2`` and ``DeepseekV3``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from converters.deepseek_tensors import (
    ALONE,
    Place,
    deepseek_tables,
    expert_extras,
    further,
    leading_dense,
    mtp_blocks,
)
from converters.key_values import add_text_parameters, as_kvs, need_number, start_writer
from converters.rope_settings import check_rope, rope_of
from converters.tensor_table import HeadStack, PerHead, Row, Shapes, check_only, recipes_of, sizes_of
from converters.vocabulary import add_bpe_vocabulary
from mopeq_edge.errors import SourceError
from mopeq_edge.gguf_file import KV
from mopeq_edge.source.converter import Config, Converter, Latent, Recipe, Skeleton
from mopeq_edge.source.model import SourceTensor

ARCHITECTURE = "deepseek2"

_ATTENTION: Mapping[str, Row | PerHead] = {
    "self_attn.kv_a_proj_with_mqa.weight": Row("attn_kv_a_mqa.weight", ("hidden", "latent_and_rope")),
    "self_attn.kv_a_layernorm.weight": Row("attn_kv_a_norm.weight", ("latent",), f32=True),
    "self_attn.kv_b_proj.weight": PerHead(
        "head", "latent", (HeadStack("attn_k_b.weight", "key", transposed=True), HeadStack("attn_v_b.weight", "value"))
    ),
    "self_attn.o_proj.weight": Row("attn_output.weight", ("values", "hidden")),
}
_QUERY: Mapping[str, Row] = {"self_attn.q_proj.weight": Row("attn_q.weight", ("hidden", "queries"))}
_LOW_RANK_QUERY: Mapping[str, Row] = {
    "self_attn.q_a_proj.weight": Row("attn_q_a.weight", ("hidden", "query_latent")),
    "self_attn.q_a_layernorm.weight": Row("attn_q_a_norm.weight", ("query_latent",), f32=True),
    "self_attn.q_b_proj.weight": Row("attn_q_b.weight", ("query_latent", "queries")),
}
_BIAS: Mapping[str, Row] = {
    "mlp.gate.e_score_correction_bias": Row("exp_probs_b.bias", ("expert",), f32=True),
}
_SIZES = {
    **{"head": "num_attention_heads", "latent": "kv_lora_rank", "key": "qk_nope_head_dim", "rope": "qk_rope_head_dim"},
    "value": "v_head_dim",
}
_FP8_SCALE = ".weight_scale_inv"


@dataclass(frozen=True)
class Version:
    """What V2 and V3 do differently: ``assumed`` is what transformers does where config.json says nothing, ``only``
    what llama.cpp computes in one way, ``router`` the tensors that a router has besides its matrix."""

    name: str
    assumed: Mapping[str, Any]
    only: Mapping[str, object]
    router: Mapping[str, Row]


_ASSUMED: Mapping[str, Any] = {
    **{"kv_lora_rank": 512, "q_lora_rank": 1536, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128},
    "rms_norm_eps": 1e-6,
}
_ONLY: Mapping[str, object] = {"hidden_act": "silu", "attention_bias": False, "moe_layer_freq": 1}
_LARGEST_EPSILON = 1e-5
"""The norms of the latents have 1e-6 whatever config.json says, llama.cpp has one for all: with this one the logits of
small random models move by 1e-4 of their spread."""
V2 = Version(
    "DeepSeek-V2",
    {
        **_ASSUMED,
        **{"max_position_embeddings": 2048, "first_k_dense_replace": 0, "routed_scaling_factor": 1.0},
    },
    {
        **_ONLY,
        **{"mlp_bias": False, "norm_topk_prob": False, "scoring_func": "softmax"},
        # llama.cpp ranks groups by the sum of their two best experts, V2 by the best one
        **{"topk_method": "greedy", "n_group": 1},
    },
    {},
)
V3 = Version(
    "DeepSeek-V3",
    {
        **_ASSUMED,
        **{"max_position_embeddings": 4096, "first_k_dense_replace": 3, "routed_scaling_factor": 2.5},
        **{"n_group": 8, "topk_group": 4, "num_experts_per_tok": 8, "norm_topk_prob": True},
        # llama.cpp takes softmax where a file says nothing
        **{"scoring_func": "sigmoid", "num_nextn_predict_layers": 1},
    },
    {**_ONLY, "rope_interleave": True, "scoring_func": "sigmoid", "topk_method": "noaux_tc"},
    _BIAS,
)


def recipes(
    version: Version, config: Config, shapes: Shapes, place: Place = ALONE, *, keep_mtp: bool = False
) -> list[Recipe]:
    """Recipes in the order of ``shapes``; ``place`` is where in the checkpoint the text model is."""
    check_only(
        config, {**version.only, "num_key_value_heads": need_number(config, "num_attention_heads")}, version.name
    )
    config = _with_defaults(version, config)
    if not 0 < config["rms_norm_eps"] <= _LARGEST_EPSILON:
        raise SourceError(
            f"config.json has rms_norm_eps {config['rms_norm_eps']!r}, expected at most {_LARGEST_EPSILON}: llama.cpp "
            "gives it to the norms of the latents too, so no GGUF of this checkpoint would be right"
        )
    check_rope(config, ARCHITECTURE, version.name)
    scale = next((name for name in shapes if name.endswith(_FP8_SCALE)), None)
    if scale is not None:
        raise SourceError(f"tensor '{scale}' belongs to FP8 weights; give the checkpoint in BF16 instead")
    sizes = sizes_of(config, _SIZES)
    sizes |= {
        "latent_and_rope": sizes["latent"] + sizes["rope"],
        "queries": sizes["head"] * (sizes["key"] + sizes["rope"]),
        "values": sizes["head"] * sizes["value"],
    }
    query = _QUERY
    _check_query(config)
    if config["q_lora_rank"] is not None:
        query, sizes["query_latent"] = _LOW_RANK_QUERY, need_number(config, "q_lora_rank")
    if keep_mtp:
        _check_mtp(config, shapes)
    tables = deepseek_tables(
        config,
        shapes,
        {**query, **_ATTENTION},
        router=version.router,
        sizes=sizes,
        place=place,
        keep_mtp=keep_mtp,
    )
    return recipes_of(tables, shapes)


def key_values(
    version: Version,
    directory: Path,
    config: Config,
    tensors: Sequence[SourceTensor],
    file_type: int,
    pre: str | None,
    *,
    keep_mtp: bool = False,
) -> dict[str, KV]:
    """Key-values as llama.cpp's converter writes them; with ``keep_mtp`` as for a model of which it keeps the block."""
    # seen from the latent, all heads share one key and value
    config = {**_with_defaults(version, config), "num_key_value_heads": 1}
    rope_dim, latent = need_number(config, "qk_rope_head_dim"), need_number(config, "kv_lora_rank")
    extras: list[tuple[str, Any]] = [
        ("add_leading_dense_block_count", leading_dense(config)),
        ("add_vocab_size", need_number(config, "vocab_size")),
    ]
    if config["q_lora_rank"] is not None:
        extras.append(("add_q_lora_rank", need_number(config, "q_lora_rank")))
    elif not _one_matrix_for_granted(config):
        # llama.cpp's converter leaves the key out, and llama.cpp cannot load that; of rank 0 it loads one matrix
        extras.append(("add_q_lora_rank", 0))
    extras.append(("add_kv_lora_rank", latent))
    if config.get("head_dim") is None:
        extras += [("add_key_length", latent + rope_dim), ("add_value_length", latent)]
    extras += [
        ("add_key_length_mla", need_number(config, "qk_nope_head_dim") + rope_dim),
        ("add_value_length_mla", need_number(config, "v_head_dim")),
        *expert_extras(config),
        ("add_rope_dimension_count", rope_dim),
    ]
    if (mscale := rope_of(config)[1].get("mscale_all_dim")) is not None:
        extras.append(("add_rope_scaling_yarn_log_mul", 0.1 * mscale))
    if keep_mtp:
        config = {**config, "num_hidden_layers": need_number(config, "num_hidden_layers") + further(config)}
        extras.append(("add_nextn_predict_layers", further(config)))
    writer = start_writer(directory, ARCHITECTURE, tensors)
    add_text_parameters(writer, config, file_type, extras, (latent + rope_dim, latent))
    add_bpe_vocabulary(writer, directory, need_number(config, "vocab_size"), pre)
    return as_kvs(writer)


_SKELETON = Skeleton(latent=Latent())
DEEPSEEK_V2 = Converter(ARCHITECTURE, partial(recipes, V2), partial(key_values, V2), _SKELETON)
DEEPSEEK_V3 = Converter(
    ARCHITECTURE,
    partial(recipes, V3),
    partial(key_values, V3),
    _SKELETON,
    left_out=lambda config, shapes: mtp_blocks(_with_defaults(V3, config), shapes),
    with_mtp=Converter(
        ARCHITECTURE, partial(recipes, V3, keep_mtp=True), partial(key_values, V3, keep_mtp=True), _SKELETON
    ),
)


def _with_defaults(version: Version, config: Config) -> dict[str, Any]:
    """``config`` with what transformers assumes where it says nothing; no ``q_lora_rank`` is a choice, though."""
    assumed = dict(version.assumed)
    if not (config.get("rope_parameters") or config.get("rope_scaling")):
        assumed["rope_theta"] = 10000.0
    return {**assumed, **{key: value for key, value in config.items() if value is not None or key == "q_lora_rank"}}


def _check_mtp(config: Config, shapes: Shapes) -> None:
    if not mtp_blocks(config, shapes):
        raise SourceError("has no block that predicts a further token, expected one; leave out --keep-mtp")
    # llama.cpp's graph of the block knows neither
    check_only(config, {"num_nextn_predict_layers": 1}, "blocks that predict further tokens")
    if config["q_lora_rank"] is None:
        raise SourceError(
            "config.json has no q_lora_rank, expected one: llama.cpp cannot run the block that predicts a further "
            "token without; leave out --keep-mtp"
        )


def _one_matrix_for_granted(config: Config) -> bool:
    """Whether llama.cpp gives the query one matrix whatever the file says: it tells by the sizes of released models."""
    n_layer, n_vocab = need_number(config, "num_hidden_layers"), need_number(config, "vocab_size")
    return n_layer in (26, 27) or (n_layer, n_vocab) == (48, 128256)


def _check_query(config: Config) -> None:
    if config["q_lora_rank"] is not None and _one_matrix_for_granted(config):
        raise SourceError(
            f"config.json has q_lora_rank {config['q_lora_rank']!r} and {config['num_hidden_layers']} layers, expected "
            "none: llama.cpp gives the query one matrix in models of so many layers, so it could not load a GGUF of "
            "this checkpoint"
        )
