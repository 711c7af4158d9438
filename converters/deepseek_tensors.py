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
_NEXTN: Mapping[str, Row] = {
    "eh_proj.weight": Row("nextn.eh_proj.weight", ("two_hidden", "hidden")),
    "enorm.weight": Row("nextn.enorm.weight", ("hidden",), f32=True),
    "hnorm.weight": Row("nextn.hnorm.weight", ("hidden",), f32=True),
    "embed_tokens.weight": Row("nextn.embed_tokens.weight", ("hidden", "vocab"), optional=True),
    "shared_head.norm.weight": Row("nextn.shared_head_norm.weight", ("hidden",), f32=True, optional=True),
    "shared_head.head.weight": Row("nextn.shared_head_head.weight", ("hidden", "vocab"), optional=True),
}
"""What joins a block that predicts a further token to the others; the rest of it is a block like them."""


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
    keep_mtp: bool = False,
) -> Tables:
    """The tables of a DeepSeek with the given attention; ``keep_mtp``: with blocks that predict further tokens.

    ``router`` are further tensors of a layer with experts; ``sizes`` are those that only ``attention`` names.
    """
    layers_prefix = f"{place.prefix}model.layers."
    own = {**sizes_of(config, _SIZES), **(sizes or {})}
    own["two_hidden"] = 2 * own["hidden"]
    own["shared"] = own["ff"] * need_number(config, "n_shared_experts")
    n_layer, n_dense = need_number(config, "num_hidden_layers"), leading_dense(config)
    # layers that predict further tokens stand behind the others; llama.cpp's converter leaves them out
    n_further = further(config)
    check_count(_FURTHER, n_further, shapes)
    model = decoder_rows(config, shapes, decoder=f"{place.prefix}model.", head=f"{place.prefix}lm_head.")
    dense, sparse = {**_NORMS, **attention, **_DENSE}, {**_NORMS, **attention, **_SPARSE, **(router or {})}
    return Tables(
        "a DeepSeek",
        model,
        lambda layer: {**(dense if layer < n_dense else sparse), **(_NEXTN if layer >= n_layer else {})},
        _EXPERTS,
        own,
        n_layer + n_further if keep_mtp else n_layer,
        sparse=lambda layer: layer >= n_dense,
        layers_prefix=layers_prefix,
        skipped=(
            *(f"{layers_prefix}{layer}." for layer in range(n_layer, n_layer + n_further) if not keep_mtp),
            *place.skipped,
        ),
    )


def further(config: Config) -> int:
    """How many blocks stand behind the others and predict further tokens."""
    return need_number(config, _FURTHER) if config.get(_FURTHER) else 0


def mtp_blocks(config: Config, shapes: Shapes) -> list[str]:
    """A line that says what is left out, if the checkpoint has blocks that predict further tokens."""
    first, n_further = need_number(config, "num_hidden_layers"), further(config)
    found = [layer for layer in range(first, first + n_further) if f"model.layers.{layer}.eh_proj.weight" in shapes]
    if not found:
        return []
    blocks = f"block {found[0]}" if len(found) == 1 else f"blocks {found[0]} to {found[-1]}"
    return [f"{blocks} (MTP, only for speculative decoding) left out; --keep-mtp keeps it"]


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
