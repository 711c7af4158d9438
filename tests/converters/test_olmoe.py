"""Recipes of OLMoE: order, both layouts of the experts, what is missing or not supported."""

from pathlib import Path
from typing import Any

import pytest

from converters import CONVERTERS
from converters.olmoe import recipes
from mopeq_edge.errors import SourceError
from mopeq_edge.source.converter import Part
from mopeq_edge.source.huggingface import HuggingFaceSource

from ..builders import build_olmoe, edit_json, write_gguf

CONFIG: dict[str, Any] = {
    **{"hidden_size": 8, "intermediate_size": 4, "num_experts": 2, "vocab_size": 16, "num_hidden_layers": 1},
    **{"num_attention_heads": 2, "num_key_value_heads": 2, "clip_qkv": None, "hidden_act": "silu"},
}
LAYER = "model.layers.0."
PER_EXPERT: dict[str, tuple[int, ...]] = {
    "lm_head.weight": (16, 8),
    "model.embed_tokens.weight": (16, 8),
    f"{LAYER}input_layernorm.weight": (8,),
    f"{LAYER}mlp.experts.0.down_proj.weight": (8, 4),
    f"{LAYER}mlp.experts.0.gate_proj.weight": (4, 8),
    f"{LAYER}mlp.experts.0.up_proj.weight": (4, 8),
    f"{LAYER}mlp.experts.1.down_proj.weight": (8, 4),
    f"{LAYER}mlp.experts.1.gate_proj.weight": (4, 8),
    f"{LAYER}mlp.experts.1.up_proj.weight": (4, 8),
    f"{LAYER}mlp.gate.weight": (2, 8),
    f"{LAYER}post_attention_layernorm.weight": (8,),
    f"{LAYER}self_attn.k_norm.weight": (8,),
    f"{LAYER}self_attn.k_proj.weight": (8, 8),
    f"{LAYER}self_attn.o_proj.weight": (8, 8),
    f"{LAYER}self_attn.q_norm.weight": (8,),
    f"{LAYER}self_attn.q_proj.weight": (8, 8),
    f"{LAYER}self_attn.v_proj.weight": (8, 8),
    "model.norm.weight": (8,),
}
PACKED = {
    **{name: shape for name, shape in PER_EXPERT.items() if ".experts." not in name},
    f"{LAYER}mlp.experts.down_proj": (2, 8, 4),
    f"{LAYER}mlp.experts.gate_up_proj": (2, 8, 8),
}


def without(shapes: dict[str, tuple[int, ...]], *ends: str) -> dict[str, tuple[int, ...]]:
    return {name: shape for name, shape in shapes.items() if not name.endswith(ends)}


def test_one_tensor_for_each_matrix() -> None:
    found = recipes(CONFIG, PER_EXPERT)
    assert [(r.name, r.shape, r.keep_f32) for r in found] == [
        ("output.weight", (8, 16), False),
        ("token_embd.weight", (8, 16), False),
        ("blk.0.attn_norm.weight", (8,), True),
        ("blk.0.ffn_down_exps.weight", (4, 8, 2), False),
        ("blk.0.ffn_gate_exps.weight", (8, 4, 2), False),
        ("blk.0.ffn_up_exps.weight", (8, 4, 2), False),
        ("blk.0.ffn_gate_inp.weight", (8, 2), True),
        ("blk.0.ffn_norm.weight", (8,), True),
        ("blk.0.attn_k_norm.weight", (8,), True),
        ("blk.0.attn_k.weight", (8, 8), False),
        ("blk.0.attn_output.weight", (8, 8), False),
        ("blk.0.attn_q_norm.weight", (8,), True),
        ("blk.0.attn_q.weight", (8, 8), False),
        ("blk.0.attn_v.weight", (8, 8), False),
        ("output_norm.weight", (8,), True),
    ]
    assert found[4].parts == (
        Part("model.layers.0.mlp.experts.0.gate_proj.weight"),
        Part("model.layers.0.mlp.experts.1.gate_proj.weight"),
    )


def test_packed() -> None:
    found = {recipe.name: recipe for recipe in recipes(CONFIG, dict(sorted(PACKED.items())))}
    assert list(found) == [recipe.name for recipe in recipes(CONFIG, PER_EXPERT)]
    gate_up = f"{LAYER}mlp.experts.gate_up_proj"
    assert found["blk.0.ffn_gate_exps.weight"].parts == (Part(gate_up, 0, (0, 4)), Part(gate_up, 1, (0, 4)))
    assert found["blk.0.ffn_up_exps.weight"].parts == (Part(gate_up, 0, (4, 8)), Part(gate_up, 1, (4, 8)))
    assert found["blk.0.ffn_down_exps.weight"].parts[1] == Part(f"{LAYER}mlp.experts.down_proj", 1)


def test_both_layouts_give_the_same_file(tmp_path: Path) -> None:
    for name, options in (("a", {"packed": True}), ("b", {}), ("c", {"packed": True, "dtype": "float32"})):
        directory = build_olmoe(tmp_path / name / "model", n_layer=1, **options)
        write_gguf(HuggingFaceSource(directory, CONVERTERS["OlmoeForCausalLM"], "gpt-2"), tmp_path / f"{name}.gguf")
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()
    assert (tmp_path / "a.gguf").read_bytes() != (tmp_path / "c.gguf").read_bytes()


