"""Our GGUF against the one that llama.cpp's own converter writes of the same directory: every byte is the same.

The script of the installed llama.cpp runs once, in a process of its own, over all models. Its table of tokenizers
does not know the bundled one, so both sides are told to call its pre-tokenizer gpt-2.
"""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from converters import CONVERTERS
from mopeq_edge.ggml.types import F32
from mopeq_edge.gguf_file import read_header
from mopeq_edge.runtime.locate import require_runtime
from mopeq_edge.source.open import open_source

from ..builders import build_olmoe, edit_json, write_gguf, write_quantized_gguf
from .address_code import write_numbers
from .address_tables import TABLES
from .families import FAMILIES, build_mixtral, build_mxfp4_gpt_oss, logits
from .fp8 import build_fp8_deepseek_v3, build_fp8_qwen3_moe
from .vision_language import VISION_LANGUAGE

pytestmark = pytest.mark.runtime

SCRIPT = """
import json, runpy, sys
scripts, jobs = sys.argv[1], json.loads(sys.argv[2])
sys.path[:0] = [scripts + "/gguf-py", scripts]
import conversion.base
conversion.base.TextModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"
for model, outtype, outfile in jobs:
    sys.argv = ["convert_hf_to_gguf.py", model, "--outtype", outtype, "--outfile", outfile]
    runpy.run_path(scripts + "/convert_hf_to_gguf.py", run_name="__main__")
"""

ADDED = {"single_word": False, "lstrip": False, "rstrip": False}


def bundled(directory: Path) -> None:
    shutil.copytree(Path(__file__).parents[2] / "examples" / "tiny-olmoe", directory)


def sharded_bf16(directory: Path) -> None:
    """Stacks spread over shards, layers 10 and 2, a model card, sampling settings, a chat template."""
    build_olmoe(directory, n_layer=11, n_expert=3, n_used=2, n_shards=4, vocab=4200)
    card = "---\nlicense: apache-2.0\nbase_model: some/Base-MoE-7B\ntags:\n- moe\nlanguage:\n- en\n---\n# Card\n"
    (directory / "README.md").write_text(card)
    edit_json(directory / "generation_config.json", temperature=0.7, top_k=40, repetition_penalty=1.1)
    edit_json(directory / "tokenizer_config.json", chat_template="{{ messages }}", add_bos_token=True)


def half(directory: Path) -> None:
    """Byte-level post-processor, added tokens of every kind, yarn."""
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "beta_fast": 16.0}
    build_olmoe(directory, dtype="float16", n_layer=1, rope_parameters={"rope_theta": 5e5, **yarn})
    tokenizer = json.loads((directory / "tokenizer.json").read_text())
    for token, special, normalized in (("<|user|>", False, False), ("two▁words", False, True), ("<s>", True, False)):
        number = 4096 + len(tokenizer["added_tokens"]) - 1
        entry = {"id": number, "content": token, "special": special, "normalized": normalized, **ADDED}
        tokenizer["added_tokens"].append(entry)
    tokenizer["post_processor"] = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer))
    edit_json(directory / "tokenizer_config.json", add_bos_token=True)


def full(directory: Path) -> None:
    """A post-processor that adds BOS, a head size of 32, linear rope."""
    build_olmoe(
        directory, dtype="float32", n_head=2, rope_parameters={"rope_theta": 1e4, "rope_type": "linear", "factor": 2.0}
    )
    bos = {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}
    text = {"Sequence": {"id": "A", "type_id": 0}}
    template = {
        "type": "TemplateProcessing",
        "single": [bos, text],
        "pair": [bos, text, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {"<|endoftext|>": {"id": "<|endoftext|>", "ids": [0], "tokens": ["<|endoftext|>"]}},
    }
    tokenizer = json.loads((directory / "tokenizer.json").read_text())
    tokenizer["post_processor"] = template
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer))


def released_gpt_oss(directory: Path) -> None:
    """Settings in the words of the released ones: rope beside its scaling, a ramp without rounded ends."""
    build_mxfp4_gpt_oss(directory, "bfloat16")
    rope = json.loads((directory / "config.json").read_text())["rope_parameters"]
    theta = rope.pop("rope_theta")
    scaling = {**rope, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False}
    also = {"initial_context_length": 64, "experts_per_token": 3}
    edit_json(directory / "config.json", rope_parameters=None, rope_scaling=scaling, rope_theta=theta, **also)


def numbered(directory: Path, build: Callable[[Path, str], object]) -> None:
    """Every element is its own number, which F32 holds whole."""
    build(directory, "float32")
    write_numbers(directory)


