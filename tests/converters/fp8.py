"""Tiny checkpoints in FP8 with block scales, as DeepSeek-V3 and Qwen3 are released."""

from __future__ import annotations

import json
from pathlib import Path

from .families import build_deepseek_v3, build_qwen3_moe


def build_fp8_qwen3_moe(directory: Path, dtype: str = "bfloat16") -> Path:
    """Matrices with whole blocks and partial ones."""
    return in_fp8(build_qwen3_moe(directory, dtype, hidden_size=160, moe_intermediate_size=96, head_dim=64))


def build_fp8_deepseek_v3(directory: Path, dtype: str = "bfloat16") -> Path:
    """A block may end within a head's rows of the latent attention, which become matrices of their own."""
    return in_fp8(build_deepseek_v3(directory, dtype, num_attention_heads=8, num_key_value_heads=8))


def in_fp8(directory: Path) -> Path:
    """The blocks' matrices in FP8 with a scale for 128 x 128 weights, as released; all else stays as it is."""
    import torch
    from safetensors.torch import load_file, save_file

    files = load_file(directory / "model.safetensors")
    own = [name for name in files if ".layers." in name and "_proj" in name and files[name].dim() == 2]
    for name in own:
        weight = files[name].float()
        blocks = torch.nn.functional.pad(weight, (0, -weight.shape[1] % 128, 0, -weight.shape[0] % 128))
        blocks = blocks.unflatten(1, (-1, 128)).unflatten(0, (-1, 128))
        scales = blocks.abs().amax(dim=(1, 3)).clamp(min=1e-6) / 448
        every = scales.repeat_interleave(128, 0).repeat_interleave(128, 1)[: weight.shape[0], : weight.shape[1]]
        files[name] = (weight / every).to(torch.float8_e4m3fn)
        files[f"{name}_scale_inv"] = scales
    assert any(max(files[f"{name}_scale_inv"].shape) > 1 for name in own)
    save_file(files, directory / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"] = {
        **{"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]},
        "modules_to_not_convert": ["lm_head"],
    }
    (directory / "config.json").write_text(json.dumps(config))
    return directory
