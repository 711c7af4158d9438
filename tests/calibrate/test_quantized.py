"""A quantized checkpoint is calibrated with the numbers that it holds: those of a float32 one of the same numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from converters import CONVERTERS
from mopeq_edge.calibrate.blocks import BlockModel
from mopeq_edge.calibrate.run import calibrate
from mopeq_edge.progress import SilentProgress
from mopeq_edge.source.huggingface import HuggingFaceSource
from mopeq_edge.source.open import open_source

from ..converters.families import build_gpt_oss, build_mxfp4_gpt_oss
from ..converters.fp8 import build_fp8_deepseek_v3, build_fp8_qwen3_moe


def opened(directory: Path) -> HuggingFaceSource:
    source = open_source(directory, CONVERTERS, pre="gpt-2")
    assert isinstance(source, HuggingFaceSource)
    return source


def in_float32(source: HuggingFaceSource, directory: Path) -> HuggingFaceSource:
    """The same model with nothing quantized, its experts as they are in a plain checkpoint."""
    directory.mkdir()
    for file in source.path.glob("*.json"):
        (directory / file.name).write_bytes(file.read_bytes())
    config = json.loads((directory / "config.json").read_text())
    del config["quantization_config"]
    (directory / "config.json").write_text(json.dumps(config))
    tensors: dict[str, torch.Tensor] = {}
    for name in source.checkpoint.names:
        value = torch.from_numpy(source.checkpoint.read_f32(name))
        turned = name.endswith("_blocks")
        tensors[name.removesuffix("_blocks")] = value.transpose(1, 2).contiguous() if turned else value
    save_file(tensors, directory / "model.safetensors")
    return opened(directory)


@pytest.mark.parametrize("build", [build_fp8_qwen3_moe, build_fp8_deepseek_v3, build_mxfp4_gpt_oss])
def test_the_same_statistics(build: Any, tmp_path: Path) -> None:
    quantized = opened(build(tmp_path / "quantized", "bfloat16"))
    windows = np.random.default_rng(0).integers(0, 4096, (2, 16)).astype(np.int32)
    found = [
        calibrate(source, windows, "text", fisher=True, seed=3, threads=1, scratch=tmp_path, progress=SilentProgress())
        for source in (quantized, in_float32(quantized, tmp_path / "plain"))
    ]
    for ours, plain in ((found[0].activation, found[1].activation), (found[0].gradient, found[1].gradient)):
        assert ours is not None
        assert plain is not None
        assert ours.entries.keys() == plain.entries.keys()
        for key, entry in ours.entries.items():
            np.testing.assert_array_equal(entry.sums, plain.entries[key].sums, err_msg=key)


def test_masks_of_a_window_longer_than_the_sliding_one(tmp_path: Path) -> None:
    """32 tokens, of which a token in the sliding layers sees 8: what transformers makes of the same configuration."""
    from transformers import AutoConfig
    from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

    model = BlockModel(opened(build_gpt_oss(tmp_path / "model", "bfloat16")))
    config = AutoConfig.from_pretrained(tmp_path / "model")
    config._attn_implementation = "eager"
    assert config.sliding_window == 8
    made = {"config": config, "inputs_embeds": torch.zeros(1, 32, 64), "attention_mask": None, "cache": None}
    expected = [create_sliding_window_causal_mask(**made), create_causal_mask(**made)]
    for layer in range(3):
        mask = model.positions(32, layer)["attention_mask"]
        torch.testing.assert_close(mask, expected[layer % 2], rtol=0, atol=0)
        assert int((mask[0, 0, 31] == 0).sum()) == (32 if layer == 1 else 8)
