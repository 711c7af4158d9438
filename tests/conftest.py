"""What every test may use: the bundled model and its texts, and the model as a BF16 GGUF."""

from __future__ import annotations

from pathlib import Path

import pytest

from converters import CONVERTERS
from mopeq_edge.llama_cpp.bundle import STOCK, build_name
from mopeq_edge.runtime.locate import find_runtime
from mopeq_edge.source.huggingface import HuggingFaceSource, open_huggingface

from .builders import write_gguf

EXAMPLE = Path(__file__).parent.parent / "examples" / "tiny-olmoe"


def pytest_runtest_setup(item: pytest.Item) -> None:
    """A missing llama.cpp fails the tests that need it: skipped tests would look like passed ones."""
    if item.get_closest_marker("runtime") is None:
        return
    for build, options in ((build_name(), ""), (STOCK, " --stock")):
        if find_runtime(build) is None:
            pytest.fail(f"llama.cpp is not installed; run: mopeq-edge runtime install{options}", pytrace=False)


@pytest.fixture(scope="session")
def tiny_model() -> Path:
    """The bundled OLMoE: 4 layers, hidden 256, 16 experts of 256, top-4, BF16."""
    return EXAMPLE


@pytest.fixture(scope="session")
def calibration_text() -> str:
    return (EXAMPLE / "calibration.txt").read_text(encoding="utf-8")


@pytest.fixture(scope="session")
def evaluation_text() -> str:
    return (EXAMPLE / "evaluation.txt").read_text(encoding="utf-8")


@pytest.fixture(scope="session")
def tiny_source(tiny_model: Path) -> HuggingFaceSource:
    """The bundled model, opened. The pre-tokenizer is given, so that no llama.cpp is needed."""
    return open_huggingface(tiny_model, CONVERTERS, pre="gpt-2")


@pytest.fixture(scope="session")
def bf16_gguf(tiny_source: HuggingFaceSource, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model as a BF16 GGUF. Do not change the file."""
    path = tmp_path_factory.mktemp("bf16") / "tiny-olmoe-bf16.gguf"
    write_gguf(tiny_source, path)
    return path
