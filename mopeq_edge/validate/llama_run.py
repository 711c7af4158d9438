"""What llama.cpp says to a text: logits of the batch and token by token, and what its routers chose."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mopeq_edge.binding import Floats, LlamaModel, Tokens
from mopeq_edge.graph_nodes import NodeReader

Array = npt.NDArray[Any]

CHOSEN, PROBS, OF_CHOSEN = "ffn_moe_topk", "ffn_moe_probs", "ffn_moe_weights_softmax"
_LOGITS = ("ffn_moe_logits", "ffn_moe_logits_biased")
_WEIGHTS = tuple(f"ffn_moe_weights{step}" for step in ("", "_softmax", "_norm", "_scaled"))
"""In the order in which a graph has them; the last one of a layer is what the experts' outputs are multiplied with."""

_NODE = re.compile(r"^(\w+)-(\d+)$")
_WANTED = frozenset((CHOSEN, PROBS, *_LOGITS, *_WEIGHTS))


@dataclass(frozen=True)
class LlamaRouted:
    """One layer's router: ``ids`` int32 and ``weights`` float32 [n_tokens, n_used], ``logits`` [n_tokens, n_expert]."""

    ids: Array
    weights: Floats
    logits: Floats


@dataclass(frozen=True)
class LlamaRun:
    """``logits`` and ``stepped`` (decoded a token at a time) [n_tokens, n_vocab]; ``routed`` of the batch by layer."""

    logits: Floats
    stepped: Floats
    routed: Mapping[int, LlamaRouted]


def run_llama(path: Path, tokens: Tokens, *, threads: int, n_gpu_layers: int = 0) -> LlamaRun:
    """Run ``path`` plainly (F32 cache, no flash attention) on ``tokens`` [n_tokens].

    Raises :class:`MopeqError` if llama.cpp cannot.
    """
    found: dict[int, dict[str, list[Array]]] = {}

    def receive(name: str, values: Array) -> None:
        match = _NODE.match(name)
        if match is not None:
            found.setdefault(int(match[2]), {}).setdefault(match[1], []).append(values)

    reader = NodeReader(_wanted, receive)
    n = len(tokens)
    with LlamaModel(
        path, n_ctx=n, n_batch=n, n_threads=threads, n_gpu_layers=n_gpu_layers, plain=True, nodes=reader
    ) as model:
        logits = model.logits(tokens)
        routed = {layer: _routed(nodes, n) for layer, nodes in sorted(found.items()) if CHOSEN in nodes}
        stepped = model.step_logits(tokens)
    return LlamaRun(logits, stepped, routed)


def _wanted(name: str) -> bool:
    match = _NODE.match(name)
    return match is not None and match[1] in _WANTED


def _routed(pieces: Mapping[str, list[Array]], n_tokens: int) -> LlamaRouted:
    # a batch is computed in several graphs if it is long
    nodes = {name: np.concatenate([values.reshape(-1) for values in own]) for name, own in pieces.items()}
    weights = next(nodes[name] for name in reversed(_WEIGHTS) if name in nodes)
    # where the softmax goes over the chosen experts alone, the logits are the probabilities, and called so
    names = (PROBS,) if OF_CHOSEN in nodes else _LOGITS[::-1]
    logits = next(nodes[name] for name in names if name in nodes)
    ids = nodes[CHOSEN].reshape(n_tokens, -1)
    return LlamaRouted(ids, np.asarray(weights.reshape(n_tokens, -1), np.float32), logits.reshape(n_tokens, -1))
