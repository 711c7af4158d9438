"""Rope settings: what llama.cpp computes of a GGUF against transformers, and what is refused."""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from converters import CONVERTERS, rope_settings
from converters.refused import REFUSED as UNCONVERTED
from converters.rope_settings import GRAPHS, check_rope
from mopeq_edge.errors import SourceError
from mopeq_edge.source.open import open_source

from ..builders import build_olmoe, edit_json, write_gguf
from .families import (
    build_deepseek_v2,
    build_granite_moe,
    build_mixtral,
    build_qwen2_moe,
    build_qwen3_moe,
    causal_model,
    logits,
)

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 1e4}
GROWTH = 1 + 0.1 * math.log(4.0)
ACCEPTED: Mapping[str, Mapping[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4},
    "yarn": YARN,
    "betas": {**YARN, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": True},
    "another beta, same ramp": {**YARN, "beta_fast": 16.0},
    "usual growth": {**YARN, "attention_factor": round(GROWTH, 6)},
    "one mscale": {**YARN, "mscale": 0.7},
    "longer": {**YARN, "original_max_position_embeddings": 200},
}
REFUSED: Mapping[str, tuple[Mapping[str, Any], str]] = {
    "betas": ({**YARN, "beta_fast": 8, "beta_slow": 2}, r"yarn with beta_fast 8, beta_slow 2, expected beta_fast 32"),
    "growth": ({**YARN, "attention_factor": 1.5}, r"attention_factor 1.5, expected none: .* by 1.1386, not 1.5000"),
    "mscales": ({**YARN, "mscale": 1.0, "mscale_all_dim": 0.5}, r"mscale 1.0 and mscale_all_dim 0.5, expected none"),
    "ramp": ({**YARN, "truncate": False}, r"yarn with truncate False, expected .* truncate True"),
}
BUILDERS: Mapping[str, Callable[[Path], Path]] = {
    "granitemoe": lambda directory: build_granite_moe(directory, "float32"),
    "llama": lambda directory: build_mixtral(directory, "float32"),
    "olmoe": lambda directory: build_olmoe(directory, dtype="float32", n_head=2),
    "qwen2moe": lambda directory: build_qwen2_moe(directory, "float32"),
    "qwen3moe": lambda directory: build_qwen3_moe(directory, "float32"),
}


def difference(directory: Path, gguf: Path, text: str) -> float:
    """Largest difference of llama.cpp's logits from transformers', over the spread of the latter."""
    from transformers import AutoTokenizer

    from mopeq_edge.binding import LlamaModel

    write_gguf(open_source(directory, CONVERTERS, pre="gpt-2"), gguf)
    tokens = AutoTokenizer.from_pretrained(directory).encode(text[:900])[:200]
    expected = logits(causal_model(directory), tokens)
    with LlamaModel(gguf, n_threads=1, plain=True) as llama:
        return float(np.abs(llama.logits(tokens) - expected).max() / expected.std())


@pytest.mark.runtime
@pytest.mark.parametrize("architecture", BUILDERS)
def test_what_llama_cpp_computes(
    tmp_path: Path, architecture: str, evaluation_text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is accepted is computed; what is refused would not be, which is seen with the check switched off."""
    directory = BUILDERS[architecture](tmp_path / "model")
    for name, rope in ACCEPTED.items():
        edit_json(directory / "config.json", rope_parameters=rope)
        assert difference(directory, tmp_path / "model.gguf", evaluation_text) < 1e-4, name
    for rope, message in REFUSED.values():
        edit_json(directory / "config.json", rope_parameters=rope)
        with pytest.raises(SourceError, match=message) as caught:
            open_source(directory, CONVERTERS, pre="gpt-2")
        assert "\n" not in str(caught.value)
        assert str(caught.value).startswith(str(directory))
    monkeypatch.setattr(rope_settings, "_SAME", math.inf)
    for name, (rope, _) in REFUSED.items():
        edit_json(directory / "config.json", rope_parameters=rope)
        assert difference(directory, tmp_path / "model.gguf", evaluation_text) > 1e-2, name


@pytest.mark.runtime
def test_what_llama_cpp_computes_for_deepseek(tmp_path: Path, evaluation_text: str) -> None:
    """Attention grows by ``mscale_all_dim``, queries and keys not."""
    directory = build_deepseek_v2(tmp_path / "model", "float32")
    equal = {**YARN, "mscale": 0.9, "mscale_all_dim": 0.9}
    for rope in (equal, {**equal, "attention_factor": 1.0}, {**equal, "beta_fast": 31.0}):
        edit_json(directory / "config.json", rope_parameters=rope)
        assert difference(directory, tmp_path / "model.gguf", evaluation_text) < 1e-4
    for wrong in ({"attention_factor": GROWTH}, {"mscale": 1.0}, {"beta_fast": 2.0}):
        edit_json(directory / "config.json", rope_parameters={**equal, **wrong})
        with pytest.raises(SourceError, match="no GGUF of this checkpoint would be right"):
            open_source(directory, CONVERTERS, pre="gpt-2")


def test_ends_against_transformers() -> None:
    """transformers does not say the ends: they are where its frequencies begin and cease to be those of no scaling."""
    import torch
    from transformers import MixtralConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    for fast, slow, original in ((32, 1, 4096), (8, 2, 4096), (16, 0.5, 512)):
        rope = {**YARN, "beta_fast": fast, "beta_slow": slow, "original_max_position_embeddings": original}
        config = MixtralConfig(hidden_size=128, num_attention_heads=1, head_dim=128, rope_parameters=rope)
        frequencies, _ = ROPE_INIT_FUNCTIONS["yarn"](config, torch.device("cpu"))
        plain = 1e4 ** -(torch.arange(0, 128, 2) / 128)
        scaled = (plain / frequencies).double()
        low, high = rope_settings._ends(128, 1e4, original, fast, slow, True)
        assert int((scaled < 1 + 1e-4).nonzero()[-1]) == low
        assert int((scaled > 4 - 1e-3).nonzero()[0]) == min(high, 63)


@pytest.mark.parametrize(
    ("architecture", "rope", "message"),
    [
        ("deepseek2-ocr", {"type": "linear", "factor": 2.0}, "rope type 'linear', expected .*default"),
        ("deepseek2", {"type": "linear", "factor": 2.0}, "rope type 'linear', expected default or yarn"),
        ("llama", {"rope_type": "llama3", "factor": 8.0}, "rope type 'llama3', expected default, linear or yarn"),
        ("llama", {"rope_type": "yarn", "factor": 8.0}, "of type 'yarn' without original_max_position_embeddings"),
        ("llama", {**YARN, "factor": "4"}, "has factor '4', expected a positive number"),
        ("llama", {**YARN, "beta_fast": -1}, "has beta_fast -1, expected a positive number"),
        ("llama", {**YARN, "rope_theta": 1}, "has rope_theta 1.0, expected more than 1"),
        ("llama", {**YARN, "attn_factor": 1.2}, "attn_factor 1.2, expected 1 or none"),
        ("llama", {**YARN, "extrapolation_factor": 0.5}, "extrapolation_factor 0.5, expected 1 or none"),
        ("llama", {"rope_type": "default", "partial_rotary_factor": 0.5}, "has partial_rotary_factor 0.5"),
        ("llama", [1], r"has rope settings '\[1\]', expected an object"),
    ],
)
def test_refused_by_name(architecture: str, rope: Any, message: str) -> None:
    config = {"hidden_size": 64, "num_attention_heads": 4, "qk_rope_head_dim": 16, "rope_parameters": rope}
    with pytest.raises(SourceError, match=message):
        check_rope(config, architecture, "X")


def test_rounded_ends_are_gpt_osss_own() -> None:
    config = {"head_dim": 64, "rope_parameters": {**YARN, "truncate": False, "beta_fast": 32.0, "beta_slow": 1.0}}
    check_rope(config, "gpt-oss", "gpt-oss")
    with pytest.raises(SourceError, match="computes X's ramp like that only"):
        check_rope(config, "llama", "X")
    with pytest.raises(SourceError, match="computes X's ramp like that only"):
        check_rope({**config, "rope_parameters": {**YARN, "beta_slow": 8}}, "gpt-oss", "X")


def test_a_row_for_every_architecture() -> None:
    from mopeq_edge.source.converter import Converter

    known = [found for name, found in CONVERTERS.items() if name not in UNCONVERTED]
    named = {found.architecture for found in known if isinstance(found, Converter)}
    assert named == set(GRAPHS)
