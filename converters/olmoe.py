"""OLMoE: q and k normed over the whole width, softmax over all experts, then top-k without renormalising.

Two layouts of the experts exist: one tensor for each expert's matrix, or packed ones for a whole layer with gate
and up in one. Both give the same GGUF. Tensor names: transformers' ``OlmoeForCausalLM``, llama.cpp's ``olmoe``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from converters.key_values import add_text_parameters, as_kvs, need_number, start_writer
from converters.vocabulary import add_bpe_vocabulary
from mopeq_edge.errors import SourceError
from mopeq_edge.gguf_file import KV
from mopeq_edge.source.converter import Config, Converter, Part, Recipe
from mopeq_edge.source.model import SourceTensor

ARCHITECTURE = "olmoe"

# Checkpoint name -> (GGUF name, shape as ggml's ne in sizes of the model, kept in F32)
_MODEL: Mapping[str, tuple[str, tuple[str, ...], bool]] = {
    "model.embed_tokens.weight": ("token_embd.weight", ("hidden", "vocab"), False),
    "model.norm.weight": ("output_norm.weight", ("hidden",), True),
    "lm_head.weight": ("output.weight", ("hidden", "vocab"), False),
}
_LAYER: Mapping[str, tuple[str, tuple[str, ...], bool]] = {
    "input_layernorm.weight": ("attn_norm.weight", ("hidden",), True),
    "self_attn.q_proj.weight": ("attn_q.weight", ("hidden", "hidden"), False),
    "self_attn.k_proj.weight": ("attn_k.weight", ("hidden", "hidden"), False),
    "self_attn.v_proj.weight": ("attn_v.weight", ("hidden", "hidden"), False),
    "self_attn.o_proj.weight": ("attn_output.weight", ("hidden", "hidden"), False),
    "self_attn.q_norm.weight": ("attn_q_norm.weight", ("hidden",), True),
    "self_attn.k_norm.weight": ("attn_k_norm.weight", ("hidden",), True),
    "post_attention_layernorm.weight": ("ffn_norm.weight", ("hidden",), True),
    "mlp.gate.weight": ("ffn_gate_inp.weight", ("hidden", "expert"), True),
}
# Expert stacks in writing order: llama.cpp's converter writes them by the name of the checkpoint's matrix
_EXPERTS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "down": ("ffn_down_exps.weight", ("ff", "hidden", "expert")),
    "gate": ("ffn_gate_exps.weight", ("hidden", "ff", "expert")),
    "up": ("ffn_up_exps.weight", ("hidden", "ff", "expert")),
}
_NAME = re.compile(r"^model\.layers\.(\d+)\.(.+)$")
_EXPERT = re.compile(r"^mlp\.experts\.(?:(\d+)\.(?:gate|up|down)_proj\.weight|gate_up_proj|down_proj)$")
_DERIVED = ".rotary_emb.inv_freq"


def recipes(config: Config, shapes: Mapping[str, tuple[int, ...]]) -> list[Recipe]:
    """Recipes in the order of ``shapes``; a layer's stacks stand where its last expert stood."""
    _check_supported(config)
    sizes = _sizes(config)
    n_layer = need_number(config, "num_hidden_layers")
    _check_count("num_hidden_layers", n_layer, shapes)
    parts = [_expert_parts(layer, sizes, shapes) for layer in range(n_layer)]
    waiting = [{part.tensor for stack in layer.values() for part in stack} for layer in parts]
    wanted = {*_MODEL, *(f"model.layers.{i}.{name}" for i in range(n_layer) for name in _LAYER)}
    found: list[Recipe] = []
    for name in shapes:
        match = _NAME.match(name)
        layer = int(match[1]) if match else -1
        if name in wanted:
            gguf_name, axes, keep = _LAYER[match[2]] if match else _MODEL[name]
            prefix = f"blk.{layer}." if match else ""
            shape = tuple(sizes[axis] for axis in axes)
            found.append(Recipe(prefix + gguf_name, shape, (Part(name),), keep))
            wanted.remove(name)
        elif match and layer < n_layer and name in waiting[layer]:
            waiting[layer].remove(name)
            if not waiting[layer]:
                found.extend(_stacks(layer, sizes, parts[layer]))
        elif not name.endswith(_DERIVED):
            raise SourceError(f"tensor '{name}' is not known in an OLMoE of {n_layer} layers; update mopeq-edge")
    for name in sorted(wanted | set().union(*waiting)):
        raise SourceError(f"tensor '{name}'{_whose(name)} is missing; download the whole checkpoint again")
    return found


