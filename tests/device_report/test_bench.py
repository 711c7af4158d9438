"""llama-bench's JSON, from a program that prints it."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from mopeq_edge.device_report.bench import BenchSizes, read_bench, run_bench
from mopeq_edge.errors import MopeqError

COMMON = {
    "build_commit": "1a2b3c4",
    "build_number": 7012,
    "cpu_info": "Cortex-A78AE",
    "gpu_info": "Orin",
    "backends": "CUDA",
    "model_type": "olmoe ?B IQ4_XS - 4.25 bpw",
    "n_threads": 6,
    "n_gpu_layers": 99,
    "n_depth": 0,
}
PROMPT = {"n_prompt": 64, "n_gen": 0, "avg_ts": 82.75, "stddev_ts": 19.25, "samples_ts": [69.25, 96.25]}
GENERATE = {"n_prompt": 0, "n_gen": 16, "avg_ts": 483.5, "stddev_ts": 296.5, "samples_ts": [693.25, 273.75]}
OUTPUT = json.dumps([{**COMMON, **PROMPT}, {**COMMON, **GENERATE}])


def program(path: Path, output: str, status: int = 0) -> Path:
    """Prints its arguments to a file beside it, and ``output``."""
    path.write_text(
        f"#!/bin/sh\necho \"$@\" > '{path}.args'\ncat <<'END'\n{output}\nEND\necho 'it failed' >&2\nexit {status}\n"
    )
    path.chmod(0o755)
    return path


@pytest.mark.skipif(os.name != "posix", reason="the stand-in is a shell script")
def test_a_run(tmp_path: Path) -> None:
    bench = program(tmp_path / "llama-bench", OUTPUT)
    found = run_bench(bench, Path("m.gguf"), BenchSizes(64, 16, 2), n_threads=6, n_gpu_layers=99)
    assert (found.prompt.n_tokens, found.prompt.mean, found.prompt.samples) == (64, 82.75, (69.25, 96.25))
    assert (found.generate.n_tokens, found.generate.mean, found.generate.deviation) == (16, 483.5, 296.5)
    assert (found.generate.n_threads, found.backends, found.cpu, found.gpu) == (6, "CUDA", "Cortex-A78AE", "Orin")
    said = Path(f"{bench}.args").read_text()
    assert said == "-m m.gguf -ngl 99 -o json -p 64 -n 16 -r 2 -t 6\n"


@pytest.mark.skipif(os.name != "posix", reason="the stand-in is a shell script")
def test_a_run_that_fails(tmp_path: Path) -> None:
    bench = program(tmp_path / "llama-bench", "", 1)
    with pytest.raises(MopeqError, match="failed with exit code 1: it failed"):
        run_bench(bench, Path("m.gguf"), BenchSizes(), n_threads=1, n_gpu_layers=0)
    with pytest.raises(MopeqError, match="could not start"):
        run_bench(tmp_path / "none", Path("m.gguf"), BenchSizes(), n_threads=1, n_gpu_layers=0)


@pytest.mark.parametrize("text", ["", "[]", "{}", "| model |", json.dumps([{**COMMON, **PROMPT}]), '[{"n_prompt": 1}]'])
def test_output_that_is_no_result(text: str) -> None:
    with pytest.raises(MopeqError, match="expected JSON with a prompt and a generation test"):
        read_bench(text)


def test_sizes() -> None:
    assert BenchSizes.parse("128,32,3") == BenchSizes(128, 32, 3)
    for text in ("", "1,2", "0,1,1", "a,b,c", "1,2,3,4", "-1,2,3"):
        with pytest.raises(MopeqError, match="expected PROMPT,GENERATE,REPETITIONS"):
            BenchSizes.parse(text)
