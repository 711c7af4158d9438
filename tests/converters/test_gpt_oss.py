"""What is gpt-oss's own: two forms of its experts, and the bits of MXFP4 in a finished file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from converters import CONVERTERS
from converters.gpt_oss import GPT_OSS
from mopeq_edge.emit import emit
from mopeq_edge.errors import SourceError
from mopeq_edge.ggml.library import load_ggml
from mopeq_edge.ggml.types import BY_NAME, F32, MXFP4
from mopeq_edge.gguf_file import read_header
from mopeq_edge.plan.candidates import candidates, parse_types
from mopeq_edge.progress import SilentProgress
from mopeq_edge.source.checkpoint import Checkpoint
from mopeq_edge.source.converter import Part
from mopeq_edge.source.open import open_source

from .families import build_gpt_oss, build_mxfp4_gpt_oss

EXPERTS = "model.layers.1.mlp.experts."


@pytest.fixture(scope="module")
def mxfp4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_mxfp4_gpt_oss(tmp_path_factory.mktemp("gpt-oss") / "model", "bfloat16")


def test_where_gate_and_up_are(mxfp4: Path, tmp_path: Path) -> None:
    config = json.loads((mxfp4 / "config.json").read_text())
    found = {r.name: r for r in GPT_OSS.recipes(config, Checkpoint(mxfp4, config).shapes)}
    up, bias = found["blk.1.ffn_up_exps.weight"], found["blk.1.ffn_up_exps.bias"]
    assert up.shape == (64, 96, 8)
    assert up.parts[5] == Part(f"{EXPERTS}gate_up_proj_blocks", 5, (1, 192), every=2)
    assert (bias.shape, bias.keep_f32) == ((96, 8), True)
    assert bias.parts == (Part(f"{EXPERTS}gate_up_proj_bias", columns=(1, 192), every=2),)
    plain = build_gpt_oss(tmp_path / "plain", "bfloat16")
    found = {r.name: r for r in GPT_OSS.recipes(config, Checkpoint(plain).shapes)}
    gate, down = found["blk.1.ffn_gate_exps.weight"], found["blk.1.ffn_down_exps.weight"]
    assert gate.parts[5] == Part(f"{EXPERTS}gate_up_proj", 5, (0, 192), transposed=True, every=2)
    assert (down.shape, down.parts[0]) == ((96, 64, 8), Part(f"{EXPERTS}down_proj", 0, (0, 64), transposed=True))


def test_values(tmp_path: Path) -> None:
    directory = build_gpt_oss(tmp_path / "model", "bfloat16")
    source = open_source(directory, CONVERTERS, pre="gpt-2")
    tensors = {tensor.name: tensor for tensor in source.tensors}
    files = {name: value.float() for name, value in load_file(directory / "model.safetensors").items()}
    gate_up, bias = files[f"{EXPERTS}gate_up_proj"], files[f"{EXPERTS}gate_up_proj_bias"]
    for first, which in enumerate(("gate", "up")):
        got = source.read(tensors[f"blk.1.ffn_{which}_exps.weight"], 3, slice(10, 20))
        assert got.tolist() == gate_up[3, :, first::2].T[10:20].tolist()
        assert source.read(tensors[f"blk.1.ffn_{which}_exps.bias"]).tolist() == bias[:, first::2].tolist()
    assert source.read(tensors["blk.1.ffn_down_exps.weight"], 3).tolist() == files[f"{EXPERTS}down_proj"][3].T.tolist()
    sinks = tensors["blk.2.attn_sinks.weight"]
    assert (sinks.type, sinks.shape, sinks.quantizable) == (F32, (4,), False)
    assert source.read(sinks)[0].tolist() == files["model.layers.2.self_attn.sinks"].tolist()


def test_one_form_or_the_other(mxfp4: Path) -> None:
    config = json.loads((mxfp4 / "config.json").read_text())
    shapes = dict(Checkpoint(mxfp4, config).shapes)
    with pytest.raises(SourceError, match=r"gate_up_proj' is not known in a gpt-oss of 3 layers"):
        GPT_OSS.recipes(config, {**shapes, f"{EXPERTS}gate_up_proj": (8, 64, 192)})
    del shapes[f"{EXPERTS}down_proj_blocks"]
    with pytest.raises(SourceError, match=r"down_proj' \(layer 1, all experts\) is missing"):
        GPT_OSS.recipes(config, shapes)


@pytest.mark.runtime
def test_mxfp4_passes_through_a_plan(mxfp4: Path, tmp_path: Path) -> None:
    """Its own type is the planner's last candidate and costs nothing; the bits in the file are the checkpoint's."""
    source = open_source(mxfp4, CONVERTERS, pre="gpt-2")
    gate = next(tensor for tensor in source.tensors if tensor.name == "blk.0.ffn_gate_exps.weight")
    names = [kind.name for kind in candidates(gate, parse_types("all"), has_imatrix=True)]
    assert names == ["Q2_0", "MXFP4"]
    types = {tensor.name: tensor.type for tensor in source.tensors}
    types |= {"output.weight": BY_NAME["Q8_0"], "blk.0.ffn_up_exps.weight": BY_NAME["Q4_0"]}
    out = tmp_path / "out.gguf"
    emit(source, types, source.kvs, None, load_ggml(), out, threads=1, progress=SilentProgress())
    header = read_header(out)
    info = next(info for info in header.tensors if info.name == gate.name)
    assert info.type is MXFP4
    start, raw = header.data_start + info.offset, out.read_bytes()
    prefix = "model.layers.0.mlp.experts.gate_up_proj"
    files = load_file(mxfp4 / "model.safetensors")
    blocks, scales = files[f"{prefix}_blocks"][:, ::2], files[f"{prefix}_scales"][:, ::2]
    low, high = blocks & 15, blocks >> 4
    codes = torch.stack([low, high], dim=-1).flatten(-2)
    expected = torch.cat([scales[..., None], codes[..., :16] + 16 * codes[..., 16:]], dim=-1).numpy().tobytes()
    assert raw[start : start + len(expected)] == expected
