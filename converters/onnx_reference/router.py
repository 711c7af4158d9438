"""The router of one layer: which experts a token goes to, and how much each of them counts.

Ties: of equal scores ONNX's TopK takes the lower id. llama.cpp sorts with ``std::sort``, whose order of equals is not
defined, and rounding in what comes before can turn any two scores that nearly tie. So each choice comes with its
margin: how far the last expert chosen is above the first one left out (and, with groups, the last group), in logits
where they alone choose, else in scores. Ids of two programs may differ where it is of the size of their rounding.
"""

from __future__ import annotations

import math

from converters.onnx_graph import INT64, Graph, Value
from converters.onnx_reference.settings import Gating, Settings

LEAST_SUM = 2.0**-14
"""What weights are divided by at least: the smallest normal number of F16, as in llama.cpp."""


def router_graph(settings: Settings, correction: bool, given: bool = False) -> Graph:
    """Input: ``x`` [n_tokens, n_embd]. Outputs: ids, weights [n_tokens, n_used] in the order of their scores, from the
    highest; margins [n_tokens].

    ``correction``: whether the layer has a bias that takes part in the choice alone. ``given``: there is a second
    input, ``given`` int64 [n_tokens, n_used], the weights are those of these experts, and a fourth output has the
    logits [n_tokens, n_expert].
    """
    graph, own = Graph("router"), settings.router
    x = graph.input("x", ("n_tokens", settings.n_embd))
    weight = graph.weight("ffn_gate_inp.weight", (own.n_expert, settings.n_embd))
    bias = graph.weight("ffn_gate_inp.bias", (own.n_expert,)) if settings.switches.router_bias else None
    logits = scores = graph.linear(x, weight, bias)
    if own.gating is Gating.SOFTMAX:
        scores = graph.add("Softmax", scores, axis=-1)
    elif own.gating is Gating.SIGMOID:
        scores = graph.sigmoid(scores)
    ranks, margins = scores, []
    if correction:
        ranks = graph.add("Add", scores, graph.weight("exp_probs_b.bias", (own.n_expert,)))
    if own.n_groups > 1:
        ranks, margin = _within_groups(graph, settings, ranks)
        margins.append(margin)
    logits_choose = own.gating is not Gating.SIGMOID and ranks is scores
    ids, margin = _top(graph, ranks, logits if logits_choose else ranks, own.n_used, own.n_expert)
    margins.append(margin)
    used = graph.input("given", ("n_tokens", own.n_used), INT64) if given else ids
    weights = graph.add("GatherElements", scores, used, axis=1)
    if own.gating is Gating.SOFTMAX_OF_CHOSEN:
        weights = graph.add("Softmax", weights, axis=-1)
    if own.normalised:
        total = graph.add("ReduceSum", weights, graph.integers(-1), keepdims=1)
        weights = graph.add("Div", weights, graph.add("Max", total, graph.floats(LEAST_SUM)))
    if own.scale != 1:
        weights = graph.add("Mul", weights, graph.floats(own.scale))
    graph.output(ids, "ids", ("n_tokens", own.n_used), INT64)
    graph.output(weights, "weights", ("n_tokens", own.n_used))
    graph.output(graph.reshape(graph.add("Min", *margins), -1), "margins", ("n_tokens",))
    if given:
        graph.output(logits, "logits", ("n_tokens", own.n_expert))
    return graph


def _top(graph: Graph, ranks: Value, unit: Value, n_used: int, n: int) -> tuple[Value, Value]:
    """Ids [n_tokens, n_used] of the highest of ``ranks`` [n_tokens, n], and margins [n_tokens, 1] in ``unit``."""
    _, ids = graph.add_several("TopK", 2, ranks, graph.integers(min(n_used + 1, n)), axis=-1)
    values = graph.add("GatherElements", unit, ids, axis=1)
    last = graph.slice(values, n_used - 1, n_used)
    if n == n_used:
        return ids, graph.filled(last, math.inf)
    return graph.slice(ids, 0, n_used), graph.add("Sub", last, graph.slice(values, n_used, n_used + 1))


def _within_groups(graph: Graph, settings: Settings, ranks: Value) -> tuple[Value, Value]:
    """``ranks`` with -inf outside the groups whose two best experts have the highest sum, and margins [n_tokens, 1]."""
    own = settings.router
    size = own.n_expert // own.n_groups
    grouped = graph.reshape(ranks, 0, own.n_groups, size)
    best, _ = graph.add_several("TopK", 2, grouped, graph.integers(2), axis=-1)
    sums = graph.add("ReduceSum", best, graph.integers(-1), keepdims=0)
    groups, margin = _top(graph, sums, sums, own.n_groups_used, own.n_groups)
    closed = graph.add("ScatterElements", graph.filled(sums, True), groups, graph.filled(groups, False), axis=1)
    closed = graph.reshape(closed, 0, own.n_groups, 1)
    masked = graph.add("Where", closed, graph.floats(-math.inf), grouped)
    return graph.reshape(masked, 0, own.n_expert), margin
