"""What SigLIP and CLIP have in common: patches, attention among them, and the curve of their feed-forward layers."""

from __future__ import annotations

import math

from converters.onnx_graph import Graph, Value


def patches(graph: Graph, pixels: Value, side: int, n_side: int) -> Value:
    """[n_side², 3 · side²]: the squares of ``pixels`` [1, 3, height, width] row by row, each channel, row, column.

    Pixels beyond the last whole square are dropped, as a convolution of that stride does.
    """
    kept = graph.add(
        "Slice", pixels, graph.integers(0, 0), graph.integers(n_side * side, n_side * side), graph.integers(2, 3)
    )
    squares = graph.add("Transpose", graph.reshape(kept, 3, n_side, side, n_side, side), perm=[1, 3, 0, 2, 4])
    return graph.reshape(squares, n_side * n_side, 3 * side * side)


def attention(graph: Graph, q: Value, k: Value, v: Value, heads: int, head_dim: int, groups: int = 1) -> Value:
    """[groups · n_q, heads · head_dim]: softmax(q kᵀ / √head_dim) v in each head, every one of ``groups`` by itself.

    ``q`` is [groups · n_q, heads · head_dim], ``k`` and ``v`` are [groups · n_k, heads · head_dim].
    """
    q, k, v = (
        graph.add("Transpose", graph.reshape(x, groups, -1, heads, head_dim), perm=[0, 2, *last])
        for x, last in ((q, (1, 3)), (k, (3, 1)), (v, (1, 3)))
    )
    scores = graph.times(graph.add("MatMul", q, k), 1 / math.sqrt(head_dim))
    mixed = graph.add("MatMul", graph.add("Softmax", scores, axis=-1), v)
    return graph.reshape(graph.add("Transpose", mixed, perm=[0, 2, 1, 3]), -1, heads * head_dim)


def gelu(graph: Graph, x: Value) -> Value:
    """x Φ(x)."""
    curve = graph.add("Add", graph.add("Erf", graph.times(x, math.sqrt(0.5))), graph.floats(1.0))
    return graph.add("Mul", graph.times(x, 0.5), curve)


def gelu_tanh(graph: Graph, x: Value) -> Value:
    """x/2 (1 + tanh(√(2/π) (x + 0.044715 x³)))."""
    cube = graph.times(graph.add("Mul", graph.add("Mul", x, x), x), 0.044715)
    inside = graph.times(graph.add("Add", x, cube), math.sqrt(2 / math.pi))
    return graph.add("Mul", graph.times(x, 0.5), graph.add("Add", graph.add("Tanh", inside), graph.floats(1.0)))


def quick_gelu(graph: Graph, x: Value) -> Value:
    """x σ(1.702 x)."""
    return graph.add("Mul", x, graph.sigmoid(graph.times(x, 1.702)))


def silu(graph: Graph, x: Value) -> Value:
    """x σ(x)."""
    return graph.add("Mul", x, graph.sigmoid(x))
