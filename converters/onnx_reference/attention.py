"""Attention of one layer, up to the residual, and the norm of what follows.

Heads share keys and values in groups; q and k may have biases and norms, heads may have sinks. Latent attention
(:mod:`converters.onnx_reference.latent`) comes down to one key and value that all heads share.
"""

from __future__ import annotations

import numpy as np

from converters.onnx_graph import Floats, Graph, Value
from converters.onnx_reference.latent import latent_queries_keys_values, latent_values
from converters.onnx_reference.rope import rotate
from converters.onnx_reference.settings import Norm, Settings


def attention_graph(settings: Settings) -> Graph:
    """Inputs: ``hidden`` [n_tokens, n_embd], ``cos`` and ``sin`` [n_tokens, 1, n_rot / 2], ``mask`` [n_tokens,
    n_tokens]. Outputs: the hidden states with the attention added, and their norm for the feed-forward part.
    """
    graph, own = Graph("attention"), settings.switches
    hidden = graph.input("hidden", ("n_tokens", settings.n_embd))
    cos, sin = (graph.input(name, ("n_tokens", 1, settings.rope.n_rot // 2)) for name in ("cos", "sin"))
    mask = graph.input("mask", ("n_tokens", "n_tokens"))
    x = graph.rms_norm(hidden, graph.weight("attn_norm.weight", (settings.n_embd,)), settings.eps)
    if settings.latent is None:
        q, k, v = _queries_keys_values(graph, settings, x, cos, sin)
        mixed = _attend(graph, settings, q, k, v, mask, settings.n_head_kv, settings.value_length)
        width = settings.value_length
    else:
        q, k, v = latent_queries_keys_values(graph, settings, settings.latent, x, cos, sin)
        mixed = _attend(graph, settings, q, k, v, mask, 1, settings.latent.kv_rank)
        mixed = latent_values(graph, settings, settings.latent, mixed)
        width = settings.latent.value
    joined = graph.reshape(graph.add("Transpose", mixed, perm=[1, 0, 2]), 0, settings.n_head * width)
    weight = graph.weight("attn_output.weight", (settings.n_embd, settings.n_head * width))
    bias = graph.weight("attn_output.bias", (settings.n_embd,)) if own.output_bias else None
    out = graph.linear(joined, weight, bias)
    if settings.residual_scale != 1:
        out = graph.add("Mul", out, graph.floats(settings.residual_scale))
    out = graph.add("Add", hidden, out)
    graph.output(out, "out", ("n_tokens", settings.n_embd))
    norm = graph.weight(own.ffn_norm, (settings.n_embd,))
    graph.output(graph.rms_norm(out, norm, settings.eps), "normed", ("n_tokens", settings.n_embd))
    return graph


def causal_mask(n_tokens: int, window: int) -> Floats:
    """[n_tokens, n_tokens]: 0 where a token (row) sees a position, -inf elsewhere; ``window`` 0 is all before it."""
    distance = np.arange(n_tokens)[:, None] - np.arange(n_tokens)[None, :]
    seen = (distance >= 0) & ((distance < window) if window else True)
    return np.where(seen, np.float32(0), np.float32(-np.inf))


def _queries_keys_values(
    graph: Graph, settings: Settings, x: Value, cos: Value, sin: Value
) -> tuple[Value, Value, Value]:
    """[n_tokens, heads, width] each."""
    own, found = settings.switches, []
    for name, n_head, width in (
        ("q", settings.n_head, settings.key_length),
        ("k", settings.n_head_kv, settings.key_length),
        ("v", settings.n_head_kv, settings.value_length),
    ):
        weight = graph.weight(f"attn_{name}.weight", (n_head * width, settings.n_embd))
        bias = graph.weight(f"attn_{name}.bias", (n_head * width,)) if own.qkv_bias else None
        part = graph.linear(x, weight, bias)
        normed = name != "v"
        if normed and own.qk_norm is Norm.WHOLE:
            part = graph.rms_norm(part, graph.weight(f"attn_{name}_norm.weight", (n_head * width,)), settings.eps)
        part = graph.reshape(part, 0, n_head, width)
        if normed and own.qk_norm is Norm.HEAD:
            part = graph.rms_norm(part, graph.weight(f"attn_{name}_norm.weight", (width,)), settings.eps)
        found.append(rotate(graph, part, cos, sin, own.pairs, n_head, width) if normed else part)
    return found[0], found[1], found[2]


def _attend(
    graph: Graph, settings: Settings, q: Value, k: Value, v: Value, mask: Value, n_head_kv: int, value_length: int
) -> Value:
    """[n_head, n_tokens, value_length] of q [n_tokens, n_head, width], k and v [n_tokens, n_head_kv, width]."""
    n_group = settings.n_head // n_head_kv
    # heads of one key and value behind one another: [n_head_kv, n_group, n_tokens, width]
    tokens = graph.add("Shape", mask, start=0, end=1)
    apart = graph.add("Concat", graph.integers(n_head_kv, n_group), tokens, graph.integers(-1), axis=0)
    q = graph.add("Reshape", graph.add("Transpose", q, perm=[1, 0, 2]), apart)
    k = graph.add("Unsqueeze", graph.add("Transpose", k, perm=[1, 2, 0]), graph.integers(1))
    v = graph.add("Unsqueeze", graph.add("Transpose", v, perm=[1, 0, 2]), graph.integers(1))
    scores = graph.add("Mul", graph.add("MatMul", q, k), graph.floats(settings.kq_scale))
    scores = graph.add("Add", scores, mask)
    if settings.switches.sinks:
        # a score of its own for each head, of no value
        sinks = graph.reshape(graph.weight("attn_sinks.weight", (settings.n_head,)), n_head_kv, n_group, 1, 1)
        column = graph.add("Concat", graph.integers(n_head_kv, n_group), tokens, graph.integers(1), axis=0)
        scores = graph.add("Concat", graph.add("Expand", sinks, column), scores, axis=-1)
        shares = graph.slice(graph.add("Softmax", scores, axis=-1), 1, 2**62)
    else:
        shares = graph.add("Softmax", scores, axis=-1)
    joined = graph.add("Concat", graph.integers(settings.n_head), tokens, graph.integers(value_length), axis=0)
    return graph.add("Reshape", graph.add("MatMul", shares, v), joined)
