"""Blocks that predict further tokens: left out with a note, or kept as llama.cpp's script keeps those that it can.

The script drops them for DeepSeek-V3 but keeps them for GLM-4.7-Flash, a model of the same architecture: told that the
checkpoint is one, and to read the tokenizer as DeepSeek's, it is the oracle.
"""

import json
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from converters import CONVERTERS
from mopeq_edge.calibrate.run import calibrate
from mopeq_edge.errors import SourceError
from mopeq_edge.ggml.types import BY_NAME
from mopeq_edge.pipeline_context import open_context
from mopeq_edge.plan.candidates import candidates
from mopeq_edge.progress import SilentProgress
from mopeq_edge.runtime.locate import import_llama_cpp, require_runtime
from mopeq_edge.sensitivity.pricing import Statistics, pricings
from mopeq_edge.source.gguf import GGUFSource
from mopeq_edge.source.huggingface import open_huggingface
from mopeq_edge.source.open import open_source
from mopeq_edge.source.roles import Role

from ..builders import build_olmoe, edit_json, write_gguf, write_quantized_gguf
from .families import build_deepseek_v3

SCRIPT = """
import runpy, sys
scripts, model, outfile = sys.argv[1:]
sys.path[:0] = [scripts + "/gguf-py", scripts]
import conversion.base
from conversion.deepseek import DeepseekV2Model
from conversion.glm import Glm4MoeLiteModel
conversion.base.TextModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"
Glm4MoeLiteModel.set_vocab = DeepseekV2Model.set_vocab
sys.argv = ["convert_hf_to_gguf.py", model, "--outtype", "bf16", "--outfile", outfile]
runpy.run_path(scripts + "/convert_hf_to_gguf.py", run_name="__main__")
"""
BLOCK = 3
"""The one behind the others."""


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_deepseek_v3(tmp_path_factory.mktemp("mtp") / "model", "bfloat16")


