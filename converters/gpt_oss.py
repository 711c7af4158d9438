"""gpt-oss: attention with sinks and biases, every other layer in a sliding window; experts with biases.

Tensor names: the released checkpoints' (``GptOssForCausalLM``), llama.cpp's ``gpt-oss``. The experts of a layer are two
tensors in which gate and up alternate, feature by feature: as released in MXFP4 (``_blocks`` and ``_scales``, rows are
features), or in a plain type (columns are features). MXFP4 is passed through bit for bit.

llama.cpp rounds the ends of yarn's ramp to whole dimensions; the released models are trained without that
(``truncate`` false). It is what every GGUF of them does, so both are taken.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from converters.key_values import add_text_parameters, as_kvs, need_number, start_writer, with_defaults
from converters.rope_settings import check_rope
from converters.tensor_table import (
    Experts,
    Row,
    Shapes,
    Sizes,
    Tables,
    check_count,
    check_only,
    decoder_rows,
    recipes_of,
    sizes_of,
)
from converters.vocabulary import add_bpe_vocabulary
from mopeq_edge.errors import SourceError
from mopeq_edge.gguf_file import KV
from mopeq_edge.source.converter import Config, Converter, Part, Recipe, Skeleton
from mopeq_edge.source.model import SourceTensor

ARCHITECTURE = "gpt-oss"

ALPHA, LIMIT = 1.702, 7.0
"""Of the experts' activation; llama.cpp knows no other."""

_LAYER: Mapping[str, Row] = {
    "input_layernorm.weight": Row("attn_norm.weight", ("hidden",), f32=True),
    "self_attn.q_proj.weight": Row("attn_q.weight", ("hidden", "q")),
    "self_attn.q_proj.bias": Row("attn_q.bias", ("q",), f32=True),
    "self_attn.k_proj.weight": Row("attn_k.weight", ("hidden", "kv")),
    "self_attn.k_proj.bias": Row("attn_k.bias", ("kv",), f32=True),
    "self_attn.v_proj.weight": Row("attn_v.weight", ("hidden", "kv")),
    "self_attn.v_proj.bias": Row("attn_v.bias", ("kv",), f32=True),
    "self_attn.o_proj.weight": Row("attn_output.weight", ("q", "hidden")),
    "self_attn.o_proj.bias": Row("attn_output.bias", ("hidden",), f32=True),
    "self_attn.sinks": Row("attn_sinks.weight", ("head",), f32=True),
    "post_attention_layernorm.weight": Row("post_attention_norm.weight", ("hidden",), f32=True),
    "mlp.router.weight": Row("ffn_gate_inp.weight", ("hidden", "expert"), f32=True),
    "mlp.router.bias": Row("ffn_gate_inp.bias", ("expert",), f32=True),
}
_SIZES = {
    **{"hidden": "hidden_size", "ff": "intermediate_size", "expert": "num_local_experts", "vocab": "vocab_size"},
    **{"head": "num_attention_heads", "head_kv": "num_key_value_heads", "head_dim": "head_dim"},
}
_EXPERTS = "mlp.experts"
_MATRICES = {"down_proj": ("down",), "gate_up_proj": ("gate", "up")}
"""The checkpoint's tensors of a layer's experts, and the GGUF's stacks that are in each."""


def recipes(config: Config, shapes: Shapes) -> list[Recipe]:
    """Recipes in the order of ``shapes``, the stacks in MXFP4 before all others."""
    config = _with_defaults(config)
    n_layer = need_number(config, "num_hidden_layers")
    only = {
        **{"hidden_act": "silu", "attention_bias": True},
        **{"swiglu_alpha": ALPHA, "swiglu_limit": LIMIT},
    }
    check_only(config, only, "gpt-oss")
    check_rope(config, ARCHITECTURE, "gpt-oss")
    _check_layers(config, n_layer)
    sizes = sizes_of(config, _SIZES)
    sizes |= {"q": sizes["head"] * sizes["head_dim"], "kv": sizes["head_kv"] * sizes["head_dim"]}
    check_count("num_hidden_layers", n_layer, shapes)
    found: dict[str, list[Recipe]] = {}
    for layer in range(n_layer):
        prefix = f"model.layers.{layer}.{_EXPERTS}."
        for matrix, which in _MATRICES.items():
            blocks, bias = f"{prefix}{matrix}_blocks", f"{prefix}{matrix}_bias"
            name = blocks if blocks in shapes else prefix + matrix
            found[name] = _stacks(layer, which, name, name == blocks, sizes)
            found[bias] = _biases(layer, which, bias, sizes)
            for needed in (name, bias):
                _need(needed, layer, shapes)
    rest = {name: shape for name, shape in shapes.items() if name not in found}
    # llama.cpp loads no gpt-oss without an output matrix
    model = decoder_rows(config, shapes, needs_output=True)
    tables = Tables(
        *("a gpt-oss", model, lambda _: _LAYER, Experts(_EXPERTS, {}), sizes, n_layer), sparse=lambda _: False
    )
    for recipe in recipes_of(tables, rest):
        found.setdefault(recipe.parts[0].tensor, []).append(recipe)
    in_blocks = [name for name in shapes if name in found and name.endswith("_blocks")]
    others = [name for name in shapes if name in found and not name.endswith("_blocks")]
    return [recipe for name in (*in_blocks, *others) for recipe in found[name]]


