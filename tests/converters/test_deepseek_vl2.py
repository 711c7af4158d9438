"""DeepSeek-VL2: which text model a config.json means, and that its GGUF is the one of that model's own checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from converters import CONVERTERS
from converters.deepseek_vl2 import CORRECTED, GREEDY, PLAIN, choose
from mopeq_edge.errors import SourceError
from mopeq_edge.source.checkpoint import Checkpoint
from mopeq_edge.source.model import Source
from mopeq_edge.source.open import open_source
from tools.vision_language_configs import BASE, SMALL, TINY, config_of

from ..builders import edit_json
from .vision_language import build, renamed

SIZES = (TINY, SMALL, BASE)


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("vl2")
    return {name: build(name, folder / name, "bfloat16") for name in SIZES}


def contents(source: Source) -> dict[str, tuple[Any, ...]]:
    """Shape, type and bytes of every tensor."""
    return {
        tensor.name: (
            *(tensor.shape, tensor.type.name),
            b"".join(source.read_stored(tensor, matrix).tobytes() for matrix in range(tensor.n_matrices)),
        )
        for tensor in source.tensors
    }


def compared(kvs: Any) -> dict[str, Any]:
    """Without DeepSeek-OCR's chat template."""
    return {key: kv for key, kv in kvs.items() if key != "tokenizer.chat_template"}


@pytest.mark.parametrize("name", SIZES)
def test_the_same_as_the_text_model_alone(name: str, directories: dict[str, Path], tmp_path: Path) -> None:
    """Names and settings of DeepSeek-OCR, DeepSeek-V2 and DeepSeek-V3, whose GGUFs llama.cpp's script confirms."""
    ours = open_source(directories[name], CONVERTERS, pre="gpt-2")
    known = open_source(renamed(directories[name], tmp_path / name), CONVERTERS, pre="gpt-2")
    assert ours.architecture == known.architecture == {TINY: "deepseek2-ocr"}.get(name, "deepseek2")
    assert contents(ours) == contents(known)
    assert compared(ours.kvs) == compared(known.kvs)
    assert "tokenizer.chat_template" not in ours.kvs


def test_the_text_model_follows_from_the_settings() -> None:
    """Released settings: no architectures, and of the text's those alone that DeepSeek's class does not assume."""
    assert [choose(config_of(name)) for name in SIZES] == [PLAIN, GREEDY, CORRECTED]
    for name in SIZES:
        assert "architectures" not in config_of(name)
    assert "vocab_size" not in config_of(SMALL)["language_config"]
    assert "num_hidden_layers" not in config_of(BASE)["language_config"]


@pytest.mark.parametrize("named", [False, True])
def test_with_and_without_a_name(named: bool, directories: dict[str, Path], tmp_path: Path) -> None:
    expected = open_source(directories[TINY], CONVERTERS, pre="gpt-2")
    copied = copy(directories[TINY], tmp_path / TINY)
    edit_json(copied / "config.json", architectures=["DeepseekVLV2ForCausalLM"] if named else [])
    found = open_source(copied, CONVERTERS, pre="gpt-2")
    assert found.kvs == expected.kvs
    edit_json(copied / "config.json", architectures=None, model_type="deepseek_vl_v3")
    with pytest.raises(SourceError, match="names no architecture"):
        open_source(copied, CONVERTERS, pre="gpt-2")


def copy(directory: Path, into: Path) -> Path:
    into.mkdir()
    for path in directory.iterdir():
        (into / path.name).write_bytes(path.read_bytes())
    return into


RELEASED = {
    TINY: {"block_count": 12, "rope.dimension_count": 128, "attention.head_count_kv": 10, "vocab_size": 129280},
    SMALL: {
        **{"block_count": 27, "vocab_size": 102400, "attention.key_length_mla": 192, "attention.kv_lora_rank": 512},
        **{"attention.value_length_mla": 128, "attention.q_lora_rank": None, "expert_weights_norm": None},
        "expert_gating_func": 1,
    },
    BASE: {
        **{"block_count": 30, "attention.head_count": 32, "attention.q_lora_rank": 0, "expert_gating_func": 2},
        **{"expert_weights_norm": True, "expert_weights_scale": 2.0, "expert_count": 72, "expert_used_count": 6},
    },
}


