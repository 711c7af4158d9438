"""Checkpoints that come quantized, against torch's and transformers' own numbers; everything else refused by name."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from mopeq_edge.errors import FormatError, MopeqError, SourceError
from mopeq_edge.ggml.library import f32_to_bf16, mxfp4_to_f32
from mopeq_edge.ggml.types import BF16, F32, MXFP4
from mopeq_edge.source.checkpoint import SINGLE, Checkpoint
from mopeq_edge.source.converter import Converter, Part, Recipe
from mopeq_edge.source.huggingface import HuggingFaceSource
from mopeq_edge.source.quantized import E4M3

from ..builders import bf16, write_safetensors

FP8_CONFIG = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
MXFP4_CONFIG = {"quantization_config": {"quant_method": "mxfp4"}}
NAME = "blk.0.ffn_up_exps.weight"


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(256, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def source_of(directory: Path, config: Mapping[str, Any], shape: tuple[int, ...], *parts: Part) -> HuggingFaceSource:
    (directory / "config.json").write_text(json.dumps(config))
    recipe = Recipe(NAME, shape, parts)
    return HuggingFaceSource(directory, Converter("x", lambda *_: [recipe], lambda *_: {}))


@pytest.fixture
def mxfp4(tmp_path: Path) -> tuple[Path, torch.Tensor]:
    """Three experts [4, 64] with scales of every size that float32 holds; what transformers makes of them."""
    blocks, scales = drawn(3, 4, 2, 16), drawn(3, 4, 2, seed=1) % 250
    save_file({"w_blocks": blocks, "w_scales": scales, "w_bias": torch.ones(3, 4)}, tmp_path / SINGLE)
    return tmp_path, convert_moe_packed_tensors(blocks, scales, dtype=torch.float32).transpose(1, 2)


def test_mxfp4_is_ggml_s_own_type(mxfp4: tuple[Path, torch.Tensor]) -> None:
    directory, expected = mxfp4
    source = source_of(directory, MXFP4_CONFIG, (64, 4, 3), *(Part("w_blocks", e) for e in range(3)))
    assert source.checkpoint.shapes == {"w_bias": (3, 4), "w_blocks": (3, 4, 64)}
    (tensor,) = source.tensors
    assert tensor.type is MXFP4
    assert source.is_exact(tensor)
    for e in range(3):
        assert np.array_equal(source.read(tensor, e), expected[e].numpy())
        assert np.array_equal(source.read(tensor, e, slice(1, 3)), expected[e, 1:3].numpy())
        assert source.read(tensor, e, slice(2, 2)).shape == (0, 64)
        stored = source.read_stored(tensor, e)
        # ggml-py's own numbers, and the same bits back
        decoded = gguf.quants.dequantize(stored, gguf.GGMLQuantizationType.MXFP4)
        assert np.array_equal(decoded, expected[e].numpy())
    assert np.array_equal(source.checkpoint.read_f32("w_blocks"), expected.numpy())


def test_one_block_by_hand(tmp_path: Path) -> None:
    """Codes 0 to 15 twice, in the checkpoint's order and in ggml's; a scale of 2^1."""
    codes = [*range(16), *range(16)]
    ours = bytes(low | high << 4 for low, high in zip(codes[::2], codes[1::2], strict=True))
    write_safetensors(
        tmp_path / SINGLE, {"w_blocks": ("U8", (1, 1, 1, 16), ours), "w_scales": ("U8", (1, 1, 1), b"\x80")}
    )
    source = source_of(tmp_path, MXFP4_CONFIG, (32, 1, 1), Part("w_blocks", 0))
    assert source.read_stored(source.tensors[0]).tobytes() == b"\x80" + bytes(17 * code for code in range(16))
    positive = [0, 1, 2, 3, 4, 6, 8, 12]
    assert source.read(source.tensors[0]).tolist() == [[*positive, *(-x for x in positive)] * 2]


def test_every_other_row_of_mxfp4(mxfp4: tuple[Path, torch.Tensor]) -> None:
    directory, expected = mxfp4
    parts = tuple(Part("w_blocks", e, (1, 4), every=2) for e in range(3))
    source = source_of(directory, MXFP4_CONFIG, (64, 2, 3), *parts)
    assert np.array_equal(source.read(source.tensors[0], 2), expected[2, 1::2].numpy())
    assert np.array_equal(source.read(source.tensors[0], 2, slice(1, 2)), expected[2, 3:].numpy())


def test_a_scale_that_is_no_number(tmp_path: Path) -> None:
    save_file(
        {"w_blocks": drawn(1, 1, 1, 16), "w_scales": torch.full((1, 1, 1), 255).to(torch.uint8)}, tmp_path / SINGLE
    )
    source = source_of(tmp_path, MXFP4_CONFIG, (32, 1, 1), Part("w_blocks", 0))
    for read in (source.read, source.read_stored):
        with pytest.raises(SourceError, match=r"'blk.0.ffn_up_exps.weight', expert 0: 32 of 32 weights are NaN"):
            read(source.tensors[0])


@pytest.mark.runtime
def test_mxfp4_in_libggml() -> None:
    """Every scale and code: the same bits as libggml's float32, but for the scales that it takes beyond 2^127."""
    from mopeq_edge.ggml.library import load_ggml

    blocks = np.empty((253, 17), dtype=np.uint8)
    blocks[:, 0] = np.arange(253)
    blocks[:, 1:] = np.arange(16) * 16 + np.arange(16)[::-1]
    assert mxfp4_to_f32(blocks).tobytes() == load_ggml().dequantize(MXFP4, blocks, 32).tobytes()


