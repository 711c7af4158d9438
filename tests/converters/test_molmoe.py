"""MolmoE: the GGUF of the OLMoE that it is, from fused and further rows, other names and torch's own files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from converters import CONVERTERS
from converters.molmoe import MOLMOE as CONVERTER
from converters.molmoe import choose, recipes
from mopeq_edge.errors import SourceError
from mopeq_edge.source.checkpoint import TORCH_INDEX, Checkpoint
from mopeq_edge.source.converter import Part
from mopeq_edge.source.open import open_source
from tools.vision_language_configs import MOLMOE, config_of

from ..builders import edit_json
from .test_deepseek_vl2 import contents
from .vision_language import build, renamed

BLOCK = "model.transformer.blocks.1."


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(MOLMOE, tmp_path_factory.mktemp("molmoe") / "model", "float32")


@pytest.fixture(scope="module")
def opened(directory: Path) -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
    return json.loads((directory / "config.json").read_text()), Checkpoint(directory).shapes


def test_the_same_as_the_olmoe_that_it_is(directory: Path, tmp_path: Path) -> None:
    """Whose GGUF llama.cpp's script confirms, to the byte."""
    ours = open_source(directory, CONVERTERS, pre="gpt-2")
    known = open_source(renamed(directory, tmp_path / directory.name), CONVERTERS, pre="gpt-2")
    assert ours.architecture == known.architecture == "olmoe"
    assert contents(ours) == contents(known)
    assert ours.kvs == known.kvs


def test_torchs_own_files(directory: Path, tmp_path: Path) -> None:
    """As released; in shards that one layer is spread over."""
    other = build(MOLMOE, tmp_path / directory.name, "float32", torch=True, shard_bytes=400_000)
    assert (other / TORCH_INDEX).is_file()
    assert len(Checkpoint(other).files) > 5
    theirs, ours = (open_source(path, CONVERTERS, pre="gpt-2") for path in (directory, other))
    assert contents(ours) == contents(theirs)
    assert ours.kvs == theirs.kvs


def test_q_k_and_v_are_rows_of_one_tensor(opened: Any) -> None:
    found = {recipe.name: recipe for recipe in recipes(*opened)}
    for at, which in enumerate("qkv"):
        assert found[f"blk.1.attn_{which}.weight"].parts == (
            Part(f"{BLOCK}att_proj.weight", rows=(64 * at, 64 * (at + 1))),
        )
        assert found[f"blk.1.attn_{which}.weight"].shape == (64, 64)
    config, shapes = opened
    with pytest.raises(
        SourceError, match=r"att_proj.weight' has shape \[96, 64\], but config.json asks for \[192, 64\]"
    ):
        recipes(config, {**shapes, f"{BLOCK}att_proj.weight": (96, 64)})


def test_rows_and_tokens_of_pictures_are_left_out(directory: Path) -> None:
    source = open_source(directory, CONVERTERS, pre="gpt-2")
    assert source.warnings == (
        f"{directory}: 8 rows of 'model.transformer.wte.new_embedding' are left out, with their tokens: they stand for "
        "pictures, and llama.cpp counts as many tokens as the output has rows",
        f"{directory}: 177 tensors that see pictures are left out (model.vision_backbone.*); "
        "the GGUF holds the text side",
    )
    tokens = source.kvs["tokenizer.ggml.tokens"].value
    assert len(tokens) == 4104
    assert not any("im_start" in token for token in tokens)
    assert "<im_start>" in (directory / "tokenizer.json").read_text()


def test_tokens_behind_the_further_rows(directory: Path, tmp_path: Path) -> None:
    copied = shutil.copytree(directory, tmp_path / "model")
    edit_json(copied / "config.json", additional_vocab_size=4)
    with pytest.raises(
        SourceError, match=r"has a token 4108, but config.json has vocab_size 4104 and 4 further; use the"
    ):
        open_source(copied, CONVERTERS, pre="gpt-2")


def test_the_width_of_an_expert_is_half_of_what_is_said(opened: Any) -> None:
    """Gate and up together, as the released code counts."""
    config, shapes = opened
    expected = recipes(config, shapes)
    assert recipes({**config, "mlp_hidden_size": 64, "mlp_ratio": 7}, shapes) == expected
    (source,) = {recipe.shape for recipe in expected if recipe.name == "blk.0.ffn_up_exps.weight"}
    assert source == (64, 32, 8)


@pytest.mark.parametrize(
    ("name", "whose"),
    [
        (f"{BLOCK}mlp.experts.5.up_proj.weight", " (layer 1, expert 5)"),
        (f"{BLOCK}att_proj.weight", ""),
        ("model.transformer.blocks.0.q_norm.weight", ""),
        ("model.transformer.wte.embedding", ""),
        ("model.transformer.ff_out.weight", ""),
    ],
)
def test_missing_tensors(name: str, whose: str, opened: Any) -> None:
    config, shapes = opened
    without = {key: shape for key, shape in shapes.items() if key != name}
    assert len(without) == len(shapes) - 1
    with pytest.raises(SourceError) as caught:
        recipes(config, without)
    assert str(caught.value) == f"tensor '{name}'{whose} is missing; download the whole checkpoint again"


@pytest.mark.parametrize(
    "name", [f"{BLOCK}att_proj.bias", "model.transformer.blocks.2.mlp.gate.weight", "lm_head.weight"]
)
def test_unknown_tensors(name: str, opened: Any) -> None:
    config, shapes = opened
    with pytest.raises(SourceError, match=f"tensor '{name}' is not known in a MolmoE of 2 layers"):
        recipes(config, {**shapes, name: (8, 8)})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        # the released code turns neighbouring pairs where nothing is said
        *(("rope_impl", "cockatoo"), ("rope_impl", None), ("rope", False), ("attention_layer_norm", False)),
        *(("weight_tying", True), ("clip_qkv", 8.0), ("n_kv_heads", 2), ("norm_after", True), ("alibi", True)),
        *(("layer_norm_type", "default"), ("activation_type", "gelu"), ("moe_shared_expert", True), ("d_model", None)),
        *(("moe_num_experts", "8"), ("n_layers", 0), ("max_sequence_length", None), ("mlp_hidden_size", -1)),
        *(("n_layers", 10**12), ("moe_num_experts", 10**12)),
    ],
)
def test_settings_that_cannot_be(key: str, value: object, opened: Any) -> None:
    config, shapes = opened
    with pytest.raises(SourceError) as caught:
        recipes({**config, key: value}, shapes)
    assert str(caught.value).startswith(f"config.json has {key} {value if isinstance(value, int) else repr(value)}")
    assert "expected" in str(caught.value)


def test_dense_models_of_the_same_name() -> None:
    assert choose(config_of(MOLMOE)) is CONVERTER
    for changes in ({"model_type": "hf_olmo"}, {"moe_num_experts": 0}, {"moe_num_experts": None}):
        with pytest.raises(SourceError, match=r"an OLMoForCausalLM with model_type .*, expected 'molmo' and some: .*"):
            choose({**config_of(MOLMOE), **changes})


def test_a_dense_model_is_refused_with_its_directory(directory: Path, tmp_path: Path) -> None:
    copied = shutil.copytree(directory, tmp_path / "model")
    edit_json(copied / "config.json", model_type="hf_olmo")
    with pytest.raises(SourceError, match=f"^{copied}: an OLMoForCausalLM with model_type 'hf_olmo'"):
        open_source(copied, CONVERTERS, pre="gpt-2")
