"""Where every element of a GGUF comes from, written down by hand for each family: llama.cpp's names, the checkpoint's
names and the order of elements, from llama.cpp's graphs and the models' own code. Nothing here uses the converters.

A table gets the numbers of the checkpoint's elements by tensor and says what each GGUF tensor must hold, outermost axis
first. Its sizes are those of the tiny checkpoints in ``families`` and ``vision_language``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial

import numpy as np

from .address_code import Numbers

Layer = Mapping[str, Numbers]
"""The tensors of a block, by the rest of their names."""

Table = Callable[[Mapping[str, Numbers]], Mapping[str, Numbers]]
"""From the tensors of a checkpoint to those of its GGUF."""

FF = 32
NORMS = {"attn_norm.weight": "input_layernorm.weight", "ffn_norm.weight": "post_attention_layernorm.weight"}
ATTENTION = {
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
}
HEAD_NORMS = {"attn_q_norm.weight": "self_attn.q_norm.weight", "attn_k_norm.weight": "self_attn.k_norm.weight"}
ROUTER = {"ffn_gate_inp.weight": "mlp.gate.weight"}
DENSE = {f"ffn_{which}.weight": f"mlp.{which}_proj.weight" for which in ("gate", "up", "down")}
SHARED = {f"ffn_{which}_shexp.weight": f"mlp.shared_experts.{which}_proj.weight" for which in ("gate", "up", "down")}


def halves_in_turn(rows: Numbers, n_head: int) -> Numbers:
    """Rotary pairs are row i and row i + d/2 of a head in the checkpoint, rows 2i and 2i + 1 in llama.cpp's llama."""
    d = len(rows) // n_head
    return rows[[head * d + row // 2 + (row % 2) * (d // 2) for head in range(n_head) for row in range(d)]]


def one_by_one(t: Layer, prefix: str, gate: str = "gate_proj", up: str = "up_proj", down: str = "down_proj") -> Layer:
    """A tensor for each matrix of each expert."""
    n_expert = sum(name.startswith(f"{prefix}.") and name.endswith(f".{gate}.weight") for name in t)
    return {
        f"ffn_{which}_exps.weight": np.stack([t[f"{prefix}.{e}.{name}.weight"] for e in range(n_expert)])
        for which, name in (("gate", gate), ("up", up), ("down", down))
    }


def in_two(gate_up: Numbers, down: Numbers, ff: int = FF) -> Layer:
    """Gate's rows before up's: [n_expert, 2 ff, n_embd]."""
    assert gate_up.shape[1] == 2 * ff
    return {
        "ffn_gate_exps.weight": gate_up[:, :ff],
        "ffn_up_exps.weight": gate_up[:, ff:],
        "ffn_down_exps.weight": down,
    }


def plain(t: Layer, *names: Mapping[str, str]) -> dict[str, Numbers]:
    return {ours: t[theirs] for each in names for ours, theirs in each.items()}


def mixtral(t: Layer) -> Layer:
    router = {"ffn_gate_inp.weight": "block_sparse_moe.gate.weight"}
    n_head = {"attn_q.weight": 4, "attn_k.weight": 2}
    found = plain(t, NORMS, ATTENTION, router)
    found |= {name: halves_in_turn(found[name], heads) for name, heads in n_head.items()}
    return {**found, **one_by_one(t, "block_sparse_moe.experts", gate="w1", up="w3", down="w2")}


def granite_moe(t: Layer) -> Layer:
    router = {"ffn_gate_inp.weight": "block_sparse_moe.router.layer.weight"}
    n_head = {"attn_q.weight": 4, "attn_k.weight": 2}
    found = plain(t, NORMS, ATTENTION, router)
    found |= {name: halves_in_turn(found[name], heads) for name, heads in n_head.items()}
    experts = in_two(t["block_sparse_moe.input_linear.weight"], t["block_sparse_moe.output_linear.weight"])
    return {**found, **experts}


def qwen2_moe(t: Layer) -> Layer:
    biases = {f"attn_{which}.bias": f"self_attn.{which}_proj.bias" for which in "qkv"}
    shared = {name: theirs.replace("shared_experts", "shared_expert") for name, theirs in SHARED.items()}
    gate = {"ffn_gate_inp_shexp.weight": "mlp.shared_expert_gate.weight"}
    return {**plain(t, NORMS, ATTENTION, biases, ROUTER, shared, gate), **one_by_one(t, "mlp.experts")}


def olmoe(t: Layer) -> Layer:
    """Qwen3-MoE has the same names."""
    return {**plain(t, NORMS, ATTENTION, HEAD_NORMS, ROUTER), **one_by_one(t, "mlp.experts")}


def packed_olmoe(t: Layer) -> Layer:
    experts = in_two(t["mlp.experts.gate_up_proj"], t["mlp.experts.down_proj"])
    return {**plain(t, NORMS, ATTENTION, HEAD_NORMS, ROUTER), **experts}


def qwen3_vl_moe(t: Layer) -> Layer:
    """Columns are features: gate's before up's."""
    gate_up, down = (t[f"mlp.experts.{name}_proj"].transpose(0, 2, 1) for name in ("gate_up", "down"))
    return {**plain(t, NORMS, ATTENTION, HEAD_NORMS, ROUTER), **in_two(gate_up, down, ff=96)}


def gpt_oss(t: Layer) -> Layer:
    """Columns are features, gate's and up's in turn."""
    norms = {
        "attn_norm.weight": "input_layernorm.weight",
        "post_attention_norm.weight": "post_attention_layernorm.weight",
    }
    biases = {ours.replace("weight", "bias"): theirs.replace("weight", "bias") for ours, theirs in ATTENTION.items()}
    router = {f"ffn_gate_inp.{kind}": f"mlp.router.{kind}" for kind in ("weight", "bias")}
    gate_up, bias = t["mlp.experts.gate_up_proj"], t["mlp.experts.gate_up_proj_bias"]
    return {
        **plain(t, norms, ATTENTION, biases, router, {"attn_sinks.weight": "self_attn.sinks"}),
        "ffn_gate_exps.weight": gate_up[:, :, 0::2].transpose(0, 2, 1),
        "ffn_up_exps.weight": gate_up[:, :, 1::2].transpose(0, 2, 1),
        "ffn_down_exps.weight": t["mlp.experts.down_proj"].transpose(0, 2, 1),
        "ffn_gate_exps.bias": bias[:, 0::2],
        "ffn_up_exps.bias": bias[:, 1::2],
        "ffn_down_exps.bias": t["mlp.experts.down_proj_bias"],
    }


def feed_forward(t: Layer) -> Layer:
    """DeepSeek's: dense in the first layers, then shared and routed experts."""
    if "mlp.gate.weight" not in t:
        return plain(t, DENSE)
    bias = {"exp_probs_b.bias": "mlp.gate.e_score_correction_bias"}
    bias = {ours: theirs for ours, theirs in bias.items() if theirs in t}
    return {**plain(t, ROUTER, SHARED, bias), **one_by_one(t, "mlp.experts")}


def deepseek_ocr(t: Layer) -> Layer:
    return {**plain(t, NORMS, ATTENTION), **feed_forward(t)}


def latent(t: Layer) -> Layer:
    """Four heads, each of 32 rows that make keys and 24 that make values from a latent of 64."""
    names = {
        "attn_kv_a_mqa.weight": "self_attn.kv_a_proj_with_mqa.weight",
        "attn_kv_a_norm.weight": "self_attn.kv_a_layernorm.weight",
        "attn_output.weight": "self_attn.o_proj.weight",
    }
    if "self_attn.q_proj.weight" in t:
        names["attn_q.weight"] = "self_attn.q_proj.weight"
    else:
        names |= {f"attn_q_{at}.weight": f"self_attn.q_{at}_proj.weight" for at in "ab"}
        names["attn_q_a_norm.weight"] = "self_attn.q_a_layernorm.weight"
    both = t["self_attn.kv_b_proj.weight"]
    assert both.shape == (4 * (32 + 24), 64)
    heads = [both[start : start + 56] for start in (0, 56, 112, 168)]
    return {
        **plain(t, NORMS, names),
        **feed_forward(t),
        "attn_k_b.weight": np.stack([rows[:32].T for rows in heads]),
        "attn_v_b.weight": np.stack([rows[32:] for rows in heads]),
    }


def molmoe(t: Layer) -> Layer:
    names = {
        **{"attn_norm.weight": "attn_norm.weight", "ffn_norm.weight": "ff_norm.weight"},
        **{"attn_q_norm.weight": "q_norm.weight", "attn_k_norm.weight": "k_norm.weight"},
        "attn_output.weight": "attn_out.weight",
    }
    qkv = t["att_proj.weight"]
    assert qkv.shape == (192, 64)
    rows = {"attn_q.weight": qkv[:64], "attn_k.weight": qkv[64:128], "attn_v.weight": qkv[128:]}
    return {**plain(t, names, ROUTER), **rows, **one_by_one(t, "mlp.experts")}


def whole(
    tensors: Mapping[str, Numbers],
    *,
    layer: Callable[[Layer], Layer],
    n_layer: int,
    blocks: str = "model.layers.",
    embedding: str = "model.embed_tokens.weight",
    norm: str = "model.norm.weight",
    output: str | None = "lm_head.weight",
) -> dict[str, Numbers]:
    """What every tensor of the GGUF must hold."""
    found = {"token_embd.weight": tensors[embedding], "output_norm.weight": tensors[norm]}
    if output is not None:
        found["output.weight"] = tensors[output]
    for number in range(n_layer):
        prefix = f"{blocks}{number}."
        own = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
        found |= {f"blk.{number}.{name}": value for name, value in layer(own).items()}
    return found


def vl2(layer: Callable[[Layer], Layer], n_layer: int) -> Table:
    names = {"embedding": "model.embed_tokens.weight", "norm": "model.norm.weight", "output": "lm_head.weight"}
    inside = {key: f"language.{name}" for key, name in names.items()}
    return partial(whole, layer=layer, n_layer=n_layer, blocks="language.model.layers.", **inside)


_QWEN3_VL = "model.language_model."
_MOLMOE = "model.transformer."
TABLES: Mapping[str, Table] = {
    "olmoe": partial(whole, layer=olmoe, n_layer=2),
    "olmoe-packed": partial(whole, layer=packed_olmoe, n_layer=2),
    "mixtral": partial(whole, layer=mixtral, n_layer=2),
    "granite-moe": partial(whole, layer=granite_moe, n_layer=2),
    "qwen2-moe": partial(whole, layer=qwen2_moe, n_layer=2),
    "qwen3-moe": partial(whole, layer=olmoe, n_layer=2),
    "qwen3-moe-packed-tied": partial(whole, layer=packed_olmoe, n_layer=2, output=None),
    "qwen3-vl-moe": partial(
        whole,
        layer=qwen3_vl_moe,
        n_layer=2,
        blocks=f"{_QWEN3_VL}layers.",
        embedding=f"{_QWEN3_VL}embed_tokens.weight",
        norm=f"{_QWEN3_VL}norm.weight",
    ),
    "gpt-oss": partial(whole, layer=gpt_oss, n_layer=3),
    "deepseek-ocr": partial(whole, layer=deepseek_ocr, n_layer=3),
    "deepseek-v2": partial(whole, layer=latent, n_layer=3),
    "deepseek-v2-lite": partial(whole, layer=latent, n_layer=26),
    "deepseek-v3": partial(whole, layer=latent, n_layer=3),
    "molmoe-1b": partial(
        whole,
        layer=molmoe,
        n_layer=2,
        blocks=f"{_MOLMOE}blocks.",
        embedding=f"{_MOLMOE}wte.embedding",
        norm=f"{_MOLMOE}ln_f.weight",
        output=f"{_MOLMOE}ff_out.weight",
    ),
    "vl2-tiny": vl2(deepseek_ocr, 3),
    "vl2-small": vl2(latent, 27),
    "vl2-base": vl2(latent, 3),
}

_PICTURES = ("vision.", "projector.", "image_newline", "view_seperator")
NOT_TEXT: Mapping[str, tuple[str, ...]] = {
    "qwen3-vl-moe": ("model.visual.",),
    "molmoe-1b": ("model.vision_backbone.", f"{_MOLMOE}wte.new_embedding"),
    # the layer that predicts a further token
    "deepseek-v3": ("model.layers.3.",),
    **dict.fromkeys(("vl2-tiny", "vl2-small", "vl2-base"), _PICTURES),
}
"""Beginnings of the names of all tensors that no GGUF has."""


def unused(tensors: Mapping[str, Numbers], table: Mapping[str, Numbers]) -> Iterator[str]:
    """Tensors of the checkpoint of which ``table`` lacks an element, or has one twice."""
    times = np.bincount(
        np.concatenate([value.reshape(-1) for value in table.values()]), minlength=sum(v.size for v in tensors.values())
    )
    for name, numbers in tensors.items():
        if (times[numbers] != 1).any():
            yield name