def key_values(
    directory: Path, config: Config, tensors: Sequence[SourceTensor], file_type: int, pre: str | None
) -> dict[str, KV]:
    """Key-values as llama.cpp's converter writes them."""
    config = _with_defaults(config)
    extras = [
        ("add_sliding_window", need_number(config, "sliding_window")),
        ("add_expert_feed_forward_length", need_number(config, "intermediate_size")),
    ]
    writer = start_writer(directory, ARCHITECTURE, tensors)
    add_text_parameters(writer, config, file_type, extras)
    add_bpe_vocabulary(writer, directory, need_number(config, "vocab_size"), pre)
    return as_kvs(writer)


def clamped_swiglu(gate: Any, up: Any) -> Any:
    """(up + 1) gate sigmoid(alpha gate), gate cut off above the limit and up on both sides."""
    gate, up = gate.clamp(max=LIMIT), up.clamp(min=-LIMIT, max=LIMIT)
    return (up + 1) * gate * (ALPHA * gate).sigmoid()


# transformers' fast attention has no sinks
GPT_OSS = Converter(ARCHITECTURE, recipes, key_values, Skeleton(gated=clamped_swiglu, attention="eager"))


def _with_defaults(config: Config) -> Config:
    """``config`` with what transformers' ``GptOssConfig`` assumes where it says nothing."""
    yarn = {
        **{"rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0},
        "original_max_position_embeddings": 4096,
    }
    assumed: dict[str, Any] = {
        **{"max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "head_dim": 64, "sliding_window": 128},
        **{"num_attention_heads": 64, "num_key_value_heads": 8, "num_local_experts": 128, "num_experts_per_tok": 4},
        **{"hidden_size": 2880, "intermediate_size": 2880, "vocab_size": 201088, "num_hidden_layers": 36},
    }
    if config.get("rope_parameters") is None and config.get("rope_scaling") is None:
        assumed["rope_parameters"] = yarn
    return with_defaults(config, assumed, rope_theta=150000.0)


def _check_layers(config: Config, n_layer: int) -> None:
    """llama.cpp has sliding windows in the first layer, the third, and so on."""
    kinds = config.get("layer_types")
    if kinds is not None:
        expected = ["full_attention" if layer % 2 else "sliding_attention" for layer in range(min(n_layer, len(kinds)))]
        check_only({"layer_types": kinds}, {"layer_types": expected}, "gpt-oss")


def _need(name: str, layer: int, shapes: Shapes) -> None:
    if name not in shapes:
        raise SourceError(
            f"tensor '{name}' (layer {layer}, all experts) is missing; download the whole checkpoint again"
        )


def _stacks(layer: int, which: Sequence[str], tensor: str, in_blocks: bool, sizes: Sizes) -> list[Recipe]:
    hidden, ff, n_expert = sizes["hidden"], sizes["ff"], sizes["expert"]
    n_in, n_out = (ff, hidden) if "down" in which else (hidden, ff)
    return [
        Recipe(
            f"blk.{layer}.ffn_{projection}_exps.weight",
            (n_in, n_out, n_expert),
            tuple(
                Part(tensor, e, (first, n_out * len(which)), transposed=not in_blocks, every=len(which))
                for e in range(n_expert)
            ),
        )
        for first, projection in enumerate(which)
    ]


def _biases(layer: int, which: Sequence[str], tensor: str, sizes: Sizes) -> list[Recipe]:
    n_out = sizes["hidden"] if "down" in which else sizes["ff"]
    return [
        Recipe(
            f"blk.{layer}.ffn_{projection}_exps.bias",
            (n_out, sizes["expert"]),
            (Part(tensor, columns=(first, n_out * len(which)), every=len(which)),),
            keep_f32=True,
        )
        for first, projection in enumerate(which)
    ]
