"""Files that cannot be computed: one line that names the file and the tensor or the key."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from converters.onnx_reference import run_reference
from mopeq_edge.errors import FormatError, MopeqError, SourceError

from ...expert_groups.architectures import ARCHITECTURES, Architecture, Floats, random_tensors, write_model
from ...expert_groups.regroup import by_turns, regroup

Tensors = dict[str, Floats]
OLMOE, DEEPSEEK = ARCHITECTURES["olmoe"], ARCHITECTURES["deepseek2"]


def write(path: Path, own: Architecture, change: Callable[[Tensors], object] = lambda _: None) -> Path:
    tensors = random_tensors(own)
    change(tensors)
    write_model(path, own, tensors, lambda _, values: (values, gguf.GGMLQuantizationType.F32))
    return path


def fails(path: Path, *parts: str, tokens: Any = (1, 2), error: type[MopeqError] = MopeqError) -> None:
    with pytest.raises(error) as found:
        run_reference(path, tokens)
    message = str(found.value)
    assert "\n" not in message
    for part in (path.name, *parts):
        assert part in message


@pytest.mark.parametrize(
    ("own", "name"),
    [
        (OLMOE, "blk.1.attn_q.weight"),
        (OLMOE, "blk.0.ffn_up_exps.weight"),
        (OLMOE, "blk.1.ffn_gate_inp.weight"),
        (OLMOE, "output_norm.weight"),
        (OLMOE, "output.weight"),
        (OLMOE, "token_embd.weight"),
        (DEEPSEEK, "blk.0.ffn_gate.weight"),
        (DEEPSEEK, "blk.1.attn_k_b.weight"),
        (DEEPSEEK, "blk.1.ffn_down_shexp.weight"),
        (ARCHITECTURES["gpt-oss"], "blk.0.attn_sinks.weight"),
        (ARCHITECTURES["gpt-oss"], "blk.1.ffn_up_exps.bias"),
        (ARCHITECTURES["qwen2moe"], "blk.0.attn_k.bias"),
    ],
)
def test_a_tensor_is_missing(tmp_path: Path, own: Architecture, name: str) -> None:
    path = write(tmp_path / "bad.gguf", own, lambda tensors: tensors.pop(name))
    fails(path, f"'{name}'", "missing", error=FormatError)


@pytest.mark.parametrize(
    ("own", "name", "found", "expected"),
    [
        (OLMOE, "blk.1.attn_q.weight", (128, 256), "[256, 256]"),
        (OLMOE, "blk.0.ffn_up_exps.weight", (7, 256, 256), "[256, 256, 8]"),
        (OLMOE, "blk.0.attn_norm.weight", (255,), "[256]"),
        (DEEPSEEK, "blk.1.attn_v_b.weight", (4, 32, 64), "[64, 64, 4]"),
        (DEEPSEEK, "blk.1.exp_probs_b.bias", (9,), "[8]"),
    ],
)
def test_a_tensor_has_another_shape(
    tmp_path: Path, own: Architecture, name: str, found: tuple[int, ...], expected: str
) -> None:
    values = np.zeros(found, dtype=np.float32)
    path = write(tmp_path / "bad.gguf", own, lambda tensors: tensors.update({name: values}))
    fails(path, f"'{name}'", f"expected {expected}", str(list(found[::-1])), error=FormatError)


def test_a_group_has_another_shape(tmp_path: Path) -> None:
    name = "blk.1.ffn_down_exps.weight"
    values = np.zeros((8, 256, 512), dtype=np.float32)
    whole = write(tmp_path / "whole.gguf", OLMOE, lambda tensors: tensors.update({name: values}))
    fails(regroup([whole], tmp_path / "groups.gguf", by_turns(2)), f"'{name}'", "[512, 256, 8]", "[256, 256, 8]")


def test_groups_without_their_map(tmp_path: Path) -> None:
    whole = write(tmp_path / "whole.gguf", OLMOE)
    lost = "blk.1.ffn_down_exps.map"
    path = regroup([whole], tmp_path / "groups.gguf", by_turns(2), change=lambda tensors: tensors.pop(lost))
    fails(path, f"'{lost}'", error=FormatError)


@pytest.mark.parametrize("name", ["blk.0.attn_q.bias", "blk.1.ffn_gate_exps.scale", "rope_freqs.weight", "v.patch"])
def test_a_tensor_that_would_be_left_out(tmp_path: Path, name: str) -> None:
    values = np.ones(8, dtype=np.float32)
    path = write(tmp_path / "more.gguf", OLMOE, lambda tensors: tensors.update({name: values}))
    fails(path, f"'{name}'", "olmoe", error=SourceError)


def test_layers_that_predict_further_tokens_are_left_out(tmp_path: Path) -> None:
    """As in files of llama.cpp's converter: a block more, counted and then taken off."""
    plain = write(tmp_path / "plain.gguf", DEEPSEEK)
    more = replace(DEEPSEEK, keys={**DEEPSEEK.keys, "block_count": 3, "nextn_predict_layers": 1})
    extra = {"blk.2.nextn.enorm.weight": np.ones(256, np.float32), "blk.2.attn_norm.weight": np.ones(256, np.float32)}
    path = write(tmp_path / "more.gguf", more, lambda tensors: tensors.update(extra))
    assert np.array_equal(run_reference(path, [1, 2]).logits, run_reference(plain, [1, 2]).logits)