def key_values(
    directory: Path, config: Config, tensors: Sequence[SourceTensor], file_type: int, pre: str | None
) -> dict[str, KV]:
    """Key-values as llama.cpp's converter writes them."""
    config = _with_defaults(config)
    writer = start_writer(directory, ARCHITECTURE, tensors)
    add_text_parameters(writer, config, file_type)
    add_bpe_vocabulary(writer, directory, need_number(config, "vocab_size"), pre)
    return as_kvs(writer)


OLMOE = Converter(ARCHITECTURE, recipes, key_values)


def _with_defaults(config: Config) -> Config:
    """``config`` with what transformers' ``OlmoeConfig`` assumes where it says nothing."""
    assumed = {
        "max_position_embeddings": 4096,
        "num_key_value_heads": config.get("num_attention_heads"),
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
    }
    return {**assumed, **{key: value for key, value in config.items() if value is not None}}


def _check_supported(config: Config) -> None:
    """Refuse what llama.cpp's olmoe graph would compute in another way."""
    n_head = need_number(config, "num_attention_heads")
    only: tuple[tuple[str, object], ...] = (
        ("clip_qkv", None),
        ("norm_topk_prob", False),
        ("hidden_act", "silu"),
        ("attention_bias", False),
        ("num_key_value_heads", n_head),
    )
    for key, value in only:
        if (found := config.get(key)) not in (None, value):
            expected = "none" if value is None else value
            raise SourceError(
                f"config.json has {key} {found!r}, expected {expected}: llama.cpp computes OLMoE without it, "
                "so no GGUF of this checkpoint would be right"
            )


def _sizes(config: Config) -> dict[str, int]:
    return {
        "hidden": need_number(config, "hidden_size"),
        "ff": need_number(config, "intermediate_size"),
        "expert": need_number(config, "num_experts"),
        "vocab": need_number(config, "vocab_size"),
    }


def _check_count(key: str, count: int, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """An absurd number must not cost the memory of as many names."""
    if count > max(len(shapes), 1000):
        raise SourceError(f"config.json has {key} {count}, expected no more than there are tensors ({len(shapes)})")


def _expert_parts(
    layer: int, sizes: Mapping[str, int], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, tuple[Part, ...]]:
    """Where each expert's matrices of one layer are: packed if the packed tensors are there."""
    n_expert, hidden, ff = sizes["expert"], sizes["hidden"], sizes["ff"]
    prefix = f"model.layers.{layer}.mlp.experts"
    gate_up, down = f"{prefix}.gate_up_proj", f"{prefix}.down_proj"
    if gate_up not in shapes and down not in shapes:
        _check_count("num_experts", n_expert, shapes)
        return {which: tuple(Part(f"{prefix}.{e}.{which}_proj.weight") for e in range(n_expert)) for which in _EXPERTS}
    for name, expected in ((gate_up, (n_expert, 2 * ff, hidden)), (down, (n_expert, hidden, ff))):
        if shapes.get(name, expected) != expected:
            raise SourceError(
                f"tensor '{name}' has shape {list(shapes[name])}, but config.json asks for {list(expected)}; "
                "use the config.json of these weights"
            )
    return {
        "down": tuple(Part(down, e) for e in range(n_expert)),
        "gate": tuple(Part(gate_up, e, (0, ff)) for e in range(n_expert)),
        "up": tuple(Part(gate_up, e, (ff, 2 * ff)) for e in range(n_expert)),
    }


def _stacks(layer: int, sizes: Mapping[str, int], parts: Mapping[str, tuple[Part, ...]]) -> list[Recipe]:
    return [
        Recipe(f"blk.{layer}.{name}", tuple(sizes[axis] for axis in axes), parts[which])
        for which, (name, axes) in _EXPERTS.items()
    ]


def _whose(name: str) -> str:
    match = _NAME.match(name)
    expert = _EXPERT.match(match[2]) if match else None
    if match is None or expert is None:
        return ""
    return f" (layer {match[1]}, expert {expert[1]})" if expert[1] else f" (layer {match[1]}, all experts)"
