"""Recipes of DeepSeek-V2 and V3: the matrices of each head, what is left out, missing or not supported."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from converters import CONVERTERS
from converters.deepseek_v2 import V2, V3, recipes
from mopeq_edge.errors import SourceError
from mopeq_edge.source.converter import Part
from mopeq_edge.source.huggingface import HuggingFaceSource

from ..builders import edit_json, write_gguf
from .families import YARN, build_deepseek_v2, build_deepseek_v2_lite, build_deepseek_v3, causal_model, logits

CONFIG: dict[str, Any] = {
    **{"hidden_size": 8, "intermediate_size": 12, "moe_intermediate_size": 4, "vocab_size": 16},
    **{"num_hidden_layers": 2, "first_k_dense_replace": 1, "num_attention_heads": 2, "num_key_value_heads": 2},
    **{"n_routed_experts": 2, "n_shared_experts": 2, "num_experts_per_tok": 1, "hidden_act": "silu"},
    **{"q_lora_rank": 5, "kv_lora_rank": 6, "qk_nope_head_dim": 3, "qk_rope_head_dim": 2, "v_head_dim": 4},
    "num_nextn_predict_layers": 1,
}
BLOCK = "model.layers.1."
ATTENTION: dict[str, tuple[int, ...]] = {
    "input_layernorm.weight": (8,),
    "post_attention_layernorm.weight": (8,),
    "self_attn.kv_a_layernorm.weight": (6,),
    "self_attn.kv_a_proj_with_mqa.weight": (8, 8),
    "self_attn.kv_b_proj.weight": (14, 6),
    "self_attn.o_proj.weight": (8, 8),
    "self_attn.q_a_layernorm.weight": (5,),
    "self_attn.q_a_proj.weight": (5, 8),
    "self_attn.q_b_proj.weight": (10, 5),
}
SPARSE: dict[str, tuple[int, ...]] = {
    **{f"mlp.experts.{e}.{m}_proj.weight": (4, 8) for e in "01" for m in ("gate", "up")},
    **{f"mlp.experts.{e}.down_proj.weight": (8, 4) for e in "01"},
    "mlp.gate.weight": (2, 8),
    **{f"mlp.shared_experts.{m}_proj.weight": (8, 8) for m in ("down", "gate", "up")},
}
SHAPES: dict[str, tuple[int, ...]] = {
    "lm_head.weight": (16, 8),
    "model.embed_tokens.weight": (16, 8),
    **{f"model.layers.0.{name}": shape for name, shape in ATTENTION.items()},
    **{f"model.layers.0.mlp.{m}_proj.weight": (8, 12) if m == "down" else (12, 8) for m in ("down", "gate", "up")},
    **{BLOCK + name: shape for name, shape in sorted({**ATTENTION, **SPARSE}.items())},
    "model.norm.weight": (8,),
}
BIAS = {f"{BLOCK}mlp.gate.e_score_correction_bias": (2,)}


def without(shapes: dict[str, tuple[int, ...]], *ends: str) -> dict[str, tuple[int, ...]]:
    return {name: shape for name, shape in shapes.items() if not name.endswith(ends)}


def test_two_stacks_of_a_matrix_a_head() -> None:
    found = recipes(V2, CONFIG, SHAPES)
    names = [recipe.name for recipe in found]
    at = names.index("blk.1.attn_k_b.weight")
    assert names[at + 1] == "blk.1.attn_v_b.weight"
    kv_b = f"{BLOCK}self_attn.kv_b_proj.weight"
    assert found[at].shape == (3, 6, 2)
    assert found[at].parts == (
        Part(kv_b, transposed=True, columns=(0, 3)),
        Part(kv_b, transposed=True, columns=(7, 10)),
    )
    assert found[at + 1].shape == (6, 4, 2)
    assert found[at + 1].parts == (Part(kv_b, rows=(3, 7)), Part(kv_b, rows=(10, 14)))
    assert [name for name in names if name.startswith("blk.0.ffn_")] == [
        *("blk.0.ffn_norm.weight", "blk.0.ffn_down.weight", "blk.0.ffn_gate.weight", "blk.0.ffn_up.weight")
    ]


def test_the_bias_of_the_router_is_only_v3s() -> None:
    found = {recipe.name: recipe for recipe in recipes(V3, CONFIG, {**SHAPES, **BIAS})}
    assert found["blk.1.exp_probs_b.bias"].keep_f32
    with pytest.raises(SourceError, match=r"layers.1.mlp.gate.e_score_correction_bias' is missing"):
        recipes(V3, CONFIG, SHAPES)
    with pytest.raises(SourceError, match=r"e_score_correction_bias' is not known in a DeepSeek of 2 layers"):
        recipes(V2, CONFIG, {**SHAPES, **BIAS})


def test_layers_that_predict_further_tokens_are_left_out() -> None:
    more = {"model.layers.2.eh_proj.weight": (8, 16), "model.layers.2.mlp.gate.weight": (2, 8)}
    assert recipes(V2, CONFIG, {**SHAPES, **more}) == recipes(V2, CONFIG, SHAPES)
    for name in ("model.layers.3.eh_proj.weight", "model.layers.1.eh_proj.weight"):
        with pytest.raises(SourceError, match=f"'{name}' is not known"):
            recipes(V2, CONFIG, {**SHAPES, name: (8, 16)})
    with pytest.raises(SourceError, match=r"layers.2.eh_proj.weight' is not known"):
        recipes(V2, {**CONFIG, "num_nextn_predict_layers": None}, {**SHAPES, **more})
    with pytest.raises(SourceError, match="num_nextn_predict_layers 1000000000000, expected no more than"):
        recipes(V2, {**CONFIG, "num_nextn_predict_layers": 10**12}, SHAPES)


def test_tied_embeddings_need_no_output_matrix() -> None:
    tied = {**CONFIG, "tie_word_embeddings": True}
    found = [recipe.name for recipe in recipes(V2, tied, without(SHAPES, "lm_head.weight"))]
    assert found == [recipe.name for recipe in recipes(V2, CONFIG, SHAPES) if recipe.name != "output.weight"]


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (without(SHAPES, "1.self_attn.kv_b_proj.weight"), r"'model.layers.1.self_attn.kv_b_proj.weight' is missing"),
        (without(SHAPES, "q_a_layernorm.weight"), r"'model.layers.0.self_attn.q_a_layernorm.weight' is missing"),
        (without(SHAPES, "experts.1.up_proj.weight"), r"up_proj.weight' \(layer 1, expert 1\) is missing"),
        (without(SHAPES, "lm_head.weight"), r"'lm_head.weight' \(the output .* is missing"),
        ({**SHAPES, f"{BLOCK}self_attn.q_proj.weight": (10, 8)}, r"self_attn.q_proj.weight' is not known"),
        ({**SHAPES, f"{BLOCK}self_attn.o_proj.bias": (8,)}, r"self_attn.o_proj.bias' is not known"),
        ({**SHAPES, "model.layers.0.mlp.gate.weight": (2, 8)}, r"layers.0.mlp.gate.weight' is not known"),
        (
            {**SHAPES, f"{BLOCK}self_attn.kv_b_proj.weight": (15, 6)},
            r"kv_b_proj.weight' has shape \[15, 6\], but config.json asks for \[14, 6\]",
        ),
        (
            {**SHAPES, f"{BLOCK}mlp.gate.weight_scale_inv": (1, 1)},
            r"weight_scale_inv' belongs to FP8 weights; give the checkpoint in BF16",
        ),
    ],
)
def test_missing_and_unknown_tensors(shapes: dict[str, tuple[int, ...]], message: str) -> None:
    with pytest.raises(SourceError, match=message):
        recipes(V2, CONFIG, shapes)


@pytest.mark.parametrize(
    ("version", "key", "value"),
    [
        *((v, "hidden_act", "gelu") for v in (V2, V3)),
        *((v, "attention_bias", True) for v in (V2, V3)),
        *((v, "moe_layer_freq", 2) for v in (V2, V3)),
        *((v, "num_key_value_heads", 1) for v in (V2, V3)),
        *((v, "rms_norm_eps", 1e-4) for v in (V2, V3)),
        *((v, "qk_nope_head_dim", 0) for v in (V2, V3)),
        *((V2, "topk_method", "group_limited_greedy"), (V2, "n_group", 8), (V2, "norm_topk_prob", True)),
        *((V2, "mlp_bias", True), (V2, "scoring_func", "sigmoid"), (V2, "first_k_dense_replace", 3)),
        *((V3, "scoring_func", "softmax"), (V3, "rope_interleave", False), (V3, "topk_method", "greedy")),
    ],
)
def test_what_llama_cpp_cannot_compute(version: Any, key: str, value: object) -> None:
    with pytest.raises(SourceError, match=f"config.json has {key} {value!r}, expected"):
        recipes(version, {**CONFIG, key: value}, {**SHAPES, **BIAS})


@pytest.mark.parametrize(
    ("rope", "message"),
    [
        ({**YARN, "mscale": 1.0}, r"yarn with mscale 1.0 and mscale_all_dim 0.707, expected equal numbers"),
        ({**YARN, "mscale": None, "mscale_all_dim": None}, r"mscale None and mscale_all_dim None, expected equal"),
        ({**YARN, "mscale": 0.0, "mscale_all_dim": 0.0}, r"mscale 0.0 and mscale_all_dim 0.0, expected equal"),
        ({**YARN, "beta_slow": 2.0}, r"with beta_fast 32.0, beta_slow 2.0, expected .* DeepSeek-V2's ramp"),
        ({**YARN, "beta_fast": 2}, r"yarn with beta_fast 2, beta_slow 1.0, expected beta_fast 32"),
        ({**YARN, "attention_factor": 1.2}, r"yarn with attention_factor 1.2, expected none"),
        ({**YARN, "truncate": False}, r"truncate False, expected .* truncate True or none"),
        ({"type": "linear", "factor": 2.0}, r"config.json has rope type 'linear', expected default or yarn"),
    ],
)
def test_rope_that_llama_cpp_turns_in_another_way(rope: dict[str, object], message: str) -> None:
    for key in ("rope_parameters", "rope_scaling"):
        with pytest.raises(SourceError, match=message):
            recipes(V2, {**CONFIG, "qk_rope_head_dim": 16, key: rope}, SHAPES)


def test_the_number_of_layers_decides_about_the_query() -> None:
    with pytest.raises(SourceError, match=r"has q_lora_rank 5 and 27 layers, expected none: .* could not load"):
        recipes(V2, {**CONFIG, "num_hidden_layers": 27}, SHAPES)
    low_rank = ("q_a_layernorm.weight", "q_a_proj.weight", "q_b_proj.weight")
    one_matrix = {f"model.layers.{layer}.self_attn.q_proj.weight": (10, 8) for layer in range(2)}
    found = {
        r.name: r.shape for r in recipes(V2, {**CONFIG, "q_lora_rank": None}, without(SHAPES, *low_rank) | one_matrix)
    }
    assert found["blk.0.attn_q.weight"] == (8, 10)
    # none at all is what transformers assumes, not one matrix
    unsaid = {key: value for key, value in CONFIG.items() if key != "q_lora_rank"}
    wide = {"q_a_layernorm.weight": (1536,), "q_a_proj.weight": (1536, 8), "q_b_proj.weight": (10, 1536)}
    shapes = {name: wide.get(name.rpartition("self_attn.")[2], shape) for name, shape in SHAPES.items()}
    found = {recipe.name: recipe.shape for recipe in recipes(V2, unsaid, shapes)}
    assert found["blk.0.attn_q_a.weight"] == (8, 1536)


@pytest.mark.parametrize("name", ["V2", "V3"])
def test_defaults_are_those_of_transformers(tmp_path: Path, name: str) -> None:
    """A config.json that leaves out what transformers assumes gives the same key-values as one that says it."""
    from transformers import AutoConfig

    build = {"V2": build_deepseek_v2, "V3": build_deepseek_v3}[name]
    grouped = {"n_group": 8, "topk_group": 4} if name == "V3" else {}
    directory = build(tmp_path / "model", "bfloat16", **grouped)
    optional = (
        *("max_position_embeddings", "rms_norm_eps", "rope_parameters", "hidden_act", "routed_scaling_factor"),
        *("norm_topk_prob", *grouped),
    )
    edit_json(directory / "config.json", **dict.fromkeys((*optional, "scoring_func", "topk_method", "head_dim")))
    converter = CONVERTERS[f"Deepseek{name}ForCausalLM"]
    short = HuggingFaceSource(directory, converter, "gpt-2").kvs
    full = AutoConfig.from_pretrained(directory).to_dict()
    edit_json(directory / "config.json", **{key: full[key] for key in optional})
    assert full["max_position_embeddings"] is not None
    assert HuggingFaceSource(directory, converter, "gpt-2").kvs == short
    # sigmoid is 2; V2 needs no word, softmax is what llama.cpp takes
    gating = short.get("deepseek2.expert_gating_func")
    assert (gating.value if gating else None) == (2 if name == "V3" else None)


@pytest.mark.runtime
@pytest.mark.parametrize(
    "config",
    [{"tie_word_embeddings": True}, {"first_k_dense_replace": 0}, {"q_lora_rank": None}],
    ids=["tied", "sparse", "one query matrix"],
)
@pytest.mark.parametrize(("name", "build"), [("V2", build_deepseek_v2), ("V3", build_deepseek_v3)])
def test_also_right_in_llama_cpp(tmp_path: Path, name: str, build: Any, config: dict[str, Any]) -> None:
    from mopeq_edge.binding import LlamaModel

    directory = build(tmp_path / "model", "float32", **config)
    source = HuggingFaceSource(directory, CONVERTERS[f"Deepseek{name}ForCausalLM"], "gpt-2")
    write_gguf(source, tmp_path / "model.gguf")
    tokens = list(range(7, 71))
    expected = logits(causal_model(directory), tokens)
    with LlamaModel(tmp_path / "model.gguf", n_threads=1, plain=True) as llama:
        got = llama.logits(tokens)
    assert np.abs(got - expected).max() < 1e-4 * expected.std()


def test_one_query_matrix_is_a_rank_of_zero(tmp_path: Path) -> None:
    """llama.cpp asks for the rank unless the number of layers is that of a model that has none."""
    for name, build, rank in (("few", build_deepseek_v2, 0), ("lite", build_deepseek_v2_lite, None)):
        options = {"q_lora_rank": None} if rank == 0 else {}
        directory = build(tmp_path / name, "bfloat16", **options)
        kvs = HuggingFaceSource(directory, CONVERTERS["DeepseekV2ForCausalLM"], "gpt-2").kvs
        found = kvs.get("deepseek2.attention.q_lora_rank")
        assert (None if found is None else found.value) == rank
