"""llama-cli answers once."""

from __future__ import annotations

import subprocess

import pytest

from mopeq_edge.runtime.process import describe_exit
from runtime_tests.engines import Engines, Setup


def test_llama_cli_answers(setup: Setup, engines: Engines) -> None:
    program = setup.build.tool("llama-cli")
    if program is None:
        pytest.skip("this llama.cpp has no llama-cli")
    engines.close()
    options = ["-p", "Hello", "-n", "8", "-st", "--temp", "0", "-c", "256"]
    numbers = ["-t", str(setup.n_threads), "-ngl", str(setup.n_gpu_layers)]
    done = subprocess.run(
        [program, "-m", setup.model, *options, *numbers],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        timeout=1800,
        check=False,
    )
    assert done.returncode == 0, f"llama-cli {describe_exit(done.returncode)}: {done.stderr[-500:]}"
    assert "Hello" in done.stdout
