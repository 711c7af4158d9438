"""Roles of the tensor names that llama.cpp uses."""

import pytest

from mopeq_edge.ggml.types import F32
from mopeq_edge.source.model import SourceTensor
from mopeq_edge.source.roles import Role, layer_of, projection_of, role_of


@pytest.mark.parametrize(
    ("name", "role", "layer", "projection"),
    [
        ("token_embd.weight", Role.EMBEDDING, None, None),
        ("output.weight", Role.OUTPUT, None, None),
        ("output_norm.weight", Role.NORM, None, None),
        ("blk.0.attn_norm.weight", Role.NORM, 0, None),
        ("blk.10.attn_q_norm.weight", Role.NORM, 10, None),
        ("blk.1.post_attention_norm.weight", Role.NORM, 1, None),
        ("blk.3.attn_output.weight", Role.ATTENTION, 3, None),
        ("blk.3.attn_kv_b.weight", Role.ATTENTION, 3, None),
        ("blk.3.ffn_gate_inp.weight", Role.ROUTER, 3, None),
        ("blk.3.exp_probs_b.bias", Role.ROUTER, 3, None),
        ("blk.3.ffn_gate_exps.weight", Role.EXPERT, 3, "gate"),
        ("blk.3.ffn_gate_up_exps.weight", Role.EXPERT, 3, "gate_up"),
        ("blk.3.ffn_down_exps.bias", Role.EXPERT, 3, None),
        ("blk.3.ffn_up_shexp.weight", Role.SHARED_EXPERT, 3, None),
        ("blk.0.ffn_down.weight", Role.DENSE_FFN, 0, None),
        ("rope_freqs.weight", Role.OTHER, None, None),
    ],
)
def test_names(name: str, role: Role, layer: int | None, projection: str | None) -> None:
    assert (role_of(name), layer_of(name), projection_of(name)) == (role, layer, projection)


@pytest.mark.parametrize(
    ("name", "shape", "quantizable"),
    [
        ("blk.0.ffn_up_exps.weight", (4, 4, 2), True),
        ("output.weight", (4, 4), True),
        ("blk.0.ffn_gate_inp.weight", (4, 4), False),
        ("blk.0.attn_q.bias", (4,), False),
        ("blk.0.attn_q_norm.weight", (4, 4), False),
    ],
)
def test_quantizable(name: str, shape: tuple[int, ...], quantizable: bool) -> None:
    assert SourceTensor(name, shape, F32).quantizable is quantizable
