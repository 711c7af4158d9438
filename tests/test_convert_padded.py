"""Experts as narrow as DeepSeek-VL2-Tiny's the whole way: 2 bit for down matrices, less bytes than llama-quantize."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader
from gguf.quants import dequantize

from converters import CONVERTERS
from mopeq_edge.binding import LlamaModel
from mopeq_edge.gguf_file import read_header
from mopeq_edge.imatrix import read_imatrix
from mopeq_edge.runtime.tools import run_tool
from mopeq_edge.source.open import open_source

from .builders import write_gguf
from .commands import run_json
from .converters.families import add_tokenizer, spread

pytestmark = pytest.mark.runtime

WIDTH, PADDED, HIDDEN, N_EXPERT, N_LAYER = 896, 1024, 256, 6, 2


TWO_BIT = {"IQ2_XXS", "Q2_K"}
COMMON = ["--pre", "gpt-2", "--threads", 2, "--json"]
TYPES = ["--types", "IQ2_XXS,Q2_K,Q3_K,IQ4_NL,Q4_K"]
FLOORS = [
    o for role in ("embedding", "output", "attention", "dense_ffn", "shared_expert") for o in ("--floor", f"{role}=2")
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import torch

    from tools.tiny_models import DEEPSEEK, Shape, make_model, save

    directory = tmp_path_factory.mktemp("model")
    shape = Shape(DEEPSEEK, layers=N_LAYER, experts=N_EXPERT, used=2, hidden=HIDDEN, ff=WIDTH, shared=2, window=64)
    made = make_model(shape)
    spread(made)
    save(made, shape, directory, torch.bfloat16)
    return add_tokenizer(directory)


@pytest.fixture(scope="module")
def work(model: Path, tmp_path_factory: pytest.TempPathFactory, calibration_text: str) -> Path:
    """Calibrated and measured, beside the source as a GGUF."""
    directory = tmp_path_factory.mktemp("work")
    text = directory / "text.txt"
    text.write_text(calibration_text[:20_000], encoding="utf-8")
    common = [*COMMON, "--work-dir", directory]
    run_json("calibrate", model, "--text", text, "--chunks", 4, "--window", 64, "--no-fisher", *common)
    run_json("sensitivity", model, *TYPES, "--sample-rows", "all", *common)
    write_gguf(open_source(model, CONVERTERS, pre="gpt-2"), directory / "source.gguf")
    return directory


@pytest.mark.parametrize("form", ["stock", "per-expert"])
def test_two_bits_and_less_bytes_than_q2_k(model: Path, work: Path, tmp_path: Path, form: str) -> None:
    theirs, out = tmp_path / "q2_k.gguf", tmp_path / "out.gguf"
    run_tool("llama-quantize", ["--pure", work / "source.gguf", theirs, "Q2_K", "2"])
    fallback = {t.type for t in read_header(theirs).tensors if "ffn_down_exps" in t.name}
    assert min(kind.bpw for kind in fallback) >= 4.5

    options = ["--layout", form, *TYPES, *FLOORS, *COMMON, "--work-dir", work]
    target = int(0.92 * theirs.stat().st_size)
    plan = run_json("plan", model, "--target-gb", target / 1e9, *options)
    assert (plan["expert_padding"]["width"], plan["expert_padding"]["padded"]) == (WIDTH, PADDED)
    run_json("emit", model, out, "--work-dir", work, *COMMON)
    assert out.stat().st_size == plan["file_bytes"] <= target
    header = read_header(out)
    assert header.kvs["deepseek2-ocr.expert_feed_forward_length"].value == PADDED
    types: dict[str, int] = {}
    for tensor in header.tensors:
        if "ffn_down_exps" in tensor.name and not tensor.name.endswith(".map"):
            assert tensor.shape[0] == PADDED
            types[tensor.type.name] = types.get(tensor.type.name, 0) + tensor.shape[2]
    assert sum(n for kind, n in types.items() if kind in TWO_BIT) >= N_EXPERT / 2
    with LlamaModel(out, n_threads=1) as llama:
        assert np.isfinite(llama.logits([5, 6, 7, 8])).all()
    if form == "stock":
        assert types.keys() <= TWO_BIT
        check_damage(out, work)

    roomy = run_json("plan", model, "--target-bpw", 8, "-o", tmp_path / "plan.json", *options)
    assert roomy["expert_padding"] is None


def check_damage(out: Path, work: Path) -> None:
    """The predicted damage against that of the file, read by gguf's own reader and dequantizer."""
    statistics = read_imatrix(work / "imatrix.gguf")
    planned = {t["name"]: t for t in json.loads((work / "plan.json").read_text())["tensors"]}
    ours, source = ({t.name: t for t in GGUFReader(path).tensors} for path in (out, work / "source.gguf"))
    for name in (f"blk.1.ffn_{which}.weight" for which in ("gate_exps", "down_exps", "up_shexp", "down_shexp")):
        tensor, original = ours[name], source[name]
        values = dequantize(tensor.data, tensor.tensor_type)
        real = dequantize(original.data, original.tensor_type)
        values, real = (v.reshape(-1, *v.shape[-2:]) for v in (values, real))
        n_out, n_in = real.shape[1:]
        # neurons of zeros stay zeros; what meets them does not matter
        assert (values[:, n_out:] == 0).all()
        error = (values[:, :n_out, :n_in].astype(np.float64) - real) ** 2
        entry = statistics.entries[name]
        damage = (error.sum(axis=1) * entry.sums).sum() / statistics.n_tokens
        assert damage == pytest.approx(planned[name]["damage"], rel=1e-4), name
        assert damage > 0
