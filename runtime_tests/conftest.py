"""The model to test, from the command line."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from mopeq_edge.binding import LlamaModel

N_CTX = 256


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--model", type=Path, help="GGUF file to test in llama.cpp")
    parser.addoption("--n-gpu-layers", type=int, default=0, help="layers to put on the GPU (default: 0)")


@pytest.fixture(scope="session")
def model_path(request: pytest.FixtureRequest) -> Path:
    path: Path | None = request.config.getoption("--model")
    if path is None:
        pytest.skip("no model was given; run: pytest runtime_tests --model out.gguf")
    return path


@pytest.fixture(scope="session")
def n_gpu_layers(request: pytest.FixtureRequest) -> int:
    return int(request.config.getoption("--n-gpu-layers"))


@pytest.fixture(scope="module")
def model(model_path: Path, n_gpu_layers: int) -> Iterator[LlamaModel]:
    """The model as users run it."""
    with LlamaModel(model_path, n_ctx=N_CTX, n_gpu_layers=n_gpu_layers) as opened:
        yield opened


@pytest.fixture(scope="module")
def plain_model(model_path: Path, n_gpu_layers: int) -> Iterator[LlamaModel]:
    """The model in plain arithmetic, where one token and many are computed in nearly the same way."""
    with LlamaModel(model_path, n_ctx=N_CTX, n_gpu_layers=n_gpu_layers, plain=True) as opened:
        yield opened
