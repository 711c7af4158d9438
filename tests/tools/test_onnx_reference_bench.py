"""The bound on the ONNX reference's memory, on the block that tools.bench.onnx_reference measures."""

from __future__ import annotations

from pathlib import Path

import pytest

from mopeq_edge.ggml.types import BY_NAME
from tools.bench.onnx_reference import in_child, write_model


@pytest.mark.runtime
def test_a_block_takes_less_than_twice_its_weights_in_f32(tmp_path: Path) -> None:
    """Most of it is one block of 234 million weights; a process of its own runs it."""
    q4_0 = BY_NAME["Q4_0"]
    write_model(tmp_path / "model.gguf", 2, 512, q4_0, q4_0)
    found = in_child("measure_block", tmp_path / "model.gguf", 16, 1)
    assert found["block"] > 900e6
    assert found["experts"] > 32
    # one expert in F32 is 14 MB; so much at least is there, so much is far from all of them
    assert 10e6 < found["growth"] < 2 * found["block"]
    assert found["growth"] < 0.2 * found["block"]
