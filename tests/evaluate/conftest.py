"""Quantized models and text files to evaluate with."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from mopeq_edge.runtime.locate import tool


@pytest.fixture(scope="session")
def text_file(evaluation_text: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Held-out text as a file, about 60 windows of 256 tokens."""
    path = tmp_path_factory.mktemp("text") / "evaluation.txt"
    path.write_text(evaluation_text, encoding="utf-8", newline="")
    return path


@pytest.fixture(scope="session")
def q2_k(bf16_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model in Q2_K."""
    return _quantize(bf16_gguf, tmp_path_factory, "Q2_K")


@pytest.fixture(scope="session")
def q4_k_m(bf16_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model in Q4_K_M."""
    return _quantize(bf16_gguf, tmp_path_factory, "Q4_K_M")


def _quantize(source: Path, factory: pytest.TempPathFactory, ftype: str) -> Path:
    path = factory.mktemp("quantized") / f"{ftype}.gguf"
    subprocess.run([tool("llama-quantize"), source, path, ftype], check=True, capture_output=True)
    return path