def test_transformers_writes_a_layout_that_is_read(tmp_path: Path) -> None:
    """What ``save_pretrained`` of today's transformers makes, not what our own builder does."""
    from transformers import OlmoeForCausalLM

    ours = build_olmoe(tmp_path / "ours" / "model", packed=True, dtype="float32")
    OlmoeForCausalLM.from_pretrained(ours).save_pretrained(tmp_path / "model")
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        (tmp_path / "model" / name).write_bytes((ours / name).read_bytes())
    (tmp_path / "model" / "generation_config.json").unlink()
    for directory in (ours, tmp_path / "model"):
        source = HuggingFaceSource(directory, CONVERTERS["OlmoeForCausalLM"], "gpt-2")
        write_gguf(source, directory.with_suffix(".gguf"))
    assert ours.with_suffix(".gguf").read_bytes() == (tmp_path / "model.gguf").read_bytes()


def test_derived_tensors_are_left_out() -> None:
    extra = {f"{LAYER}self_attn.rotary_emb.inv_freq": (4,)}
    assert recipes(CONFIG, {**extra, **PER_EXPERT}) == recipes(CONFIG, PER_EXPERT)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (without(PER_EXPERT, "1.up_proj.weight"), r"experts.1.up_proj.weight' \(layer 0, expert 1\) is missing"),
        (without(PER_EXPERT, "q_norm.weight"), r"'model.layers.0.self_attn.q_norm.weight' is missing"),
        (without(PER_EXPERT, "lm_head.weight"), r"'lm_head.weight' \(the output .* is missing"),
        (without(PACKED, "gate_up_proj"), r"experts.gate_up_proj' \(layer 0, all experts\) is missing"),
        ({**PER_EXPERT, f"{LAYER}self_attn.q_proj.bias": (8,)}, r"q_proj.bias' is not known in an OLMoE of 1 layers"),
        ({**PER_EXPERT, "model.layers.1.mlp.gate.weight": (2, 8)}, r"layers.1.mlp.gate.weight' is not known"),
        ({**PER_EXPERT, f"{LAYER}mlp.experts.2.up_proj.weight": (4, 8)}, r"experts.2.up_proj.weight' is not known"),
        ({**PACKED, f"{LAYER}mlp.experts.0.up_proj.weight": (4, 8)}, r"experts.0.up_proj.weight' is not known"),
        (
            {**PACKED, f"{LAYER}mlp.experts.gate_up_proj": (2, 16, 8)},
            r"gate_up_proj' has shape \[2, 16, 8\], but config.json asks for \[2, 8, 8\]",
        ),
        ({}, "is missing"),
    ],
)
def test_missing_and_unknown_tensors(shapes: dict[str, tuple[int, ...]], message: str) -> None:
    with pytest.raises(SourceError, match=message):
        recipes(CONFIG, shapes)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("clip_qkv", 8.0), ("norm_topk_prob", True), ("hidden_act", "gelu"), ("attention_bias", True)),
        *(("num_key_value_heads", 1), ("num_experts", None), ("num_experts", "16"), ("hidden_size", 0)),
    ],
)
def test_what_llama_cpp_cannot_compute(key: str, value: object) -> None:
    with pytest.raises(SourceError, match=f"config.json has {key} {value!r}, expected"):
        recipes({**CONFIG, key: value}, PER_EXPERT)


@pytest.mark.parametrize("key", ["num_hidden_layers", "num_experts"])
def test_absurd_numbers_are_refused_at_once(key: str) -> None:
    with pytest.raises(SourceError, match=f"config.json has {key} 1000000000000, expected no more"):
        recipes({**CONFIG, key: 10**12}, PER_EXPERT)


def test_errors_name_the_directory(tmp_path: Path) -> None:
    directory = build_olmoe(tmp_path / "model", n_layer=1)
    edit_json(directory / "config.json", clip_qkv=8.0)
    with pytest.raises(SourceError, match=f"^{directory}: config.json has clip_qkv 8.0, expected none: "):
        HuggingFaceSource(directory, CONVERTERS["OlmoeForCausalLM"], "gpt-2")


def test_defaults_are_those_of_transformers(tmp_path: Path) -> None:
    """A config.json that leaves out what ``OlmoeConfig`` assumes gives the same key-values as one that says it."""
    from transformers import AutoConfig

    directory = build_olmoe(tmp_path / "model", n_layer=1)
    optional = ("num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "rope_parameters", "hidden_act")
    edit_json(directory / "config.json", **dict.fromkeys(optional))
    short = HuggingFaceSource(directory, CONVERTERS["OlmoeForCausalLM"], "gpt-2").kvs
    full = AutoConfig.from_pretrained(directory).to_dict()
    edit_json(directory / "config.json", **{key: full[key] for key in optional})
    assert full["max_position_embeddings"] is not None
    assert HuggingFaceSource(directory, CONVERTERS["OlmoeForCausalLM"], "gpt-2").kvs == short
