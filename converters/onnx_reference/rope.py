"""Rotary embedding: the sines and cosines of every position, and the nodes that turn heads with them.

Angles are computed in float64. llama.cpp multiplies them up pair by pair in float32, which differs by some 1e-7 of the
angle for each pair.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from converters.onnx_graph import Floats, Graph, Value
from converters.onnx_reference.settings import Pairs, Rope

Doubles = npt.NDArray[np.float64]

BETA_FAST, BETA_SLOW = 32.0, 1.0
"""Turns over the original context at which yarn's ramp begins and ends; llama.cpp reads no others here."""


def rotations(rope: Rope, n_tokens: int, factors: Floats | None) -> tuple[Floats, Floats]:
    """Cosines and sines [n_tokens, 1, n_rot / 2] of the positions from 0.

    ``factors`` [n_rot / 2] divide the angles (``rope_freqs.weight``).
    """
    n_pairs = rope.n_rot // 2
    frequencies = rope.freq_base ** (-np.arange(n_pairs, dtype=np.float64) / n_pairs)
    if factors is not None:
        frequencies = frequencies / factors.astype(np.float64)
    mscale = rope.attn_factor
    scaled = rope.freq_scale * frequencies
    if rope.ext_factor != 0:
        unscaled = _ramp(rope, n_pairs) * rope.ext_factor
        scaled = scaled * (1 - unscaled) + frequencies * unscaled
        mscale *= 1 + 0.1 * math.log(1 / rope.freq_scale)
    angles = np.arange(n_tokens, dtype=np.float64)[:, None] * (scaled * _turned(rope, n_pairs))
    cos, sin = (np.asarray(f(angles) * mscale, dtype=np.float32)[:, None, :] for f in (np.cos, np.sin))
    return cos, sin


def _ramp(rope: Rope, n_pairs: int) -> Doubles:
    """How much of each pair stays unscaled: 1 up to the first end, 0 from the second on. llama.cpp rounds the ends."""

    def pair_of(turns: float) -> float:
        return rope.n_rot * math.log(rope.n_ctx_orig / (turns * 2 * math.pi)) / (2 * math.log(rope.freq_base))

    low = max(0.0, math.floor(pair_of(BETA_FAST)))
    high = min(rope.n_rot - 1.0, math.ceil(pair_of(BETA_SLOW)))
    part: Doubles = (np.arange(n_pairs, dtype=np.float64) - low) / max(0.001, high - low)
    return 1 - part.clip(0, 1)


def _turned(rope: Rope, n_pairs: int) -> Doubles:
    """[n_pairs]: 1, or 0 for pairs of the fourth section: in text its position is 0, the others' are the token's."""
    if rope.sections is None:
        return np.ones(n_pairs)
    time, height, width, _ = rope.sections
    place = np.arange(n_pairs) % sum(rope.sections)
    # pairs take turns: time, height, width, until each has its number
    ends = np.array([3 * time, 3 * height, 3 * width])
    return np.asarray(place < ends[place % 3], dtype=np.float64)


def rotate(graph: Graph, x: Value, cos: Value, sin: Value, pairs: Pairs, n_head: int, width: int) -> Value:
    """``x`` [n_tokens, n_head, width] with all of every head turned."""
    if pairs is Pairs.HALVES:
        a, b = graph.slice(x, 0, width // 2), graph.slice(x, width // 2, width)
        return graph.add("Concat", *_turn(graph, a, b, cos, sin), axis=-1)
    paired = graph.reshape(x, 0, n_head, width // 2, 2)
    a, b = (graph.reshape(graph.slice(paired, at, at + 1), 0, n_head, width // 2) for at in (0, 1))
    turned = [graph.reshape(part, 0, n_head, width // 2, 1) for part in _turn(graph, a, b, cos, sin)]
    return graph.reshape(graph.add("Concat", *turned, axis=-1), 0, n_head, width)


def _turn(graph: Graph, a: Value, b: Value, cos: Value, sin: Value) -> tuple[Value, Value]:
    return (
        graph.add("Sub", graph.add("Mul", a, cos), graph.add("Mul", b, sin)),
        graph.add("Add", graph.add("Mul", a, sin), graph.add("Mul", b, cos)),
    )