@pytest.mark.parametrize("name", SIZES)
def test_key_values_of_the_released_settings(name: str, tmp_path: Path, directories: dict[str, Path]) -> None:
    """The released config.json, a tokenizer; the weights are not looked at."""
    directory = copy(directories[name], tmp_path / "model")
    config = config_of(name)
    (directory / "config.json").write_text(json.dumps(config))
    kvs = choose(config).key_values(directory, config, [], 32, "gpt-2")
    prefix = {TINY: "deepseek2-ocr"}.get(name, "deepseek2")
    for key, value in RELEASED[name].items():
        found = kvs.get(f"{prefix}.{key}")
        assert (None if found is None else found.value) == value, key


def test_what_is_left_out_is_counted(directories: dict[str, Path]) -> None:
    expected = "48 tensors that see pictures are left out (image_newline 1, projector 4, view_seperator 1, vision 42)"
    for name in SIZES:
        (warning,) = open_source(directories[name], CONVERTERS, pre="gpt-2").warnings
        assert warning == f"{directories[name]}: {expected}; the GGUF holds the text side"


MISSING = {
    TINY: {"language.model.layers.1.self_attn.k_proj.weight": ""},
    SMALL: {"language.model.layers.26.self_attn.kv_b_proj.weight": "", "language.model.norm.weight": ""},
    BASE: {"language.model.layers.1.mlp.gate.e_score_correction_bias": ""},
}


@pytest.mark.parametrize("name", SIZES)
def test_missing_and_unknown_tensors(name: str, directories: dict[str, Path]) -> None:
    config = json.loads((directories[name] / "config.json").read_text())
    shapes = Checkpoint(directories[name]).shapes
    common = {
        "language.model.layers.2.mlp.experts.5.up_proj.weight": " (layer 2, expert 5)",
        "language.model.layers.0.mlp.down_proj.weight": "",
        "language.lm_head.weight": " (the output matrix: config.json does not have tie_word_embeddings true)",
    }
    for tensor, whose in {**common, **MISSING[name]}.items():
        without = {key: shape for key, shape in shapes.items() if key != tensor}
        assert len(without) == len(shapes) - 1
        with pytest.raises(SourceError) as caught:
            choose(config).recipes(config, without)
        assert str(caught.value) == f"tensor '{tensor}'{whose} is missing; download the whole checkpoint again"
    for tensor in ("model.layers.0.self_attn.q_proj.weight", "language.other.weight", "visions.weight"):
        with pytest.raises(SourceError, match=f"tensor '{tensor}' is not known in a DeepSeek of"):
            choose(config).recipes(config, {**shapes, tensor: (2, 2)})


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        *((TINY, "rope_theta", 5e5), (TINY, "rope_scaling", {"type": "linear", "factor": 2.0})),
        *((TINY, "scoring_func", "sigmoid"), (TINY, "num_key_value_heads", 2)),
        *((SMALL, "topk_method", "group_limited_greedy"), (SMALL, "norm_topk_prob", True)),
        *((SMALL, "scoring_func", "sigmoid"), (SMALL, "q_lora_rank", 1536), (SMALL, "hidden_size", "64")),
        *((BASE, "scoring_func", "softmax"), (BASE, "moe_layer_freq", 2), (BASE, "n_routed_experts", None)),
    ],
)
def test_what_llama_cpp_cannot_compute(name: str, key: str, value: object, directories: dict[str, Path]) -> None:
    config = json.loads((directories[name] / "config.json").read_text())
    config["language_config"][key] = value
    with pytest.raises(SourceError) as caught:
        choose(config).recipes(config, Checkpoint(directories[name]).shapes)
    assert str(caught.value).startswith(f"config.json has {key} {value!r}")
    assert "expected" in str(caught.value)


@pytest.mark.parametrize("found", [None, "text", []])
def test_no_text_settings(found: object, directories: dict[str, Path], tmp_path: Path) -> None:
    copied = copy(directories[TINY], tmp_path / TINY)
    edit_json(copied / "config.json", language_config=found)
    with pytest.raises(SourceError, match=f"^{copied}: config.json has no language_config; use the config.json of"):
        open_source(copied, CONVERTERS, pre="gpt-2")


def test_rank_zero_is_the_only_difference_of_more_layers(directories: dict[str, Path]) -> None:
    """Base has one matrix for the query, which llama.cpp otherwise takes for granted in 26 or 27 layers only."""
    source = open_source(directories[BASE], CONVERTERS, pre="gpt-2")
    assert source.kvs["deepseek2.attention.q_lora_rank"].value == 0
    names = {tensor.name for tensor in source.tensors}
    assert "blk.0.attn_q.weight" in names
    assert not any("attn_q_a" in name for name in names)
    bias = next(tensor for tensor in source.tensors if tensor.name == "blk.1.exp_probs_b.bias")
    assert np.abs(source.read(bias)).max() > 0.1
