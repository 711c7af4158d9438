"""Multi-head latent attention with the key matrices on the query's side, as deepseek2 GGUFs hold it.

The key of a token is its latent and one part turned by rope, the value is the latent; all heads share both.
"""

from __future__ import annotations

from converters.onnx_graph import Graph, Value
from converters.onnx_reference.rope import rotate
from converters.onnx_reference.settings import Latent, Settings


def latent_queries_keys_values(
    graph: Graph, settings: Settings, latent: Latent, x: Value, cos: Value, sin: Value
) -> tuple[Value, Value, Value]:
    """q [n_tokens, n_head, kv_rank + n_rot], k [n_tokens, 1, kv_rank + n_rot], v [n_tokens, 1, kv_rank]."""
    n_head, n_rot, pairs = settings.n_head, settings.rope.n_rot, settings.switches.pairs
    q = graph.reshape(_query(graph, settings, latent, x), 0, n_head, latent.key + n_rot)
    turned = rotate(graph, graph.slice(q, latent.key, latent.key + n_rot), cos, sin, pairs, n_head, n_rot)
    # [n_head, n_tokens, key] by [n_head, key, kv_rank]
    per_head = graph.add("Transpose", graph.slice(q, 0, latent.key), perm=[1, 0, 2])
    matrices = graph.weight("attn_k_b.weight", (n_head, latent.kv_rank, latent.key))
    absorbed = graph.add("MatMul", per_head, graph.add("Transpose", matrices, perm=[0, 2, 1]))
    absorbed = graph.add("Transpose", absorbed, perm=[1, 0, 2])

    weight = graph.weight("attn_kv_a_mqa.weight", (latent.kv_rank + n_rot, settings.n_embd))
    joined = graph.linear(x, weight)
    norm = graph.weight("attn_kv_a_norm.weight", (latent.kv_rank,))
    values = graph.rms_norm(graph.slice(joined, 0, latent.kv_rank), norm, settings.eps)
    values = graph.reshape(values, 0, 1, latent.kv_rank)
    key = graph.reshape(graph.slice(joined, latent.kv_rank, latent.kv_rank + n_rot), 0, 1, n_rot)
    key = rotate(graph, key, cos, sin, pairs, 1, n_rot)
    return (
        graph.add("Concat", absorbed, turned, axis=-1),
        graph.add("Concat", values, key, axis=-1),
        values,
    )


def latent_values(graph: Graph, settings: Settings, latent: Latent, mixed: Value) -> Value:
    """[n_head, n_tokens, value] of the latents [n_head, n_tokens, kv_rank] that each head attends to, summed."""
    matrices = graph.weight("attn_v_b.weight", (settings.n_head, latent.value, latent.kv_rank))
    return graph.add("MatMul", mixed, graph.add("Transpose", matrices, perm=[0, 2, 1]))


def _query(graph: Graph, settings: Settings, latent: Latent, x: Value) -> Value:
    n_out = settings.n_head * (latent.key + settings.rope.n_rot)
    if latent.q_rank == 0:
        return graph.linear(x, graph.weight("attn_q.weight", (n_out, settings.n_embd)))
    low = graph.linear(x, graph.weight("attn_q_a.weight", (latent.q_rank, settings.n_embd)))
    low = graph.rms_norm(low, graph.weight("attn_q_a_norm.weight", (latent.q_rank,)), settings.eps)
    return graph.linear(low, graph.weight("attn_q_b.weight", (n_out, latent.q_rank)))
