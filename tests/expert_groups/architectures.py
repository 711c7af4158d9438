"""Tiny random MoE models of llama.cpp's architectures, as GGUF files written with the gguf package alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt

N_LAYER, N_EMBD, N_FF, N_EXPERT, N_USED, N_HEAD, N_VOCAB = 2, 256, 256, 8, 3, 4, 384
HEAD = N_EMBD // N_HEAD
COMMON_KEYS: Mapping[str, Any] = {
    "block_count": N_LAYER,
    "context_length": 1024,
    "embedding_length": N_EMBD,
    "feed_forward_length": N_FF,
    "attention.head_count": N_HEAD,
    "attention.head_count_kv": N_HEAD,
    "attention.layer_norm_rms_epsilon": 1e-5,
    "rope.freq_base": 10000.0,
    "rope.dimension_count": HEAD,
    "expert_count": N_EXPERT,
    "expert_used_count": N_USED,
}
"""What every architecture has, behind its name and a dot; its own keys come on top."""

Floats = npt.NDArray[np.float32]
Shape = tuple[int, ...]

ATTENTION: Mapping[str, Shape] = {
    "attn_norm.weight": (N_EMBD,),
    "ffn_norm.weight": (N_EMBD,),
    **{f"attn_{name}.weight": (N_EMBD, N_EMBD) for name in ("q", "k", "v", "output")},
}
EXPERTS: Mapping[str, Shape] = {
    "ffn_gate_inp.weight": (N_EMBD, N_EXPERT),
    "ffn_gate_exps.weight": (N_EMBD, N_FF, N_EXPERT),
    "ffn_up_exps.weight": (N_EMBD, N_FF, N_EXPERT),
    "ffn_down_exps.weight": (N_FF, N_EMBD, N_EXPERT),
}
FUSED_EXPERTS: Mapping[str, Shape] = {
    "ffn_gate_inp.weight": (N_EMBD, N_EXPERT),
    "ffn_gate_up_exps.weight": (N_EMBD, 2 * N_FF, N_EXPERT),
    "ffn_down_exps.weight": (N_FF, N_EMBD, N_EXPERT),
}
SHARED: Mapping[str, Shape] = {
    "ffn_gate_shexp.weight": (N_EMBD, N_FF),
    "ffn_up_shexp.weight": (N_EMBD, N_FF),
    "ffn_down_shexp.weight": (N_FF, N_EMBD),
}
LORA_RANK, ROPE = 64, 32
MLA: Mapping[str, Shape] = {
    "attn_norm.weight": (N_EMBD,),
    "ffn_norm.weight": (N_EMBD,),
    "attn_q_a.weight": (N_EMBD, LORA_RANK),
    "attn_q_a_norm.weight": (LORA_RANK,),
    "attn_q_b.weight": (LORA_RANK, N_HEAD * HEAD),
    "attn_kv_a_mqa.weight": (N_EMBD, LORA_RANK + ROPE),
    "attn_kv_a_norm.weight": (LORA_RANK,),
    "attn_k_b.weight": (HEAD - ROPE, LORA_RANK, N_HEAD),
    "attn_v_b.weight": (LORA_RANK, HEAD, N_HEAD),
    "attn_output.weight": (N_HEAD * HEAD, N_EMBD),
}
DENSE: Mapping[str, Shape] = {
    "ffn_gate.weight": (N_EMBD, N_FF),
    "ffn_up.weight": (N_EMBD, N_FF),
    "ffn_down.weight": (N_FF, N_EMBD),
}


@dataclass(frozen=True)
class Architecture:
    """What a model of one architecture holds: keys on top of the common ones, and tensors of a layer."""

    name: str
    layer: Mapping[str, Shape]
    keys: Mapping[str, Any] = field(default_factory=dict)
    first_layer: Mapping[str, Shape] | None = None


DEEPSEEK_KEYS: Mapping[str, Any] = {
    "attention.q_lora_rank": LORA_RANK,
    "attention.kv_lora_rank": LORA_RANK,
    "attention.key_length": LORA_RANK + ROPE,
    "attention.value_length": LORA_RANK,
    "attention.key_length_mla": HEAD,
    "attention.value_length_mla": HEAD,
    "attention.head_count_kv": 1,
    "rope.dimension_count": ROPE,
    "leading_dense_block_count": 1,
    "expert_feed_forward_length": N_FF,
    "expert_shared_count": 1,
    "expert_weights_scale": 2.0,
    "expert_weights_norm": True,
    "expert_gating_func": 2,
}

ARCHITECTURES: Mapping[str, Architecture] = {
    "olmoe": Architecture(
        "olmoe", {**ATTENTION, **EXPERTS, "attn_q_norm.weight": (N_EMBD,), "attn_k_norm.weight": (N_EMBD,)}
    ),
    "mixtral": Architecture("llama", {**ATTENTION, **EXPERTS}),
    "qwen2moe": Architecture(
        "qwen2moe",
        {**ATTENTION, **EXPERTS, **SHARED, "ffn_gate_inp_shexp.weight": (N_EMBD,)}
        | {f"attn_{name}.bias": (N_EMBD,) for name in ("q", "k", "v")},
        {"expert_feed_forward_length": N_FF, "expert_shared_feed_forward_length": N_FF},
    ),
    "qwen3moe": Architecture(
        "qwen3moe",
        {**ATTENTION, **EXPERTS, "attn_q_norm.weight": (HEAD,), "attn_k_norm.weight": (HEAD,)},
        {"expert_feed_forward_length": N_FF, "attention.key_length": HEAD, "attention.value_length": HEAD},
    ),
    "granitemoe": Architecture(
        "granitemoe",
        {**ATTENTION, **EXPERTS, **SHARED},
        {"logit_scale": 0.5, "residual_scale": 0.7, "embedding_scale": 2.0, "attention.scale": 0.125}
        | {"expert_shared_feed_forward_length": N_FF},
    ),
    "gpt-oss": Architecture(
        "gpt-oss",
        {name: shape for name, shape in ATTENTION.items() if name != "ffn_norm.weight"}
        | {"post_attention_norm.weight": (N_EMBD,), "attn_sinks.weight": (N_HEAD,), **EXPERTS}
        | {f"attn_{name}.bias": (N_EMBD,) for name in ("q", "k", "v", "output")}
        | {"ffn_gate_inp.bias": (N_EXPERT,), "ffn_gate_exps.bias": (N_FF, N_EXPERT)}
        | {"ffn_up_exps.bias": (N_FF, N_EXPERT), "ffn_down_exps.bias": (N_EMBD, N_EXPERT)},
        {"expert_feed_forward_length": N_FF, "attention.sliding_window": 128, "attention.key_length": HEAD}
        | {"attention.value_length": HEAD},
    ),
    "deepseek2": Architecture(
        "deepseek2",
        {**MLA, **EXPERTS, **SHARED, "exp_probs_b.bias": (N_EXPERT,)},
        DEEPSEEK_KEYS,
        {**MLA, **DENSE},
    ),
    "deepseek2, experts by group, gate and up in one": Architecture(
        "deepseek2",
        {**MLA, **FUSED_EXPERTS, **SHARED, "exp_probs_b.bias": (N_EXPERT,)},
        {**DEEPSEEK_KEYS, "expert_group_count": 4, "expert_group_used_count": 2},
        {**MLA, **DENSE},
    ),
    "mixtral, experts with scales": Architecture(
        "llama",
        {**ATTENTION, **EXPERTS} | {f"ffn_{name}_exps.scale": (N_EXPERT,) for name in ("gate", "up", "down")},
    ),
}
"""By a name for the test; the experts are 256 wide, so that every type fits."""


def is_stack(name: str) -> bool:
    return name.endswith("_exps.weight")


def random_tensors(architecture: Architecture, seed: int = 0) -> dict[str, Floats]:
    """All tensors in float32, in numpy's order of dimensions (the reverse of ggml's)."""
    shapes: dict[str, Shape] = {
        "token_embd.weight": (N_EMBD, N_VOCAB),
        "output_norm.weight": (N_EMBD,),
        "output.weight": (N_EMBD, N_VOCAB),
    }
    for layer in range(N_LAYER):
        first = layer == 0 and architecture.first_layer is not None
        own = architecture.first_layer if first else architecture.layer
        assert own is not None
        shapes |= {f"blk.{layer}.{name}": shape for name, shape in own.items()}
    rng = np.random.default_rng(seed)
    return {name: _draw(rng, name, shape[::-1]) for name, shape in shapes.items()}


def _draw(rng: np.random.Generator, name: str, shape: Shape) -> Floats:
    values = rng.standard_normal(shape, dtype=np.float32)
    if "norm" in name or name.endswith("_exps.scale"):
        return np.asarray(1 + 0.1 * values, dtype=np.float32)
    if "ffn_gate_inp.weight" in name:
        # routers that decide clearly: rounding must not flip an expert in a test of rounding
        return np.asarray(values * 0.5, dtype=np.float32)
    return np.asarray(values * (0.1 if name.endswith(".bias") else 0.06), dtype=np.float32)


Quantize = Callable[[str, Floats], tuple[npt.NDArray[Any], gguf.GGMLQuantizationType]]


def write_model(path: Path, architecture: Architecture, tensors: Mapping[str, Floats], quantize: Quantize) -> None:
    """Write a GGUF whose stacks ``quantize`` turned into bytes of a type; everything else stays float32."""
    writer = gguf.GGUFWriter(path, architecture.name)
    _write_keys(writer, architecture)
    for name, values in tensors.items():
        data, kind = quantize(name, values) if is_stack(name) else (values, gguf.GGMLQuantizationType.F32)
        writer.add_tensor(name, data, raw_shape=data.shape, raw_dtype=kind)
    finish(writer)


def finish(writer: gguf.GGUFWriter) -> None:
    """Write what the writer holds and close the file."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _write_keys(writer: gguf.GGUFWriter, architecture: Architecture) -> None:
    keys: dict[str, Any] = {**COMMON_KEYS, "vocab_size": N_VOCAB, **architecture.keys}
    adders: Sequence[tuple[type, Callable[[str, Any], None]]] = (
        (bool, writer.add_bool),
        (int, writer.add_uint32),
        (float, writer.add_float32),
        (str, writer.add_string),
        (list, writer.add_array),
    )
    for key, value in keys.items():
        add = next(adder for kind, adder in adders if isinstance(value, kind))
        add(f"{architecture.name}.{key}", value)
    writer.add_string("tokenizer.ggml.model", "none")
