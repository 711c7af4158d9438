"""Narrowed experts against the model with the same neurons silenced, in transformers."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mopeq_edge.errors import SourceError
from tools.narrow_experts import narrow

from ..builders import build_olmoe
from ..converters.families import causal_model, logits


def test_what_is_left_out_is_silent(tmp_path: Path) -> None:
    model = build_olmoe(tmp_path / "model", dtype="float32", ff=32)
    whole = causal_model(model).requires_grad_(False)
    narrowed = causal_model(narrow(model, tmp_path / "narrow", 20))
    silent = 0
    for layer in whole.model.layers:
        experts = layer.mlp.experts
        for expert in range(len(experts.down_proj)):
            gate, up = experts.gate_up_proj[expert].double().chunk(2)
            down = experts.down_proj[expert].double()
            weight = [float(gate[n].norm() * up[n].norm() * down[:, n].norm()) for n in range(32)]
            for neuron in sorted(range(32), key=lambda n: weight[n])[:12]:
                experts.down_proj.data[expert, :, neuron] = 0
                silent += 1
    assert silent == 2 * 8 * 12
    tokens = list(range(5, 45))
    found, expected = logits(narrowed, tokens), logits(whole, tokens)
    assert expected.std() > 0.1
    assert abs(found - expected).max() < 1e-5
    shapes = {
        tuple(t.shape) for name, t in load_file(tmp_path / "narrow/model.safetensors").items() if "experts" in name
    }
    assert shapes == {(20, 64), (64, 20)}
    assert torch.equal(*(load_file(d / "model.safetensors")["lm_head.weight"] for d in (model, tmp_path / "narrow")))


def test_a_width_that_is_larger(tmp_path: Path) -> None:
    model = build_olmoe(tmp_path / "model", ff=32)
    with pytest.raises(SourceError, match="experts are 32 wide; give a width up to that, not 33"):
        narrow(model, tmp_path / "narrow", 33)
    assert not (tmp_path / "narrow").exists()
