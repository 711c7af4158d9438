"""Memory of llama-server while it answers, with one slot. Nothing is too much: the figures are for the report."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from mopeq_edge.errors import MopeqError
from mopeq_edge.memory.model import model_of_gguf
from mopeq_edge.memory.predict import predict
from mopeq_edge.memory.process import Sampler, peaks
from mopeq_edge.memory.repack import this_cpu
from mopeq_edge.memory.settings import Settings
from mopeq_edge.runtime.server import serving
from mopeq_edge.split import read_parts
from runtime_tests.engines import Engines, Setup
from runtime_tests.prompts import N_PREDICT


@pytest.mark.skipif(sys.platform != "linux", reason="memory of a process is read from /proc")
def test_memory(
    setup: Setup, engines: Engines, tokens: npt.NDArray[np.int32], tmp_path: Path, record: Callable[..., None]
) -> None:
    program = setup.build.tool("llama-server")
    if program is None:
        pytest.skip("this llama.cpp has no llama-server")
    engines.close()
    samplers: list[Sampler] = []
    prompt = tokens[: min(len(tokens), setup.n_ctx - N_PREDICT)].tolist()
    with serving(
        program,
        setup.server_arguments(1),
        tmp_path / "log",
        started=lambda pid: samplers.append(Sampler(pid, pss_every=5, gpu=setup.n_gpu_layers > 0)),
    ) as server:
        answer = server.complete(prompt, N_PREDICT, ignore_eos=True)
        found = peaks(samplers[0].stop())
    record(
        context_tokens_count=setup.n_ctx,
        peak_rss_bytes=found["rss"],
        peak_pss_bytes=found["pss"],
        peak_gpu_bytes=found["gpu"],
        peak_swap_bytes=found["swap"],
        anonymous_bytes_at_peak=found["at_peak"]["anon"],
        file_bytes_at_peak=found["at_peak"]["file"],
        major_faults_count=found["major_faults"],
        predicted_peak_bytes=_predicted(setup),
    )
    assert answer["tokens_predicted"] == N_PREDICT
    assert found["rss"] > 0


def _predicted(setup: Setup) -> int | None:
    """What ``mopeq-edge memory`` says; None for a model that it cannot judge."""
    settings = Settings(ctx=setup.n_ctx, parallel=1, gpu_layers=setup.n_gpu_layers, threads=setup.n_threads)
    try:
        return predict(model_of_gguf(read_parts(setup.model)), settings, this_cpu()).peak
    except MopeqError:
        return None