@pytest.mark.runtime
def test_same_file_as_the_script(directory: Path, tmp_path: Path) -> None:
    shutil.copytree(directory, tmp_path / "model")
    edit_json(tmp_path / "model" / "config.json", architectures=["Glm4MoeLiteForCausalLM"])
    command = [sys.executable, "-c", SCRIPT, str(require_runtime().convert), str(tmp_path / "model")]
    result = subprocess.run([*command, str(tmp_path / "theirs")], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    write_gguf(open_source(directory, CONVERTERS, pre="gpt-2", keep_mtp=True), tmp_path / "ours")
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def loads_with_mtp(path: Path) -> bool:
    """Whether llama.cpp finds all of the block and makes a context that drafts with it."""
    c = import_llama_cpp()
    model_params, params = c.llama_model_default_params(), c.llama_context_default_params()
    model_params.load_mtp = True
    params.ctx_type, params.n_ctx = 1, 64
    model = c.llama_model_load_from_file(str(path).encode(), model_params)
    assert model
    context = c.llama_init_from_model(model, params)
    if context:
        c.llama_free(context)
    c.llama_model_free(model)
    return bool(context)


@pytest.mark.runtime
def test_llama_cpp_loads_what_is_kept(directory: Path, tmp_path: Path) -> None:
    """The logits stay; the draft context is made of a file with the block, quantized too, and of no other."""
    from mopeq_edge.binding import LlamaModel

    kept = open_source(directory, CONVERTERS, pre="gpt-2", keep_mtp=True)
    write_gguf(open_source(directory, CONVERTERS, pre="gpt-2"), tmp_path / "without")
    write_gguf(kept, tmp_path / "with")
    quantized = {t.name: BY_NAME["Q4_0"] for t in kept.tensors if t.role is Role.MTP and t.n_in % 32 == 0}
    write_quantized_gguf(kept, quantized, tmp_path / "quantized")
    logits = []
    for name in ("without", "with", "quantized"):
        with LlamaModel(tmp_path / name, n_threads=1, plain=True) as llama:
            logits.append(llama.logits(list(range(5, 69))))
    assert np.array_equal(logits[0], logits[1])
    assert np.array_equal(logits[0], logits[2])
    assert [loads_with_mtp(tmp_path / name) for name in ("without", "with", "quantized")] == [False, True, True]


def test_what_is_kept(directory: Path, tmp_path: Path) -> None:
    """All of the block, as tensors of a role of their own; a GGUF of it says the same."""
    without = open_huggingface(directory, CONVERTERS, pre="gpt-2")
    kept = open_huggingface(directory, CONVERTERS, pre="gpt-2", keep_mtp=True)
    assert without.warnings[0].endswith("block 3 (MTP, only for speculative decoding) left out; --keep-mtp keeps it")
    assert kept.warnings == ()
    assert [t for t in kept.tensors if t.layer != BLOCK] == list(without.tensors)
    own = {t.name.removeprefix("blk.3."): t for t in kept.tensors if t.layer == BLOCK}
    last = {t.name.removeprefix("blk.2.") for t in kept.tensors if t.layer == BLOCK - 1}
    nextn = ("eh_proj", "enorm", "hnorm", "embed_tokens", "shared_head_norm", "shared_head_head")
    assert set(own) == last | {f"nextn.{name}.weight" for name in nextn}
    assert {t.role for t in own.values()} == {Role.MTP, Role.NORM, Role.ROUTER}
    assert own["ffn_up_exps.weight"].projection is None
    checkpoint = kept.hf_tensor_of["blk.3.nextn.eh_proj.weight"].parts[0].tensor
    assert checkpoint == "model.layers.3.eh_proj.weight"
    write_gguf(kept, tmp_path / "kept.gguf")
    assert GGUFSource(tmp_path / "kept.gguf").tensors == kept.tensors
    assert kept.kvs["deepseek2.block_count"].value == 4
    assert kept.kvs["deepseek2.nextn_predict_layers"].value == 1


def test_calibration_does_not_see_it(directory: Path, tmp_path: Path) -> None:
    windows = np.random.default_rng(0).integers(3, 4000, (2, 24)).astype(np.int32)
    found = []
    for keep_mtp in (False, True):
        source = open_huggingface(directory, CONVERTERS, pre="gpt-2", keep_mtp=keep_mtp)
        options = {"fisher": True, "seed": 1, "threads": 1, "scratch": tmp_path}
        found.append(calibrate(source, windows, "text", **options, progress=SilentProgress()))
    for kind in ("activation", "gradient"):
        plain, kept = (statistics.imatrix(kind) for statistics in found)
        assert plain is not None
        assert kept is not None
        assert list(plain.entries) == list(kept.entries)
        for name, entry in plain.entries.items():
            assert np.array_equal(entry.sums, kept.entries[name].sums)
            assert np.array_equal(entry.counts, kept.entries[name].counts)
    source = open_huggingface(directory, CONVERTERS, pre="gpt-2", keep_mtp=True)
    check_prices(source, found[1])


def check_prices(source: object, statistics: Statistics) -> None:
    """No logits depend on the block, so no score counts it and its floor decides."""
    for tensor in getattr(source, "tensors"):  # noqa: B009
        if tensor.role is Role.MTP:
            prices = pricings(tensor, statistics, [1.0] * tensor.n_matrices)
            assert set(prices) == set(statistics.available())
            assert all(price.factor == 0 for each in prices.values() for price in each)
            allowed = candidates(tensor, [BY_NAME[n] for n in ("Q2_K", "IQ4_NL", "Q4_0", "Q8_0")], has_imatrix=False)
            assert min(kind.bpw for kind in allowed) >= 4


def test_other_work_than_without(directory: Path, tmp_path: Path) -> None:
    """What was measured or written without the block must not be reused with it."""
    digests = {
        open_context(
            directory, tmp_path, pre="gpt-2", keep_mtp=keep_mtp, threads=1, progress=SilentProgress()
        ).source_sha256
        for keep_mtp in (False, True)
    }
    assert len(digests) == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_nextn_predict_layers": 2}, "num_nextn_predict_layers 2, expected 1"),
        ({"num_hidden_layers": 4}, "no block that predicts a further token"),
    ],
)
def test_blocks_that_cannot_be_kept(directory: Path, tmp_path: Path, changes: Mapping[str, int], message: str) -> None:
    shutil.copytree(directory, tmp_path / "model")
    edit_json(tmp_path / "model" / "config.json", **changes)
    with pytest.raises(SourceError, match=message) as caught:
        open_source(tmp_path / "model", CONVERTERS, pre="gpt-2", keep_mtp=True)
    assert str(caught.value).startswith(str(tmp_path / "model"))


def test_where_there_is_no_choice(tmp_path: Path) -> None:
    olmoe = build_olmoe(tmp_path / "olmoe")
    with pytest.raises(SourceError, match=r"for OlmoeForCausalLM; leave out --keep-mtp"):
        open_source(olmoe, CONVERTERS, pre="gpt-2", keep_mtp=True)
    write_gguf(open_source(olmoe, CONVERTERS, pre="gpt-2"), tmp_path / "model.gguf")
    with pytest.raises(SourceError, match=r"a GGUF file keeps all that it has; leave out --keep-mtp"):
        open_source(tmp_path / "model.gguf", CONVERTERS, keep_mtp=True)
    edit_json(olmoe / "config.json", architectures=["GlmMoeForCausalLM"])
    assert "num_experts" in json.loads((olmoe / "config.json").read_text())
    with pytest.raises(SourceError, match=r"own converter decides .* leave out --keep-mtp"):
        open_source(olmoe, CONVERTERS, to_gguf=lambda path, _: path, keep_mtp=True)
