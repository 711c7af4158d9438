"""Every buffer against what llama.cpp prints of it, to the hundredth of a MiB that it prints."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mopeq_edge.memory.command import arguments
from mopeq_edge.memory.kv_cache import kv_cache
from mopeq_edge.memory.predict import (
    ANONYMOUS,
    CACHE,
    COMPUTE,
    MAPPED,
    OUTPUT,
    WEIGHTS_ALLOCATED,
    WEIGHTS_MAPPED,
    WEIGHTS_REPACKED,
    WEIGHTS_UNREAD,
    predict,
)
from mopeq_edge.memory.process import Sampler, peaks
from mopeq_edge.memory.repack import this_cpu
from mopeq_edge.memory.settings import CACHE_TYPES, COMPLETION, Settings, resolve
from mopeq_edge.runtime.locate import tool
from mopeq_edge.runtime.server import buffers, serving
from mopeq_edge.source.huggingface import HuggingFaceSource

from ..builders import write_gguf, write_quantized_gguf
from .models import ALL, model_of, write_zeros

pytestmark = pytest.mark.runtime

MIB = 2**20

SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {"ctx": 4096},
    "streams, odd numbers": {"ctx": 2500, "parallel": 3, "ubatch": 200},
    "no flash attention": {"ctx": 1000, "flash_attn": False, "ubatch": 64, "batch": 96},
    "no flash attention, streams": {"ctx": 2048, "parallel": 2, "flash_attn": False},
    "quantized cache": {"ctx": 2048, "cache_type_k": CACHE_TYPES["q8_0"], "cache_type_v": CACHE_TYPES["q4_0"]},
}


def log_of(path: Path, settings: Settings) -> str:
    command = [str(tool(settings.program)), "-m", str(path), *arguments(settings), "--fit", "off", "-lv", "4"]
    command += ["-p", "a", "-n", "1", "-no-cnv", "--no-warmup"]
    for _ in range(8):
        # a program that ends loses lines that its log's thread has not written yet
        done = subprocess.run(command, capture_output=True, check=True, stdin=subprocess.DEVNULL)
        log = done.stderr.decode(errors="replace")
        if "reserve took" in log:
            return log
    raise AssertionError(f"no whole log of {command}")


def near(mib: float, nbytes: int) -> bool:
    return abs(mib - nbytes / MIB) < 0.00501


@pytest.fixture(scope="module", params=ALL)
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_zeros(tmp_path_factory.mktemp("zeros") / "m.gguf", request.param)


@pytest.mark.parametrize("name", SETTINGS)
def test_cache_compute_and_output(path: Path, name: str) -> None:
    model, settings = model_of(path), Settings(program=COMPLETION, **SETTINGS[name])
    if model.hparams.is_mla:
        settings = replace(settings, cache_type_v=settings.cache_type_k)
    log = log_of(path, settings)
    said, found = buffers(log), predict(model, settings, this_cpu())
    assert found.exact_graph
    assert len(said["compute"]) == len(said["output"]) == 1
    assert near(said["compute"][0][1], found.nbytes(COMPUTE))
    assert near(said["output"][0][1], found.nbytes(OUTPUT))
    cache = kv_cache(model.hparams, settings, resolve(settings, model.hparams))
    parts = [sum(c.nbytes for c in cache.layers if c.window is window) for window in (False, True)]
    assert len(said["kv"]) == sum(part > 0 for part in parts)
    for (_, mib), nbytes in zip(said["kv"], parts, strict=False):
        assert near(mib, nbytes)


def test_nodes_of_the_graph(path: Path) -> None:
    """Not only the sum: as many nodes as llama.cpp's graph has."""
    from mopeq_edge.memory.architectures import build_graph

    model, settings = model_of(path), Settings(ctx=512, program=COMPLETION)
    resolved = resolve(settings, model.hparams)
    cache = kv_cache(model.hparams, settings, resolved)
    graph = build_graph(model, settings, resolved, cache, resolved.n_tokens, resolved.n_outputs)
    nodes = re.findall(r"graph.*: nodes = (\d+)", log_of(path, settings))
    assert nodes == [str(len(graph.nodes))]


