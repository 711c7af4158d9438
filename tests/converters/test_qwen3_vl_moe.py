"""Qwen3-VL-MoE: what its own layout and its nested settings bring; the rest is tested with the other families."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from converters import CONVERTERS
from converters.qwen3_vl_moe import key_values, recipes
from mopeq_edge.errors import SourceError
from mopeq_edge.source.converter import Part
from mopeq_edge.source.open import open_source

from ..builders import edit_json
from .families import FAMILIES

LAYER = "model.language_model.layers.0."
TEXT: dict[str, Any] = {
    **{"hidden_size": 8, "moe_intermediate_size": 4, "num_experts": 2, "vocab_size": 16, "num_hidden_layers": 1},
    **{"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4},
}
SHAPES: dict[str, tuple[int, ...]] = {
    "lm_head.weight": (16, 8),
    "model.language_model.embed_tokens.weight": (16, 8),
    f"{LAYER}input_layernorm.weight": (8,),
    f"{LAYER}mlp.experts.down_proj": (2, 4, 8),
    f"{LAYER}mlp.experts.gate_up_proj": (2, 8, 8),
    f"{LAYER}mlp.gate.weight": (2, 8),
    f"{LAYER}post_attention_layernorm.weight": (8,),
    f"{LAYER}self_attn.k_norm.weight": (4,),
    f"{LAYER}self_attn.k_proj.weight": (4, 8),
    f"{LAYER}self_attn.o_proj.weight": (8, 8),
    f"{LAYER}self_attn.q_norm.weight": (4,),
    f"{LAYER}self_attn.q_proj.weight": (8, 8),
    f"{LAYER}self_attn.v_proj.weight": (4, 8),
    "model.language_model.norm.weight": (8,),
    "model.visual.blocks.0.attn.qkv.weight": (24, 8),
}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return FAMILIES["qwen3-vl-moe"][0](tmp_path_factory.mktemp("vl") / "model", "bfloat16")


def test_experts_are_transposed_whatever_their_shape() -> None:
    """Here gate_up is square: only the family tells which axis is which."""
    found = {recipe.name: recipe for recipe in recipes({"text_config": TEXT}, SHAPES)}
    assert found["blk.0.ffn_up_exps.weight"].shape == (8, 4, 2)
    up = tuple(Part(f"{LAYER}mlp.experts.gate_up_proj", e, (4, 8), transposed=True) for e in range(2))
    down = tuple(Part(f"{LAYER}mlp.experts.down_proj", e, transposed=True) for e in range(2))
    assert found["blk.0.ffn_up_exps.weight"].parts == up
    assert found["blk.0.ffn_down_exps.weight"].parts == down
    assert not any("visual" in part.tensor for recipe in found.values() for part in recipe.parts)
    other = {**SHAPES, f"{LAYER}mlp.experts.down_proj": (2, 8, 4)}
    with pytest.raises(SourceError, match=r"down_proj' has shape \[2, 8, 4\], but config.json asks for \[2, 4, 8\]"):
        recipes({"text_config": TEXT}, other)


def test_tied_as_the_whole_model_says() -> None:
    """The text settings say tied by default, and are not asked."""
    shapes = {name: shape for name, shape in SHAPES.items() if name != "lm_head.weight"}
    with pytest.raises(SourceError, match=r"tensor 'lm_head.weight' \(the output .* is missing"):
        recipes({"text_config": {**TEXT, "tie_word_embeddings": True}}, shapes)
    assert len(recipes({"text_config": TEXT, "tie_word_embeddings": True}, shapes)) == len(shapes)


def test_settings_as_released(directory: Path, tmp_path: Path) -> None:
    """Older names: rope_theta beside rope_scaling, num_experts."""
    expected = open_source(directory, CONVERTERS, pre="gpt-2").kvs
    copied = shutil.copytree(directory, tmp_path / directory.name)
    edit_json(copied / "config.json", text_config=old(directory))
    assert open_source(copied, CONVERTERS, pre="gpt-2").kvs == expected
    assert expected["qwen3vlmoe.n_deepstack_layers"].value == 2
    assert expected["qwen3vlmoe.rope.dimension_sections"].value == [6, 5, 5, 0]


def old(directory: Path) -> dict[str, Any]:
    """The text settings in the released checkpoints' words."""
    text = json.loads((directory / "config.json").read_text())["text_config"]
    rope, n_expert = text.pop("rope_parameters"), text.pop("num_local_experts")
    return {
        **text,
        "num_experts": n_expert,
        "rope_theta": rope["rope_theta"],
        "rope_scaling": {"mrope_interleaved": True, "mrope_section": rope["mrope_section"], "rope_type": "default"},
    }


def test_settings_that_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"config.json has no text_config; use the config.json of these weights"):
        recipes({}, SHAPES)
    config = {"text_config": TEXT, "vision_config": {"deepstack_visual_indexes": 3}}
    with pytest.raises(SourceError, match=r"config.json has deepstack_visual_indexes 3, expected a list of layers"):
        key_values(tmp_path, config, [], 32, "gpt-2")
