"""A tiny DeepSeek-V2 the whole way: its stacks of a matrix a head are no experts, and rows of 32 take few types."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader

from converters import CONVERTERS
from mopeq_edge import convert as convert_module
from mopeq_edge.binding import LlamaModel
from mopeq_edge.ggml.types import BY_NAME
from mopeq_edge.imatrix import read_imatrix
from mopeq_edge.runtime.tools import run_tool
from mopeq_edge.sensitivity.scores import NEEDS_TRACES, SCORES
from mopeq_edge.sensitivity.table import read_table
from mopeq_edge.source.open import open_source

from .builders import write_gguf
from .commands import run_json
from .converters.families import build_deepseek_v2

pytestmark = pytest.mark.runtime

N_HEAD, N_KEY, N_VALUE, N_LATENT = 4, 32, 64, 256
WIDE = {
    **{"hidden_size": 256, "moe_intermediate_size": 256, "intermediate_size": 256, "num_hidden_layers": 2},
    **{
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "v_head_dim": N_VALUE,
        "q_lora_rank": 256,
        "kv_lora_rank": N_LATENT,
    },
}


@pytest.mark.parametrize(("layout", "types"), [("stock", "IQ4_NL,Q4_K,Q6_K,Q8_0"), ("per-expert", "default")])
def test_convert(
    tmp_path: Path, calibration_text: str, monkeypatch: pytest.MonkeyPatch, layout: str, types: str
) -> None:
    monkeypatch.setattr(convert_module, "HELD_OUT_CHUNKS", 2)
    model, out, work = build_deepseek_v2(tmp_path / "model", "bfloat16", **WIDE), tmp_path / "o.gguf", tmp_path / "work"
    text = tmp_path / "text.txt"
    text.write_text(calibration_text[:20_000], encoding="utf-8")
    options = ["--text", text, "--chunks", 4, "--window", 64, "--threads", 2, "--pre", "gpt-2", "--sample-rows", 8]
    budget = ["--target-bpw", 5, "--types", types, "--layout", layout, "--work-dir", work, "--json"]
    result = run_json("convert", model, out, *budget, *options, "--no-report")

    planned = {t["name"]: t for t in json.loads((work / "plan.json").read_text())["tensors"]}
    for layer in range(2):
        keys, values = (planned[f"blk.{layer}.attn_{which}_b.weight"] for which in "kv")
        assert (keys["shape"], values["shape"]) == ([N_KEY, N_LATENT, N_HEAD], [N_LATENT, N_VALUE, N_HEAD])
        # blocks of 256 do not fit rows of 32
        assert keys["type"] in ("IQ4_NL", "Q8_0", "BF16")
        assert keys["nbytes"] == BY_NAME[keys["type"]].nbytes(N_KEY * N_LATENT * N_HEAD)
    assert any(t["type"].endswith(("_K", "XS", "XXS", "_S")) for t in planned.values())

    for which, n_in in (("k", N_KEY), ("v", N_LATENT)):
        name = f"blk.1.attn_{which}_b.weight"
        for kind in ("imatrix", "gradient"):
            entry = read_imatrix(work / f"{kind}.gguf").entries[name]
            assert entry.sums.shape == (N_HEAD, n_in)
            assert (entry.counts == 4 * 64).all()
        errors = read_table(work / "sensitivity-gradient.safetensors").errors[name]
        assert set(errors.damage) == set(SCORES) - NEEDS_TRACES
        for score, damage in errors.damage.items():
            assert damage.shape == (len(errors.types), N_HEAD), score
            assert (damage[:-1] > 0).all(), score
            assert (damage[-1] == 0).all(), score
    with LlamaModel(out, n_threads=1) as llama:
        assert np.isfinite(llama.logits([5, 6, 7, 8])).all()
    if layout == "stock":
        list_of_types, other = tmp_path / "types.txt", tmp_path / "other.gguf"
        run_json("plan", model, *budget, "--pre", "gpt-2", "--tensor-type-file", list_of_types)
        imatrix = work / {"gradient": "gradient.gguf", "activation": "imatrix.gguf"}[result["imatrix"]["chosen"]]
        options = ["--imatrix", imatrix, "--tensor-type-file", list_of_types]
        run_tool("llama-quantize", [*options, work / "source.gguf", other, "Q4_K_M", "2"])
        same_tensors(out, other)


def same_tensors(out: Path, other: Path) -> None:
    """llama-quantize reads our imatrix of the heads' matrices as we do."""
    ours, theirs = ({t.name: t for t in GGUFReader(path).tensors} for path in (out, other))
    for name, tensor in ours.items():
        assert tensor.tensor_type == theirs[name].tensor_type, name
        np.testing.assert_array_equal(tensor.data, theirs[name].data, err_msg=name)


def test_the_imatrix_of_llama_imatrix(tmp_path: Path, calibration_text: str) -> None:
    """It has the heads of a stack in one row: of a GGUF, and given by the user."""
    model, text = build_deepseek_v2(tmp_path / "model", "float32"), tmp_path / "text.txt"
    text.write_text(calibration_text[:4000], encoding="utf-8")
    gguf, theirs = tmp_path / "f32.gguf", tmp_path / "theirs.gguf"
    write_gguf(open_source(model, CONVERTERS, pre="gpt-2"), gguf)
    run_tool("llama-imatrix", ["-m", gguf, "-f", text, "-o", theirs, "-c", "64", "--chunks", "2", "--no-ppl"])
    run_json("calibrate", gguf, "--text", text, "--chunks", 2, "--window", 64, "--work-dir", tmp_path / "a", "--json")
    run_json("calibrate", model, "--imatrix", theirs, "--work-dir", tmp_path / "b", "--pre", "gpt-2", "--json")
    name = "blk.1.attn_k_b.weight"
    whole = read_imatrix(theirs).entries[name].sums.reshape(-1)
    for work in ("a", "b"):
        entry = read_imatrix(tmp_path / work / "imatrix.gguf").entries[name]
        assert entry.sums.shape == (N_HEAD, N_KEY)
        assert entry.counts.tolist() == [128] * N_HEAD
        np.testing.assert_allclose(entry.sums.reshape(-1), whole, rtol=1e-6)
