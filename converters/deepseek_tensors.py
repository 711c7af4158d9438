"""What every DeepSeek from V2 on has: leading dense layers, then routed and shared experts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from converters.key_values import need_number
from converters.tensor_table import Experts, PerHead, Row, Shapes, Tables, check_count, decoder_rows, sizes_of
from mopeq_edge.errors import SourceError
from mopeq_edge.source.converter import Config

_NORMS: Mapping[str, Row] = {
    "input_layernorm.weight": Row("attn_norm.weight", ("hidden",), f32=True),
    "post_attention_layernorm.weight": Row("ffn_norm.weight", ("hidden",), f32=True),
}
_DENSE: Mapping[str, Row] = {
    "mlp.gate_proj.weight": Row("ffn_gate.weight", ("hidden", "dense")),
    "mlp.up_proj.weight": Row("ffn_up.weight", ("hidden", "dense")),
    "mlp.down_proj.weight": Row("ffn_down.weight", ("dense", "hidden")),
}
_SPARSE: Mapping[str, Row] = {
    "mlp.gate.weight": Row("ffn_gate_inp.weight", ("hidden", "expert"), f32=True),
    "mlp.shared_experts.gate_proj.weight": Row("ffn_gate_shexp.weight", ("hidden", "shared")),
    "mlp.shared_experts.up_proj.weight": Row("ffn_up_shexp.weight", ("hidden", "shared")),
    "mlp.shared_experts.down_proj.weight": Row("ffn_down_shexp.weight", ("shared", "hidden")),
}
_EXPERTS = Experts("mlp.experts", {"down": "down_proj", "gate": "gate_proj", "up": "up_proj"})
_SIZES = {
    **{"hidden": "hidden_size", "ff": "moe_intermediate_size", "dense": "intermediate_size", "vocab": "vocab_size"},
    "expert": "n_routed_experts",
}
_FURTHER = "num_nextn_predict_layers"


@dataclass(frozen=True)
class Place:
    """Where in a checkpoint the text model is: behind ``prefix``, beside tensors that begin with one of ``skipped``."""

    prefix: str = ""
    skipped: tuple[str, ...] = ()


ALONE = Place()


def deepseek_tables(
    config: Config,
    shapes: Shapes,
    attention: Mapping[str, Row | PerHead],
    *,
    router: Mapping[str, Row] | None = None,
    sizes: Mapping[str, int] | None = None,
    place: Place = ALONE,
) -> Tables:
    """The tables of a DeepSeek with the given attention.

    ``router`` are further tensors of a layer with experts; ``sizes`` are those that only ``attention`` names.
    """
    layers_prefix = f"{place.prefix}model.layers."
    own = {**sizes_of(config, _SIZES), **(sizes or {})}
    own["shared"] = own["ff"] * need_number(config, "n_shared_experts")
    n_layer, n_dense = need_number(config, "num_hidden_layers"), leading_dense(config)
    # layers that predict further tokens stand behind the others; llama.cpp's converter leaves them out
    n_further = need_number(config, _FURTHER) if config.get(_FURTHER) else 0
    check_count(_FURTHER, n_further, shapes)
    model = decoder_rows(config, shapes, decoder=f"{place.prefix}model.", head=f"{place.prefix}lm_head.")
    dense, sparse = {**_NORMS, **attention, **_DENSE}, {**_NORMS, **attention, **_SPARSE, **(router or {})}
    return Tables(
        "a DeepSeek",
        model,
        lambda layer: dense if layer < n_dense else sparse,
        _EXPERTS,
        own,
        n_layer,
        sparse=lambda layer: layer >= n_dense,
        layers_prefix=layers_prefix,
        skipped=(
            *(f"{layers_prefix}{layer}." for layer in range(n_layer, n_layer + n_further)),
            *place.skipped,
        ),
    )


def leading_dense(config: Config) -> int:
    """How many of the first layers have no experts."""
    found = config.get("first_k_dense_replace", 0)
    if not isinstance(found, int) or not 0 <= found <= need_number(config, "num_hidden_layers"):
        raise SourceError(f"config.json has first_k_dense_replace {found!r}, expected a number of layers")
    return found


def expert_extras(config: Config) -> list[tuple[str, Any]]:
    """Key-values about the experts, as methods of the writer and arguments."""
    extras: list[tuple[str, Any]] = [
        ("add_expert_feed_forward_length", need_number(config, "moe_intermediate_size")),
        ("add_expert_shared_count", need_number(config, "n_shared_experts")),
    ]
    if config.get("routed_scaling_factor") is not None:
        extras.append(("add_expert_weights_scale", config["routed_scaling_factor"]))
    if config.get("norm_topk_prob"):
        extras.append(("add_expert_weights_norm", True))
    return extras
