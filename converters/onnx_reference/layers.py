"""The graphs of a model, which tensors feed them, and whether the file has these and no others."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from converters.onnx_graph import Array, Floats, Graph, Session, Shape
from converters.onnx_reference.attention import attention_graph
from converters.onnx_reference.experts import (
    expert_graph,
    feed_forward_graph,
    head_graph,
    join_graph,
    shared_graph,
)
from converters.onnx_reference.router import router_graph
from converters.onnx_reference.settings import Settings
from converters.onnx_reference.weights import Weights
from mopeq_edge.errors import FormatError, SourceError

EMBEDDING, OUTPUT, ROPE_FACTORS = "token_embd.weight", "output.weight", "rope_freqs.weight"
CORRECTION = "exp_probs_b.bias"
_FUSED = "ffn_gate_up_exps.weight"
_BLOCK = re.compile(r"blk\.([0-9]+)\.")


class Part:
    """A graph whose weights are those of any layer, with the session that is opened when it first runs."""

    def __init__(self, graph: Graph, threads: int) -> None:
        self.graph, self._threads = graph, threads
        self._session: Session | None = None

    def run(self, weights: Weights, prefix: str, **inputs: Array) -> list[Array]:
        """The outputs for ``inputs``, with the weights that begin with ``prefix``."""
        own = {name: weights.whole(prefix + name) for name in self.graph.weights}
        return self.run_with({**own, **inputs})

    def run_with(self, feeds: dict[str, Array]) -> list[Array]:
        """The same with all of the inputs given."""
        if self._session is None:
            self._session = self.graph.session(self._threads)
        return self._session.run(feeds)


@dataclass(frozen=True)
class Parts:
    """The graphs of a model; two routers, without and with a bias that chooses."""

    attention: Part
    routers: tuple[Part, Part]
    shared: Part | None
    dense: Part
    expert: Part
    join: Part
    head: Part


def make_parts(settings: Settings, threads: int, given: bool = False) -> Parts:
    """Build them all; nothing is opened yet. ``given``: see :func:`router_graph`."""
    shared = shared_graph(settings)
    return Parts(
        attention=Part(attention_graph(settings), threads),
        routers=(
            Part(router_graph(settings, False, given), threads),
            Part(router_graph(settings, True, given), threads),
        ),
        shared=None if shared is None else Part(shared, threads),
        dense=Part(feed_forward_graph(settings, "", settings.n_ff), threads),
        expert=Part(expert_graph(settings), threads),
        join=Part(join_graph(settings), threads),
        head=Part(head_graph(settings), threads),
    )


def check_tensors(settings: Settings, parts: Parts, weights: Weights) -> None:
    """Raise :class:`FormatError` for a tensor that is missing or has another shape, and :class:`SourceError` for one
    that the reference would leave out. Layers that predict further tokens are left out by llama.cpp too.
    """
    found = weights.shapes
    expected = dict(_expected(settings, parts, weights))
    for name, shape in expected.items():
        ggml = _trimmed(shape[::-1])
        if name not in found:
            raise FormatError(
                f"{weights.path}: tensor '{name}' is missing, expected one of shape {list(ggml)}; convert it again"
            )
        if found[name] != ggml:
            raise FormatError(
                f"{weights.path}: tensor '{name}' has shape {list(found[name])}, expected {list(ggml)}; "
                "convert it again"
            )
    for name in found:
        block = _BLOCK.match(name)
        if name not in expected and not (block and int(block[1]) >= settings.n_layer):
            raise SourceError(
                f"{weights.path}: tensor '{name}' is none that the ONNX reference computes an {settings.architecture} "
                "with; it can check files as mopeq-edge and llama.cpp's converter write them"
            )


def expert_feeds(parts: Parts, weights: Weights, layer: int, expert: int) -> dict[str, Floats]:
    """The weights of one expert by the names that its graph has for them."""
    feeds: dict[str, Floats] = {}
    prefix = f"blk.{layer}."
    fused = prefix + _FUSED
    if fused in weights.shapes:
        both = weights.expert(fused, expert)
        half = len(both) // 2
        feeds = {"ffn_gate_exps.weight": both[:half], "ffn_up_exps.weight": both[half:]}
    for name in parts.expert.graph.weights:
        if name.endswith(".bias"):
            feeds[name] = weights.rows(prefix + name, expert, 1)[0]
        elif name not in feeds:
            feeds[name] = weights.expert(prefix + name, expert)
    return feeds


def output_name(settings: Settings, weights: Weights) -> str:
    """The tensor of the output matrix."""
    return EMBEDDING if settings.switches.tied and OUTPUT not in weights.shapes else OUTPUT


def rope_factors(settings: Settings, weights: Weights) -> Floats | None:
    """[n_rot / 2], if the file has them."""
    if settings.switches.rope_factors and ROPE_FACTORS in weights.shapes:
        return weights.whole(ROPE_FACTORS)
    return None


def _expected(settings: Settings, parts: Parts, weights: Weights) -> Iterator[tuple[str, Shape]]:
    """(name, shape in numpy's order) of every tensor that will be read."""
    for name in dict.fromkeys((EMBEDDING, output_name(settings, weights))):
        yield name, (settings.n_vocab, settings.n_embd)
    yield from parts.head.graph.weights.items()
    if rope_factors(settings, weights) is not None:
        yield ROPE_FACTORS, (settings.rope.n_rot // 2,)
    for layer in range(settings.n_layer):
        prefix = f"blk.{layer}."
        graphs = [parts.attention.graph]
        if not settings.has_experts(layer):
            graphs.append(parts.dense.graph)
        else:
            graphs.append(router_of(parts, weights, layer).graph)
            graphs += [] if parts.shared is None else [parts.shared.graph]
            yield from _stacks(settings, parts, weights, prefix)
        for graph in graphs:
            yield from ((prefix + name, shape) for name, shape in graph.weights.items())


def router_of(parts: Parts, weights: Weights, layer: int) -> Part:
    """The router of a layer; whether it has a correction is for the file to say, as for llama.cpp."""
    return parts.routers[f"blk.{layer}.{CORRECTION}" in weights.shapes]


def _stacks(settings: Settings, parts: Parts, weights: Weights, prefix: str) -> Iterator[tuple[str, Shape]]:
    own = dict(parts.expert.graph.weights)
    if settings.switches.fused and prefix + _FUSED in weights.shapes:
        del own["ffn_gate_exps.weight"], own["ffn_up_exps.weight"]
        own[_FUSED] = (2 * settings.n_ff_exp, settings.n_embd)
    for name, shape in own.items():
        yield prefix + name, (settings.router.n_expert, *shape)


def _trimmed(shape: Shape) -> Shape:
    while len(shape) > 1 and shape[-1] == 1:
        shape = shape[:-1]
    return shape


def embedding(weights: Weights, tokens: Array, scale: float) -> Floats:
    """[n_tokens, n_embd]; only the rows of these tokens are read."""
    ids, places = np.unique(tokens, return_inverse=True)
    rows = np.concatenate([weights.rows(EMBEDDING, int(i), 1) for i in ids])
    return np.ascontiguousarray(rows[places] * np.float32(scale))