def test_e4m3() -> None:
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().numpy()
    assert np.array_equal(E4M3, every, equal_nan=True)


def test_rounding_to_bf16() -> None:
    """Ties, denormals and both signs, as torch rounds."""
    bits = np.random.default_rng(0).integers(0, 2**32, 20000, dtype=np.uint32)
    values = np.concatenate([bits, bits & 0xFFFF8000]).view(np.float32)
    values = values[np.isfinite(values)]
    expected = torch.from_numpy(values).to(torch.bfloat16).view(torch.uint16).numpy()
    assert np.array_equal(f32_to_bf16(values), expected)


def blockwise(weight: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """One weight after the other."""
    expected = torch.empty(weight.shape)
    for i in range(weight.shape[-2]):
        for j in range(weight.shape[-1]):
            expected[..., i, j] = weight[..., i, j].float() * scales[..., i // 128, j // 128].float()
    return expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fp8_with_partial_blocks(tmp_path: Path, dtype: torch.dtype) -> None:
    weight = (drawn(130, 140) % 120).view(torch.float8_e4m3fn)
    scales = torch.rand(2, 2, generator=torch.Generator().manual_seed(0)).to(dtype)
    save_file({"w": weight, "w_scale_inv": scales, "norm": torch.ones(3)}, tmp_path / SINGLE)
    expected = blockwise(weight, scales)
    source = source_of(tmp_path, FP8_CONFIG, (140, 130), Part("w"))
    assert source.checkpoint.names == ("norm", "w")
    (tensor,) = source.tensors
    assert tensor.type is BF16
    assert not source.is_exact(tensor)
    assert np.array_equal(source.read(tensor), expected.numpy())
    assert np.array_equal(source.read(tensor, 0, slice(125, 129)), expected[125:129].numpy())
    assert source.read(tensor, 0, slice(3, 3)).shape == (0, 140)
    rounded = expected.to(torch.bfloat16).view(torch.uint8).numpy()
    assert np.array_equal(source.read_stored(tensor), rounded)
    assert np.array_equal(source.checkpoint.read_f32("w"), expected.numpy())


def test_packed_experts_in_fp8(tmp_path: Path) -> None:
    """Blocks do not reach from one expert into the next; columns of a packed tensor, as rows."""
    weight = (drawn(2, 130, 129) % 120).view(torch.float8_e4m3fn)
    scales = torch.rand(2, 2, 2, generator=torch.Generator().manual_seed(0))
    save_file({"w": weight, "w_scale_inv": scales}, tmp_path / SINGLE)
    expected = blockwise(weight, scales)
    source = source_of(tmp_path, FP8_CONFIG, (129, 130, 2), Part("w", 0), Part("w", 1))
    for e in range(2):
        assert np.array_equal(source.read(source.tensors[0], e, slice(127, 130)), expected[e, 127:].numpy())
    turned = source_of(tmp_path, FP8_CONFIG, (130, 129, 2), *(Part("w", e, transposed=True) for e in range(2)))
    assert np.array_equal(turned.read(turned.tensors[0], 1, slice(1, 4)), expected[1, :, 1:4].T.numpy())


def test_a_product_beyond_bf16(tmp_path: Path) -> None:
    weight = torch.full((1, 32), 448.0).to(torch.float8_e4m3fn)
    save_file({"w": weight, "w_scale_inv": torch.tensor([[3.4e38]])}, tmp_path / SINGLE)
    source = source_of(tmp_path, FP8_CONFIG, (32, 1), Part("w"))
    with pytest.raises(SourceError, match="32 of 32 weights are NaN or infinite"):
        source.read(source.tensors[0])
    # finite in float32, but nearer to BF16's infinity than to its largest number
    save_file({"w": weight, "w_scale_inv": torch.tensor([[3.402e38 / 448]])}, tmp_path / SINGLE)
    source = source_of(tmp_path, FP8_CONFIG, (32, 1), Part("w"))
    assert np.isfinite(source.read(source.tensors[0])).all()
    with pytest.raises(SourceError, match="32 of 32 weights are NaN or infinite"):
        source.read_stored(source.tensors[0])


def test_what_config_does_not_name_is_not_quantized(tmp_path: Path) -> None:
    """Scales beside a plain tensor, or codes without quantization_config, are what they are."""
    write_safetensors(tmp_path / SINGLE, {"w": ("BF16", (1, 2), bf16([1, 2])), "w_scales": ("F32", (1,), bytes(4))})
    for config in ({}, FP8_CONFIG, MXFP4_CONFIG, {"quantization_config": None}):
        assert Checkpoint(tmp_path, config).names == ("w", "w_scales")
    save_file({"w": drawn(2, 2).view(torch.float8_e4m3fn), "w_scale_inv": torch.ones(1, 1)}, tmp_path / SINGLE)
    with pytest.raises(FormatError, match="tensor 'w' has type F8_E4M3, expected BF16, F16, F32, F64"):
        source_of(tmp_path, {}, (2, 2), Part("w"))


def broken(tmp_path: Path, config: Mapping[str, Any], **tensors: torch.Tensor) -> str:
    save_file(tensors, tmp_path / SINGLE)
    with pytest.raises(FormatError) as caught:
        Checkpoint(tmp_path, config)
    return str(caught.value).removeprefix(f"{tmp_path}: ")


def test_scales_that_are_missing_or_of_another_shape(tmp_path: Path) -> None:
    weight = drawn(130, 128).view(torch.float8_e4m3fn)
    assert broken(tmp_path, FP8_CONFIG, w=weight) == (
        "tensor 'w' needs its scales 'w_scale_inv', which are missing; download it again"
    )
    assert broken(tmp_path, FP8_CONFIG, w=weight, w_scale_inv=torch.ones(1, 1)) == (
        "tensor 'w_scale_inv' is F32 of shape [1, 1], expected BF16 or F16 or F32 or F64 of shape [2, 1] for the "
        "blocks of 'w'; use the config.json of these weights"
    )
    assert "is U8 of shape [2, 1], expected BF16" in broken(tmp_path, FP8_CONFIG, w=weight, w_scale_inv=drawn(2, 1))
    assert "is F8_E4M3 of shape [8], expected a matrix" in broken(
        tmp_path, FP8_CONFIG, w=weight.reshape(-1)[:8].clone()
    )
    blocks = drawn(2, 3, 1, 16)
    assert broken(tmp_path, MXFP4_CONFIG, w_blocks=blocks) == (
        "tensor 'w_blocks' needs its scales 'w_scales', which are missing; download it again"
    )
    assert broken(tmp_path, MXFP4_CONFIG, w_blocks=blocks, w_scales=drawn(2, 3, 2)) == (
        "tensor 'w_scales' is U8 of shape [2, 3, 2], expected U8 of shape [2, 3, 1] for the blocks of 'w_blocks'; "
        "use the config.json of these weights"
    )
    assert broken(tmp_path, MXFP4_CONFIG, w_blocks=drawn(2, 3, 1, 8), w_scales=drawn(2, 3, 1)) == (
        "tensor 'w_blocks' is U8 of shape [2, 3, 1, 8], expected U8 of shape [..., blocks, 16] as config.json says "
        "mxfp4; use the config.json of these weights"
    )


SCHEMES: Mapping[str, Mapping[str, Any]] = {
    "compressed-tensors pack-quantized, 4 bit": {
        **{"quant_method": "compressed-tensors", "format": "pack-quantized"},
        "config_groups": {"group_0": {"weights": {"num_bits": 4, "type": "int", "strategy": "group"}}},
    },
    "compressed-tensors float-quantized": {"quant_method": "compressed-tensors", "format": "float-quantized"},
    "awq, 4 bit": {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm"},
    "gptq, 8 bit": {"quant_method": "gptq", "bits": 8, "desc_act": True},
    "bitsandbytes nf4, 4 bit": {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "bitsandbytes, 8 bit": {"load_in_8bit": True, "bnb_4bit_quant_type": "fp4"},
    "fp8 without weight_block_size": {"quant_method": "fp8", "activation_scheme": "static"},
    "modelopt": {"quant_method": "modelopt", "quant_algo": "NVFP4"},
    "no quant_method": {},
}


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("found", SCHEMES)
def test_other_schemes_are_refused_by_name(tmp_path: Path, found: str, nested: bool) -> None:
    """Before any tensor is looked at, in one line."""
    settings = {"quantization_config": SCHEMES[found]}
    save_file({"other": torch.ones(1)}, tmp_path / SINGLE)
    with pytest.raises(SourceError) as caught:
        source_of(tmp_path, {"text_config": settings} if nested else settings, (2, 2), Part("w"))
    assert str(caught.value) == (
        f"{tmp_path}: expected weights that are not quantized, or quantized as mxfp4 or as fp8 with weight_block_size, "
        f"found {found} in config.json; give the checkpoint that this one was made from"
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"quant_method": "fp8", "weight_block_size": [128]}, r"has weight_block_size \[128\], expected two numbers"),
        ({"quant_method": "fp8", "weight_block_size": [0, 1]}, r"has weight_block_size \[0, 1\], expected two numbers"),
        ("fp8", "has quantization_config 'fp8', expected an object or nothing"),
    ],
)
def test_broken_settings(tmp_path: Path, settings: object, message: str) -> None:
    save_file({"w": torch.ones(1, 2)}, tmp_path / SINGLE)
    with pytest.raises(MopeqError, match=message):
        Checkpoint(tmp_path, {"quantization_config": settings})


def test_a_stack_of_two_kinds_is_f32(tmp_path: Path) -> None:
    save_file(
        {"a_blocks": drawn(1, 2, 1, 16), "a_scales": drawn(1, 2, 1) % 200, "b": torch.ones(2, 32)}, tmp_path / SINGLE
    )
    source = source_of(tmp_path, MXFP4_CONFIG, (32, 2, 2), Part("a_blocks", 0), Part("b"))
    assert source.tensors[0].type is F32
    assert source.read_stored(source.tensors[0], 0).tobytes() == source.read(source.tensors[0], 0).tobytes()
