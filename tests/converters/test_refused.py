"""Refused families: the reason is measured against llama.cpp, so that the day it is gone a test says so."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from converters import CONVERTERS
from mopeq_edge.errors import SourceError
from mopeq_edge.runtime.locate import require_runtime
from mopeq_edge.source.open import open_source

from ..builders import edit_json
from .families import VOCAB, logits, save
from .test_against_llama_cpp import SCRIPT


class RmsNormWithBias(nn.Module):
    def __init__(self, norm: nn.LayerNorm) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        scaled = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.norm.eps)
        return scaled * self.norm.weight + self.norm.bias


def softmax_of_the_chosen(scores: Tensor, jitter_eps: float, training: bool, top_k: int = 2) -> tuple[Tensor, Tensor]:
    chosen = scores.topk(top_k)
    return torch.softmax(chosen.values, -1), chosen.indices


@pytest.fixture
def phimoe(tmp_path: Path) -> Path:
    """Biases everywhere, the plain rope, files as released."""
    from transformers import PhimoeConfig, PhimoeForCausalLM

    config = PhimoeConfig(
        **{"vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 2},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 8, "num_experts_per_tok": 2},
        **{"max_position_embeddings": 256, "attention_bias": True, "lm_head_bias": True},
        **{"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0, "original_max_position_embeddings": 256},
    )
    directory = save(PhimoeForCausalLM(config), tmp_path / "model", "float32")
    edit_json(directory / "config.json", architectures=["PhiMoEForCausalLM"])
    edit_json(directory / "tokenizer_config.json", tokenizer_class="GPT2Tokenizer")
    return directory


@pytest.mark.parametrize("name", ["PhiMoEForCausalLM", "PhimoeForCausalLM"])
def test_refused_by_name(phimoe: Path, name: str) -> None:
    edit_json(phimoe / "config.json", architectures=[name])
    with pytest.raises(SourceError, match=rf"^{phimoe}: PhiMoE has layer norms, .*; choose a model of another family"):
        open_source(phimoe, CONVERTERS, pre="gpt-2")


@pytest.mark.runtime
def test_phimoe_is_another_model_in_llama_cpp(phimoe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its GGUF by llama.cpp's own script: far from the model, and equal to it with the norms and router exchanged."""
    from transformers import PhimoeForCausalLM
    from transformers.models.phimoe import modeling_phimoe

    from mopeq_edge.binding import LlamaModel

    gguf = tmp_path / "model.gguf"
    jobs = json.dumps([(str(phimoe), "f32", str(gguf))])
    command = [sys.executable, "-c", SCRIPT, str(require_runtime().convert), jobs]
    subprocess.run(command, check=True, capture_output=True)
    tokens = np.random.default_rng(0).integers(0, 4096, 64).tolist()
    with LlamaModel(gguf, n_threads=1, plain=True) as llama:
        got = llama.logits(tokens)

    model: Any = PhimoeForCausalLM.from_pretrained(phimoe, dtype=torch.float32, experts_implementation="eager").eval()
    expected = logits(model, tokens)
    assert np.abs(got - expected).max() > 0.5 * expected.std()
    for layer in model.model.layers:
        layer.input_layernorm = RmsNormWithBias(layer.input_layernorm)
        layer.post_attention_layernorm = RmsNormWithBias(layer.post_attention_layernorm)
    model.model.norm = RmsNormWithBias(model.model.norm)
    monkeypatch.setattr(modeling_phimoe, "sparsemixer", softmax_of_the_chosen)
    assert np.abs(got - logits(model, tokens)).max() < 1e-4 * expected.std()