MODELS: dict[str, tuple[Callable[[Path], object], str]] = {
    "tiny-olmoe": (bundled, "bf16"),
    "sharded-MoE-v2": (sharded_bf16, "bf16"),
    "half": (half, "f16"),
    "full": (full, "f32"),
    # llama.cpp's converter has a rule for vocabularies of this size
    "granite-vocabulary": (partial(build_mixtral, dtype="bfloat16", vocab_size=49152), "bf16"),
    "gpt-oss-released": (released_gpt_oss, "bf16"),
    "qwen3-moe-fp8": (build_fp8_qwen3_moe, "bf16"),
    "deepseek-v3-fp8": (build_fp8_deepseek_v3, "bf16"),
    **{name: (partial(build, dtype="bfloat16"), "bf16") for name, (build, _) in FAMILIES.items()},
    **{f"{name}-numbered": (partial(numbered, build=FAMILIES[name][0]), "f32") for name in TABLES if name in FAMILIES},
}


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with every model's directory and, beside it, llama.cpp's GGUF of it."""
    folder = tmp_path_factory.mktemp("llama.cpp")
    jobs = []
    for name, (make, outtype) in MODELS.items():
        make(folder / name)
        jobs.append((str(folder / name), outtype, str(folder / f"{name}.gguf")))
    command = [sys.executable, "-c", SCRIPT, str(require_runtime().convert), json.dumps(jobs)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    return folder


@pytest.mark.parametrize("name", MODELS)
def test_same_file(converted: Path, tmp_path: Path, name: str) -> None:
    theirs = converted / f"{name}.gguf"
    ours = tmp_path / "ours.gguf"
    write_gguf(open_source(converted / name, CONVERTERS, pre="gpt-2"), ours)
    mine, other = read_header(ours), read_header(theirs)
    assert list(mine.kvs) == list(other.kvs)
    assert mine.kvs == other.kvs
    assert mine.tensors == other.tensors
    assert ours.read_bytes() == theirs.read_bytes()


def test_without_naming_the_pre_tokenizer(converted: Path, tmp_path: Path) -> None:
    """The bundled tokenizer is recognised by its definition."""
    write_gguf(open_source(converted / "tiny-olmoe", CONVERTERS), tmp_path / "ours.gguf")
    assert (tmp_path / "ours.gguf").read_bytes() == (converted / "tiny-olmoe.gguf").read_bytes()


@pytest.mark.parametrize("packed", [False, True])
def test_same_logits_as_transformers(tmp_path: Path, packed: bool, evaluation_text: str) -> None:
    """An F32 checkpoint in llama.cpp and in transformers: equal but for the order of sums."""
    import torch
    from transformers import AutoTokenizer, OlmoeForCausalLM

    from mopeq_edge.binding import LlamaModel

    directory = build_olmoe(tmp_path / "model", dtype="float32", packed=packed, n_layer=3)
    write_gguf(open_source(directory, CONVERTERS, pre="gpt-2"), tmp_path / "model.gguf")
    tokens = AutoTokenizer.from_pretrained(directory).encode(evaluation_text[:600])[:128]
    with torch.no_grad():
        model: Any = OlmoeForCausalLM.from_pretrained(directory, dtype=torch.float32)
        expected = model(torch.tensor([tokens])).logits[0].numpy()
    with LlamaModel(tmp_path / "model.gguf", n_threads=1, plain=True) as llama:
        assert llama.tokenize(evaluation_text[:600])[:128].tolist() == tokens
        got = llama.logits(tokens)
    assert expected.std() > 0.5
    assert np.abs(got - expected).max() < 1e-4 * expected.std()


@pytest.mark.parametrize("name", [*FAMILIES, *VISION_LANGUAGE])
def test_same_logits_as_transformers_for_every_family(tmp_path: Path, name: str, evaluation_text: str) -> None:
    from transformers import AutoTokenizer

    from mopeq_edge.binding import LlamaModel

    build, open_model = {**FAMILIES, **VISION_LANGUAGE}[name]
    directory = build(tmp_path / "model", "float32")
    source = open_source(directory, CONVERTERS, pre="gpt-2")
    # llama.cpp rounds what goes into quantized matrices, so they become F32 here
    exact = {tensor.name: F32 for tensor in source.tensors if tensor.type.is_quantized}
    write_quantized_gguf(source, exact, tmp_path / "model.gguf")
    tokens = AutoTokenizer.from_pretrained(directory).encode(evaluation_text[:600])[:128]
    expected = logits(open_model(directory), tokens)
    with LlamaModel(tmp_path / "model.gguf", n_threads=1, plain=True) as llama:
        got = llama.logits(tokens)
    assert expected.std() > 0.5
    assert np.abs(got - expected).max() < 1e-4 * expected.std()
