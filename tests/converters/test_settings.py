"""What each family refuses, what it calls what is missing, and what it assumes where config.json says nothing."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from converters import CONVERTERS
from mopeq_edge.errors import SourceError
from mopeq_edge.source.checkpoint import Checkpoint
from mopeq_edge.source.converter import Converter
from mopeq_edge.source.open import open_source

from ..builders import edit_json
from .families import FAMILIES

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Case:
    """One family: tensors to take away and what the error says of them, settings that no GGUF can hold, settings that
    transformers assumes.
    """

    missing: Mapping[str, str]
    unsupported: tuple[tuple[str, object], ...]
    assumed: tuple[str, ...]


NOT_TIED = " (the output matrix: config.json does not have tie_word_embeddings true)"
COMMON = ("max_position_embeddings", "rms_norm_eps", "rope_parameters", "hidden_act")
CASES = {
    "gpt-oss": Case(
        {
            "model.layers.1.mlp.experts.gate_up_proj": " (layer 1, all experts)",
            "model.layers.0.mlp.experts.down_proj_bias": " (layer 0, all experts)",
            "model.layers.2.self_attn.sinks": "",
            "model.layers.0.mlp.router.bias": "",
            "lm_head.weight": NOT_TIED,
        },
        (
            *(("hidden_act", "gelu"), ("attention_bias", False)),
            *(("swiglu_limit", 10.0), ("swiglu_alpha", 1.0), ("layer_types", ["full_attention"] * 3)),
            *(("head_dim", 0), ("num_local_experts", "8")),
        ),
        (*COMMON, "sliding_window", "layer_types", "attention_bias", "swiglu_limit", "swiglu_alpha"),
    ),
    "gpt-oss-mxfp4": Case(
        {
            "model.layers.1.mlp.experts.gate_up_proj_bias": " (layer 1, all experts)",
            "model.layers.2.self_attn.sinks": "",
        },
        (("hidden_act", "gelu"), ("layer_types", ["full_attention", "sliding_attention", "full_attention"])),
        (*COMMON, "sliding_window", "layer_types"),
    ),
    "granite-moe": Case(
        {
            "model.layers.1.block_sparse_moe.input_linear.weight": " (layer 1, all experts)",
            "model.layers.0.block_sparse_moe.output_linear.weight": " (layer 0, all experts)",
            "model.layers.0.block_sparse_moe.router.layer.weight": "",
            "lm_head.weight": NOT_TIED,
        },
        (
            *(("hidden_act", "gelu"), ("attention_bias", True), ("head_dim", 32), ("deepstack_layer_map", [[0, 1]])),
            *(("residual_multiplier", 0), ("logits_scaling", -1.0), ("embedding_multiplier", "12")),
            ("attention_multiplier", float("inf")),
        ),
        (*COMMON, "attention_bias", "residual_multiplier", "logits_scaling", "embedding_multiplier"),
    ),
    "qwen2-moe": Case(
        {
            "model.layers.1.mlp.experts.7.down_proj.weight": " (layer 1, expert 7)",
            "model.layers.0.mlp.shared_expert_gate.weight": "",
            "model.layers.0.self_attn.k_proj.bias": "",
            "lm_head.weight": NOT_TIED,
        },
        (
            *(("norm_topk_prob", True), ("mlp_only_layers", [0]), ("decoder_sparse_step", 2), ("qkv_bias", False)),
            *(("use_sliding_window", True), ("hidden_act", "gelu"), ("head_dim", 32)),
            ("layer_types", ["full_attention", "sliding_attention"]),
        ),
        (*COMMON, "qkv_bias", "norm_topk_prob", "layer_types", "use_sliding_window", "mlp_only_layers"),
    ),
    "qwen3-moe": Case(
        {
            "model.layers.1.mlp.experts.5.up_proj.weight": " (layer 1, expert 5)",
            "model.layers.0.self_attn.k_norm.weight": "",
            "lm_head.weight": NOT_TIED,
        },
        (
            *(("norm_topk_prob", False), ("mlp_only_layers", [0]), ("decoder_sparse_step", 2)),
            *(("attention_bias", True), ("use_sliding_window", True), ("hidden_act", "gelu"), ("head_dim", 0)),
        ),
        (*COMMON, "attention_bias", "use_sliding_window", "mlp_only_layers", "decoder_sparse_step"),
    ),
    "qwen3-vl-moe": Case(
        {
            "model.language_model.layers.1.mlp.experts.gate_up_proj": " (layer 1, all experts)",
            "model.language_model.layers.0.mlp.gate.weight": "",
            "lm_head.weight": NOT_TIED,
        },
        (
            *(("mlp_only_layers", [0]), ("decoder_sparse_step", 2), ("attention_bias", True), ("hidden_act", "gelu")),
            ("head_dim", 0),
        ),
        (*COMMON, "attention_bias", "mlp_only_layers", "decoder_sparse_step"),
    ),
}


@pytest.fixture(scope="module", params=CASES)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Case, Path]:
    directory: Path = tmp_path_factory.mktemp("family") / "model"
    return CASES[request.param], FAMILIES[request.param][0](directory, "bfloat16")


def opened(directory: Path) -> tuple[Converter, dict[str, Any], Shapes]:
    config = json.loads((directory / "config.json").read_text())
    return CONVERTERS[config["architectures"][0]], config, dict(Checkpoint(directory, config).shapes)


def changed(config: dict[str, Any], key: str, value: object) -> dict[str, Any]:
    """``config`` with another value where it has ``key``, in the text's settings or outside."""
    if "text_config" in config:
        return {**config, "text_config": {**config["text_config"], key: value}}
    return {**config, key: value}


