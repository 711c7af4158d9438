"""The feed-forward parts: experts one at a time, the shared expert, dense layers, and the sum behind them."""

from __future__ import annotations

from converters.onnx_graph import INT64, Graph, Value
from converters.onnx_reference.settings import Settings, Shared

ALPHA, LIMIT = 1.702, 7.0
"""Of gpt-oss's activation; no file says them."""


def feed_forward_graph(settings: Settings, suffix: str, n_ff: int, gated: bool = False) -> Graph:
    """Input: ``x`` [n_tokens, n_embd]. Output: the same shape.

    ``suffix`` is what its tensors' names have behind gate, up and down: nothing in a dense layer. ``gated``: times the
    sigmoid of a number that the token gives.
    """
    graph, n_embd = Graph(f"feed forward{suffix}"), settings.n_embd
    x = graph.input("x", ("n_tokens", n_embd))
    gate, up = (graph.linear(x, graph.weight(f"ffn_{name}{suffix}.weight", (n_ff, n_embd))) for name in ("gate", "up"))
    out = graph.linear(_swiglu(graph, gate, up), graph.weight(f"ffn_down{suffix}.weight", (n_embd, n_ff)))
    if gated:
        row = graph.reshape(graph.weight(f"ffn_gate_inp{suffix}.weight", (n_embd,)), 1, n_embd)
        out = graph.add("Mul", out, graph.sigmoid(graph.linear(x, row)))
    graph.output(out, "out", ("n_tokens", n_embd))
    return graph


def shared_graph(settings: Settings) -> Graph | None:
    """The shared expert, if there is one."""
    if settings.n_ff_shared == 0:
        return None
    gated = settings.switches.shared is Shared.GATED
    return feed_forward_graph(settings, "_shexp", settings.n_ff_shared, gated)


def expert_graph(settings: Settings) -> Graph:
    """Inputs: ``x`` and ``sum`` [n_tokens, n_embd]; ``rows`` [n] (different ones) and ``share`` [n, 1] of the tokens
    that go to this expert. Output: the sum with what the expert makes of them added.
    """
    graph, n_embd, n_ff, own = Graph("expert"), settings.n_embd, settings.n_ff_exp, settings.switches
    x, total = (graph.input(name, ("n_tokens", n_embd)) for name in ("x", "sum"))
    rows, share = graph.input("rows", ("n",), INT64), graph.input("share", ("n", 1))

    def matrix(name: str, n_out: int, n_in: int, value: Value) -> Value:
        weight = graph.weight(f"ffn_{name}_exps.weight", (n_out, n_in))
        bias = graph.weight(f"ffn_{name}_exps.bias", (n_out,)) if own.expert_bias else None
        return graph.linear(value, weight, bias)

    chosen = graph.add("Gather", x, rows, axis=0)
    gate, up = matrix("gate", n_ff, n_embd, chosen), matrix("up", n_ff, n_embd, chosen)
    inner = _clamped_swiglu(graph, gate, up) if own.clamped else _swiglu(graph, gate, up)
    out = graph.add("Mul", matrix("down", n_embd, n_ff, inner), share)
    places = graph.reshape(rows, -1, 1)
    graph.output(graph.add("ScatterND", total, places, out, reduction="add"), "out", ("n_tokens", n_embd))
    return graph


def join_graph(settings: Settings) -> Graph:
    """Inputs: ``hidden`` and ``sum`` [n_tokens, n_embd]. Output: the hidden states behind the layer."""
    graph = Graph("join")
    hidden, total = (graph.input(name, ("n_tokens", settings.n_embd)) for name in ("hidden", "sum"))
    if settings.residual_scale != 1:
        total = graph.add("Mul", total, graph.floats(settings.residual_scale))
    graph.output(graph.add("Add", hidden, total), "out", ("n_tokens", settings.n_embd))
    return graph


def head_graph(settings: Settings) -> Graph:
    """Inputs: ``hidden`` [n_tokens, n_embd], ``rows`` [n_rows, n_embd] of the output matrix. Output: their logits."""
    graph = Graph("head")
    hidden = graph.input("hidden", ("n_tokens", settings.n_embd))
    rows = graph.input("rows", ("n_rows", settings.n_embd))
    x = graph.rms_norm(hidden, graph.weight("output_norm.weight", (settings.n_embd,)), settings.eps)
    logits = graph.linear(x, rows)
    if settings.logit_scale != 1:
        logits = graph.add("Div", logits, graph.floats(settings.logit_scale))
    graph.output(logits, "logits", ("n_tokens", "n_rows"))
    return graph


def _swiglu(graph: Graph, gate: Value, up: Value) -> Value:
    """up * gate * sigmoid(gate)"""
    return graph.add("Mul", graph.add("Mul", gate, graph.sigmoid(gate)), up)


def _clamped_swiglu(graph: Graph, gate: Value, up: Value) -> Value:
    """(up + 1) gate sigmoid(alpha gate), gate cut off above the limit and up on both sides."""
    gate = graph.add("Min", gate, graph.floats(LIMIT))
    up = graph.add("Clip", up, graph.floats(-LIMIT), graph.floats(LIMIT))
    sigmoid = graph.sigmoid(graph.add("Mul", gate, graph.floats(ALPHA)))
    return graph.add("Mul", graph.add("Mul", gate, sigmoid), graph.add("Add", up, graph.floats(1.0)))
