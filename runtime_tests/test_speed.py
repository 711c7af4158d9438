"""Tokens a second, by llama-bench. Nothing is too slow: the figures are for the report."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from mopeq_edge.device_report.bench import BenchSizes, run_bench
from runtime_tests.engines import Engines, Setup


def test_speed(request: pytest.FixtureRequest, setup: Setup, engines: Engines, record: Callable[..., None]) -> None:
    program = setup.build.tool("llama-bench")
    if program is None:
        pytest.skip("this llama.cpp has no llama-bench")
    engines.close()
    sizes = BenchSizes.parse(request.config.getoption("--bench"))
    found = run_bench(program, setup.model, sizes, n_threads=setup.n_threads, n_gpu_layers=setup.n_gpu_layers)
    for name, speed in (("prompt", found.prompt), ("generated", found.generate)):
        record(
            **{
                f"{name}_count": speed.n_tokens,
                f"{name}_tokens_per_second": speed.mean,
                f"{name}_tokens_per_second_deviation": speed.deviation,
                f"{name}_samples": ", ".join(f"{sample:.4g}" for sample in speed.samples),
            }
        )
    record(threads_count=found.generate.n_threads)
    record(**{name: text for name, text in (("backends", found.backends), ("bench_gpu", found.gpu)) if text})
    assert found.prompt.mean > 0
    assert found.generate.mean > 0