@pytest.mark.parametrize(
    ("own", "keys", "parts"),
    [
        (OLMOE, {"rope.scaling.type": "longrope"}, ["rope.scaling.type", "longrope", "yarn"]),
        (OLMOE, {"expert_count": 0}, ["no experts"]),
        (OLMOE, {"expert_used_count": 9}, ["expert_used_count", "8"]),
        (OLMOE, {"attention.head_count_kv": 3}, ["head_count_kv", "divisor"]),
        (OLMOE, {"attention.head_count": [4, 2]}, ["head_count", "layer to layer"]),
        (OLMOE, {"rope.dimension_count": 32}, ["rope.dimension_count", "64"]),
        (OLMOE, {"block_count": "two"}, ["block_count", "whole number"]),
        (DEEPSEEK, {"expert_gating_func": 4}, ["expert_gating_func", "sigmoid"]),
        (DEEPSEEK, {"expert_group_count": 3}, ["expert_group_count", "8 experts"]),
        (DEEPSEEK, {"attention.temperature_scale": 0.1}, ["temperature"]),
        (DEEPSEEK, {"attention.key_length_mla": 32}, ["key_length_mla"]),
    ],
)
def test_key_values_that_cannot_be(tmp_path: Path, own: Architecture, keys: dict[str, Any], parts: list[str]) -> None:
    fails(write(tmp_path / "bad.gguf", replace(own, keys={**own.keys, **keys})), *parts)


def test_a_key_is_missing(tmp_path: Path) -> None:
    keys = {key: value for key, value in DEEPSEEK.keys.items() if key != "attention.kv_lora_rank"}
    fails(write(tmp_path / "bad.gguf", replace(DEEPSEEK, keys=keys)), "'deepseek2.attention.kv_lora_rank'")


def test_an_unknown_architecture(tmp_path: Path) -> None:
    fails(write(tmp_path / "bad.gguf", replace(OLMOE, name="phimoe")), "'phimoe'", "olmoe", "gpt-oss")


def test_a_type_that_gguf_cannot_read(tmp_path: Path) -> None:
    """Q1_0: 18 bytes for 128 weights; no converter has it, llama.cpp does."""
    path = tmp_path / "bad.gguf"
    name = "blk.0.ffn_up_exps.weight"
    tensors = random_tensors(OLMOE)
    raw = np.zeros((8, 256, 36), dtype=np.uint8)
    write_model(
        path,
        OLMOE,
        tensors,
        lambda key, values: (
            (raw, gguf.GGMLQuantizationType.Q1_0) if key == name else (values, gguf.GGMLQuantizationType.F32)
        ),
    )
    fails(path, f"'{name}'", "Q1_0", error=SourceError)


def test_weights_that_are_no_numbers(tmp_path: Path) -> None:
    def spoil(tensors: Tensors) -> None:
        tensors["blk.1.attn_v.weight"][0, 0] = np.nan

    fails(write(tmp_path / "bad.gguf", OLMOE, spoil), "layer 1", "finite", error=FormatError)


def test_tokens_that_are_not_there(tmp_path: Path) -> None:
    path = write(tmp_path / "model.gguf", OLMOE)
    fails(path, "384", "found 400", tokens=[1, 400], error=SourceError)
    fails(path, "384", "found -1", tokens=[-1], error=SourceError)
    with pytest.raises(ValueError, match="one row of token ids"):
        run_reference(path, [])
    with pytest.raises(ValueError, match="one row of token ids"):
        run_reference(path, [0.5])


def test_no_file(tmp_path: Path) -> None:
    fails(tmp_path / "nothing.gguf", "cannot be read", error=FormatError)