def test_missing_tensors(family: tuple[Case, Path]) -> None:
    case, directory = family
    converter, config, shapes = opened(directory)
    for name, whose in case.missing.items():
        without = {key: shape for key, shape in shapes.items() if key != name}
        assert len(without) == len(shapes) - 1
        with pytest.raises(SourceError) as caught:
            converter.recipes(config, without)
        assert str(caught.value) == f"tensor '{name}'{whose} is missing; download the whole checkpoint again"


def test_unknown_tensors(family: tuple[Case, Path]) -> None:
    converter, config, shapes = opened(family[1])
    with pytest.raises(SourceError, match=r"tensor 'model.layers.0.other.weight' is not known in an? .* of . layers"):
        converter.recipes(config, {**shapes, "model.layers.0.other.weight": (2, 2)})


def test_what_llama_cpp_computes_in_another_way(family: tuple[Case, Path]) -> None:
    case, directory = family
    converter, config, shapes = opened(directory)
    for key, value in case.unsupported:
        with pytest.raises(SourceError) as caught:
            converter.recipes(changed(config, key, value), shapes)
        assert str(caught.value).startswith(f"config.json has {key} {value!r}, expected ")


def test_settings_that_do_not_fit_the_tensors(family: tuple[Case, Path], tmp_path: Path) -> None:
    _, directory = family
    converter, config, shapes = opened(directory)
    for key in ("num_hidden_layers", "vocab_size"):
        with pytest.raises(SourceError, match=f"config.json has {key} 'many', expected a positive number"):
            converter.recipes(changed(config, key, "many"), shapes)
    with pytest.raises(SourceError, match=r"config.json has num_hidden_layers 1000000000000, expected no more"):
        converter.recipes(changed(config, "num_hidden_layers", 10**12), shapes)


def test_defaults_are_those_of_transformers(family: tuple[Case, Path], tmp_path: Path) -> None:
    """A config.json that leaves them out gives the key-values of one that says what transformers assumes."""
    from transformers import AutoConfig

    case, directory = family
    for file in directory.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    _, config, _ = opened(directory)
    for key in case.assumed:
        assert key in config.get("text_config", config)
    short = {key: value for key, value in config.get("text_config", config).items() if key not in case.assumed}
    changes = {"text_config": short} if "text_config" in config else dict.fromkeys(case.assumed)
    edit_json(tmp_path / "config.json", **changes)
    without = open_source(tmp_path, CONVERTERS, pre="gpt-2").kvs
    full = AutoConfig.from_pretrained(tmp_path).to_dict()
    (tmp_path / "config.json").write_text(json.dumps(full))
    said = open_source(tmp_path, CONVERTERS, pre="gpt-2").kvs
    assert without == said
    assert without != open_source(directory, CONVERTERS, pre="gpt-2").kvs