def family(tmp_path_factory: pytest.TempPathFactory, name: str) -> Path:
    from converters import CONVERTERS
    from mopeq_edge.source.huggingface import open_huggingface

    from ..converters.families import FAMILIES

    folder = tmp_path_factory.mktemp(name)
    build, _ = FAMILIES[name]
    write_gguf(open_huggingface(build(folder / "model", "bfloat16"), CONVERTERS, "gpt-2"), folder / "m.gguf")
    return folder / "m.gguf"


@pytest.mark.parametrize("name", ["qwen3-vl-moe", "deepseek-ocr", "granite-moe-tied"])
def test_families(tmp_path_factory: pytest.TempPathFactory, name: str) -> None:
    """Pictures that come in behind the first layers, a dense first layer, an embedding that is the output too."""
    path = family(tmp_path_factory, name)
    for settings in (Settings(ctx=4096, program=COMPLETION), Settings(ctx=512, flash_attn=False, program=COMPLETION)):
        said, found = buffers(log_of(path, settings)), predict(model_of(path), settings, this_cpu())
        assert found.exact_graph
        assert near(said["compute"][0][1], found.nbytes(COMPUTE))
        assert near(said["kv"][0][1], found.nbytes(CACHE))
        assert near(said["output"][0][1], found.nbytes(OUTPUT))


@pytest.mark.parametrize("mmap", [True, False])
@pytest.mark.parametrize("repack", [True, False])
def test_weights(tiny_source: HuggingFaceSource, tmp_path: Path, mmap: bool, repack: bool) -> None:
    from mopeq_edge.ggml.types import BY_NAME

    kinds = {"ffn_up": "Q4_K", "ffn_down": "Q2_K", "ffn_gate": "Q4_0", "attn": "Q6_K", "output": "Q8_0"}
    types = {
        t.name: BY_NAME[next((kind for word, kind in kinds.items() if word in t.name), "IQ4_NL")]
        for t in tiny_source.tensors
        if t.quantizable
    }
    path = tmp_path / "m.gguf"
    write_quantized_gguf(tiny_source, types, path)
    settings = Settings(ctx=512, program=COMPLETION, mmap=mmap, repack=repack)
    said, found = dict(buffers(log_of(path, settings))["model"]), predict(model_of(path), settings, this_cpu())
    repacked = found.nbytes(WEIGHTS_REPACKED)
    assert ("CPU_REPACK" in said) == (repacked > 0)
    assert near(said.get("CPU_REPACK", 0.0), repacked)
    if mmap:
        # llama.cpp counts to the last byte, the kernel in pages
        assert abs(said["CPU_Mapped"] - (found.nbytes(WEIGHTS_MAPPED) + found.nbytes(WEIGHTS_UNREAD)) / MIB) < 0.0091
    else:
        assert near(said["CPU"], found.nbytes(WEIGHTS_ALLOCATED))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("mmap", [True, False])
def test_resident_memory(bf16_gguf: Path, tmp_path: Path, mmap: bool) -> None:
    """The whole process, of which the model is a small part here: its own share must be right to a few MB."""
    settings = Settings(ctx=1024, parallel=2, mmap=mmap)
    found = predict(model_of(bf16_gguf), settings, this_cpu())
    samplers: list[Sampler] = []
    options = ["-m", str(bf16_gguf), *arguments(settings), "--fit", "off", "--cache-ram", "0"]
    with serving(
        tool("llama-server"), options, tmp_path / "log", started=lambda pid: samplers.append(Sampler(pid))
    ) as server:
        server.complete_all([list(range(100 + n, 580 + n)) for n in range(2)])
        got = peaks(samplers[0].stop())
    assert abs(got["anon"] - found.total(ANONYMOUS)) < 5_000_000
    assert abs(got["file"] - found.total(MAPPED)) < 5_000_000
    assert abs(got["rss"] - found.peak) < 5_000_000
