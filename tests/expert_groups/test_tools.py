"""llama.cpp's own tools on expert groups of the bundled model: perplexity, imatrix, LoRA, the server, saving."""

from __future__ import annotations

import json
import math
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from mopeq_edge.expert_groups.read import read_groups
from mopeq_edge.ggml.types import BY_NAME
from mopeq_edge.gguf_file import read_header
from mopeq_edge.imatrix import read_imatrix
from mopeq_edge.runtime.locate import STOCK, Runtime, import_llama_cpp, require_runtime, tool
from mopeq_edge.source.huggingface import HuggingFaceSource

from ..builders import write_quantized_gguf
from .architectures import finish
from .regroup import by_turns, regroup

pytestmark = pytest.mark.runtime


@pytest.fixture(scope="module")
def stock(tiny_source: HuggingFaceSource, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The bundled model in stock files of one type each."""
    folder = tmp_path_factory.mktemp("stock")
    paths = {}
    for kind in ("Q2_K", "Q3_K", "Q4_K"):
        paths[kind] = folder / f"{kind}.gguf"
        types = {t.name: BY_NAME[kind] for t in tiny_source.tensors if t.quantizable}
        write_quantized_gguf(tiny_source, types, paths[kind])
    return paths


@pytest.fixture(scope="module")
def same(stock: dict[str, Path]) -> Path:
    """Q3_K in three groups."""
    return regroup([stock["Q3_K"]], stock["Q3_K"].with_name("same.gguf"), by_turns(3))


@pytest.fixture(scope="module")
def mixed(stock: dict[str, Path]) -> Path:
    return regroup(list(stock.values()), stock["Q3_K"].with_name("mixed.gguf"), by_turns(3))


@pytest.fixture(scope="module")
def text(evaluation_text: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(evaluation_text[:24_000])
    return path


def run(name: str, *arguments: str | Path, runtime: Runtime | None = None) -> None:
    subprocess.run([tool(name, runtime), *arguments], check=True, capture_output=True)


def stored_logits(model: Path, text: Path, out: Path, *options: str | Path, runtime: Runtime | None = None) -> bytes:
    """What llama-perplexity computes for four sequences at a time, as it stores it."""
    size = ["-c", "128", "-b", "512", "-t", "2", "--chunks", "8"]
    run("llama-perplexity", "-m", model, "-f", text, *size, "--kl-divergence-base", out, *options, runtime=runtime)
    return out.read_bytes()


def test_the_patched_build_runs_stock_files_as_the_stock_build_does(
    stock: dict[str, Path], text: Path, tmp_path: Path
) -> None:
    for path in stock.values():
        patched = stored_logits(path, text, tmp_path / "patched")
        assert len(patched) > 1_000_000
        assert patched == stored_logits(path, text, tmp_path / "stock", runtime=require_runtime(STOCK))


@pytest.mark.parametrize("options", [(), ("-lm", "none"), ("-ot", "_exps=CPU"), ("--no-repack",)])
def test_sequences_in_one_batch(
    stock: dict[str, Path], same: Path, text: Path, tmp_path: Path, options: tuple[str, ...]
) -> None:
    expected = stored_logits(stock["Q3_K"], text, tmp_path / "stock", *options)
    assert expected == stored_logits(same, text, tmp_path / "groups", *options)


def test_an_imatrix_is_of_the_whole_stacks(stock: dict[str, Path], same: Path, text: Path, tmp_path: Path) -> None:
    found = {}
    for name, path in (("stock", stock["Q3_K"]), ("groups", same)):
        out = tmp_path / f"{name}.gguf"
        run("llama-imatrix", "-m", path, "-f", text, "-o", out, "-c", "128", "--chunks", "8", "-t", "2")
        found[name] = read_imatrix(out).entries
    assert "blk.0.ffn_up_exps.weight" in found["stock"]
    assert found["stock"].keys() == found["groups"].keys()
    for name, entry in found["stock"].items():
        assert np.array_equal(entry.sums, found["groups"][name].sums)
        assert np.array_equal(entry.counts, found["groups"][name].counts)


def test_lora_of_experts(stock: dict[str, Path], same: Path, text: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(tmp_path / "lora.gguf", "olmoe")
    writer.add_string("general.type", "adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 8.0)
    for name in ("ffn_up_exps", "ffn_down_exps"):
        for layer in range(4):
            down = rng.standard_normal((16, 4, 256), dtype=np.float32) * 0.05
            up = rng.standard_normal((16, 256, 4), dtype=np.float32) * 0.05
            writer.add_tensor(f"blk.{layer}.{name}.weight.lora_a", down)
            writer.add_tensor(f"blk.{layer}.{name}.weight.lora_b", up)
    finish(writer)
    adapter = ("--lora", tmp_path / "lora.gguf")
    expected = stored_logits(stock["Q3_K"], text, tmp_path / "stock", *adapter)
    assert expected == stored_logits(same, text, tmp_path / "groups", *adapter)
    assert expected != stored_logits(same, text, tmp_path / "plain")


@contextmanager
def server(model: Path, slots: int) -> Iterator[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [tool("llama-server"), "-m", model, "--port", str(port), "-np", str(slots), "-c", "2048", "-t", "2"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            address = f"http://127.0.0.1:{port}"
            for _ in range(300):
                try:
                    with urllib.request.urlopen(f"{address}/health", timeout=5):
                        break
                except OSError:
                    assert process.poll() is None, "llama-server stopped"
                    time.sleep(0.1)
            yield address
        finally:
            process.terminate()


def first_probabilities(address: str, prompt: str) -> dict[int, float]:
    """Token to probability, the most probable ones after ``prompt``."""
    request = {"prompt": prompt, "n_predict": 12, "temperature": 0, "n_probs": 8, "cache_prompt": False}
    body = json.dumps(request).encode()
    call = urllib.request.Request(f"{address}/completion", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(call, timeout=120) as answer:
        found: dict[str, Any] = json.load(answer)
    assert len(found["completion_probabilities"]) == 12
    return {top["id"]: math.exp(top["logprob"]) for top in found["completion_probabilities"][0]["top_logprobs"]}


def test_parallel_requests_to_the_server(mixed: Path, text: Path) -> None:
    words = text.read_text().split()
    prompts = [" ".join(words[at : at + length]) for at, length in ((0, 3), (50, 40), (200, 90), (400, 200))]
    with server(mixed, slots=4) as address, ThreadPoolExecutor(4) as pool:
        alone = [first_probabilities(address, prompt) for prompt in prompts]
        together = list(pool.map(lambda prompt: first_probabilities(address, prompt), prompts))
    for expected, found in zip(alone, together, strict=True):
        # other batches round apart, and a router that nearly ties may choose another expert
        best = max(expected, key=lambda token: expected[token])
        assert abs(expected[best] - found[best]) < 0.05


def test_a_saved_model_is_the_same(same: Path, text: Path, tmp_path: Path) -> None:
    llama = import_llama_cpp()
    model = llama.llama_model_load_from_file(str(same).encode(), llama.llama_model_default_params())
    llama.llama_model_save_to_file(model, str(tmp_path / "saved.gguf").encode())
    llama.llama_model_free(model)
    assert len(read_groups(read_header(tmp_path / "saved.gguf"))) == 12
    assert stored_logits(same, text, tmp_path / "a") == stored_logits(tmp_path / "saved.gguf", text, tmp_path / "b")
