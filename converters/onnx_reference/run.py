"""The whole model, layer by layer: tokens in, logits and routed experts out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from converters.onnx_graph import Array, Floats
from converters.onnx_reference.attention import causal_mask
from converters.onnx_reference.layers import (
    Parts,
    check_tensors,
    embedding,
    expert_feeds,
    make_parts,
    output_name,
    rope_factors,
    router_of,
)
from converters.onnx_reference.read_settings import read_settings
from converters.onnx_reference.rope import rotations
from converters.onnx_reference.settings import Settings
from converters.onnx_reference.weights import Weights
from mopeq_edge.errors import FormatError, SourceError
from mopeq_edge.progress import Progress, SilentProgress
from mopeq_edge.split import read_parts

Ints = npt.NDArray[np.int32]

HEAD_WEIGHTS = 1 << 24
"""Weights of the output matrix that are in float32 at once."""


@dataclass(frozen=True)
class Routed:
    """What a layer's router chose for n_tokens tokens.

    ``ids`` int32 and ``weights`` float32 [n_tokens, n_used]: the experts by their scores in the choice, from the
    highest, and what the outputs of ``used`` are multiplied with. ``margins`` float32 [n_tokens]: how far the choice is
    from another one, in logits or scores (:mod:`converters.onnx_reference.router` on ties). ``used``: the experts that
    were computed, ``ids`` unless they were given; only then there are ``logits`` float32 [n_tokens, n_expert].
    """

    ids: Ints
    weights: Floats
    margins: Floats
    used: Ints
    logits: Floats | None = None


@dataclass(frozen=True)
class ReferenceResult:
    """``logits`` float32 [n_tokens, n_vocab]; ``routed`` by the number of the layer, of those that have experts."""

    logits: Floats
    routed: Mapping[int, Routed]


def run_reference(
    path: Path,
    tokens: npt.ArrayLike,
    *,
    threads: int = 1,
    progress: Progress | None = None,
    routing: Mapping[int, Ints] | None = None,
) -> ReferenceResult:
    """What the GGUF ``path`` (any layout; the first file of a split one) says to the text ``tokens`` [n_tokens].

    Computed in float32 by onnxruntime with ``threads`` threads, from weights that gguf-py dequantized; in memory are
    one layer's attention or one expert at a time. Settings and quirks are those of llama.cpp with that file.
    ``routing``: experts [n_tokens, n_used] of every layer that has some, computed instead of the router's choice (which
    the result has all the same): two programs that choose differently in a tie can then be compared behind it.

    Raises :class:`SourceError` for what the reference does not compute, and :class:`FormatError` for a file that is
    damaged, lacks a tensor or has one of another shape. Raises :class:`ValueError` for a ``routing`` of another shape.
    """
    headers = read_parts(path)
    settings = read_settings(*headers)
    weights = Weights(headers)
    parts = make_parts(settings, threads, routing is not None)
    check_tensors(settings, parts, weights)
    ids = _checked(path, tokens, settings)
    given = None if routing is None else _checked_routing(routing, len(ids), settings)
    with (progress or SilentProgress()).step("ONNX reference", settings.n_layer + 1, "layers") as step:
        hidden = embedding(weights, ids, settings.embedding_scale)
        routed: dict[int, Routed] = {}
        for layer in range(settings.n_layer):
            hidden, chosen = run_layer(settings, parts, weights, layer, hidden, given)
            if not np.isfinite(hidden).all():
                raise FormatError(
                    f"{path}: layer {layer} (tensors 'blk.{layer}.*') gives numbers that are not finite; "
                    "its weights are damaged, make it again"
                )
            if chosen is not None:
                routed[layer] = chosen
            step.advance()
        logits = _logits(settings, parts, weights, hidden)
        step.advance()
    return ReferenceResult(logits, routed)


def run_layer(
    settings: Settings,
    parts: Parts,
    weights: Weights,
    layer: int,
    hidden: Floats,
    given: Mapping[int, Ints] | None = None,
) -> tuple[Floats, Routed | None]:
    """The hidden states [n_tokens, n_embd] behind a layer, and what its router chose, if it has one.

    ``given``: see :func:`run_reference`.
    """
    n_tokens, prefix, window = len(hidden), f"blk.{layer}.", settings.windows[layer]
    rope = settings.windowed_rope if window else settings.rope
    cos, sin = rotations(rope, n_tokens, rope_factors(settings, weights))
    mask = causal_mask(n_tokens, window)
    hidden, x = parts.attention.run(weights, prefix, hidden=hidden, cos=cos, sin=sin, mask=mask)
    chosen = None
    if not settings.has_experts(layer):
        total = parts.dense.run(weights, prefix, x=x)[0]
    else:
        more = {} if given is None else {"given": given[layer].astype(np.int64)}
        found = router_of(parts, weights, layer).run(weights, prefix, x=x, **more)
        ids = found[0].astype(np.int32)
        if given is None:
            chosen = Routed(ids, found[1], found[2], ids)
        else:
            chosen = Routed(ids, found[1], found[2], given[layer], found[3])
        total = np.zeros_like(x) if parts.shared is None else parts.shared.run(weights, prefix, x=x)[0]
        total = _add_experts(parts, weights, layer, x, total, chosen)
    return parts.join.run_with({"hidden": hidden, "sum": total})[0], chosen


def _add_experts(parts: Parts, weights: Weights, layer: int, x: Array, total: Array, chosen: Routed) -> Array:
    """One expert after the other, of those that some token goes to."""
    for expert in np.unique(chosen.used).tolist():
        rows, slots = np.nonzero(chosen.used == expert)
        share = chosen.weights[rows, slots][:, None]
        feeds = expert_feeds(parts, weights, layer, expert)
        total = parts.expert.run_with({**feeds, "x": x, "sum": total, "rows": rows, "share": share})[0]
    return total


def _logits(settings: Settings, parts: Parts, weights: Weights, hidden: Floats) -> Floats:
    name = output_name(settings, weights)
    step = max(1, HEAD_WEIGHTS // settings.n_embd)
    logits = np.empty((len(hidden), settings.n_vocab), dtype=np.float32)
    for first in range(0, settings.n_vocab, step):
        rows = weights.rows(name, first, min(step, settings.n_vocab - first))
        logits[:, first : first + len(rows)] = parts.head.run(weights, "", hidden=hidden, rows=rows)[0]
    return logits


def _checked(path: Path, tokens: npt.ArrayLike, settings: Settings) -> npt.NDArray[np.int64]:
    ids = np.asarray(tokens)
    if ids.ndim != 1 or not len(ids) or not np.issubdtype(ids.dtype, np.integer):
        raise ValueError(f"expected one row of token ids, got {ids.dtype} of shape {ids.shape}")
    outside = ids[(ids < 0) | (ids >= settings.n_vocab)]
    if len(outside):
        raise SourceError(f"{path}: has {settings.n_vocab} tokens, expected ids below that, found {outside[0]}")
    return ids.astype(np.int64)


def _checked_routing(routing: Mapping[int, Ints], n_tokens: int, settings: Settings) -> Mapping[int, Ints]:
    shape = (n_tokens, settings.router.n_used)
    for layer in range(settings.n_layer):
        if not settings.has_experts(layer):
            continue
        ids = routing.get(layer)
        if ids is None or ids.shape != shape or ids.min() < 0 or ids.max() >= settings.router.n_expert:
            found = None if ids is None else ids.shape
            n = settings.router.n_expert
            raise ValueError(f"routing of layer {layer}: expected ids {shape} from 0 to {n - 1}, got {found}")
    return {layer: ids.astype(np.int32) for layer, ids in routing.items()}
