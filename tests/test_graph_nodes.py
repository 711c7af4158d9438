"""Nodes inside llama.cpp's graph: the numbers that it gives out itself, and errors on the way."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mopeq_edge.binding import LlamaModel
from mopeq_edge.graph_nodes import Array, NodeReader

pytestmark = pytest.mark.runtime


def test_the_last_node_is_the_logits(bf16_gguf: Path) -> None:
    found: list[tuple[str, Array]] = []
    names = ("result_output", "ffn_moe_topk-2", "ffn_moe_logits-2")
    reader = NodeReader(lambda name: name in names, lambda name, values: found.append((name, values)))
    tokens = np.arange(20, dtype=np.int32)
    with LlamaModel(bf16_gguf, n_ctx=64, n_threads=1, plain=True, nodes=reader) as model:
        logits = model.logits(tokens)
    with LlamaModel(bf16_gguf, n_ctx=64, n_threads=1, plain=True) as model:
        assert np.array_equal(model.logits(tokens), logits)
    values = dict(found)
    assert [name for name, _ in found] == ["ffn_moe_logits-2", "ffn_moe_topk-2", "result_output"]
    assert np.array_equal(values["result_output"], logits)
    # a view with gaps between its rows: the ids of the best four of sixteen
    chosen, scores = values["ffn_moe_topk-2"], values["ffn_moe_logits-2"]
    assert (chosen.dtype, chosen.shape, scores.shape) == (np.int32, (20, 4), (20, 16))
    assert np.array_equal(np.sort(chosen), np.sort(np.argsort(-scores, axis=1)[:, :4]))


@pytest.mark.parametrize("where", ["wanted", "receive"])
def test_errors_pass_llama_cpp(bf16_gguf: Path, where: str) -> None:
    def fail(*_: object) -> bool:
        raise KeyError("mine")

    reader = NodeReader(*((fail, print) if where == "wanted" else (lambda name: name == "result_output", fail)))
    with (
        LlamaModel(bf16_gguf, n_ctx=64, n_threads=1, nodes=reader) as model,
        pytest.raises(KeyError, match="mine"),
    ):
        model.logits(np.arange(4, dtype=np.int32))
