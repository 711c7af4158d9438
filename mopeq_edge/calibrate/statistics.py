"""Sums over calibration tokens, in float64 and in a fixed order, and the artifact that keeps them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from mopeq_edge.array_file import read_arrays, refusing, write_arrays
from mopeq_edge.errors import shown
from mopeq_edge.imatrix import Entry, Imatrix, with_prior
from mopeq_edge.json_file import is_count
from mopeq_edge.source.model import Source
from mopeq_edge.source.roles import Role, layer_of, projection_of

Doubles = npt.NDArray[np.float64]

FORMAT, VERSION = "mopeq-edge routing", "1"

TEXT, VISION = "text", "vision"
KINDS = (TEXT, VISION)
"""Kinds of tokens: what the embedding matrix looked up, and what a picture became."""


@dataclass
class Sums:
    """Weighted sums of squared inputs of every matrix: ``values[name]`` [n_matrices, n_in], and tokens."""

    values: dict[str, Doubles] = field(default_factory=dict)
    counts: dict[str, Doubles] = field(default_factory=dict)

    def add(self, name: str, n_matrices: int, matrix: int, squares: Doubles, n_tokens: int) -> None:
        """Add ``squares`` [n_in], already summed over ``n_tokens`` tokens, to one matrix of ``name``."""
        if name not in self.values:
            self.values[name] = np.zeros((n_matrices, squares.shape[0]))
            self.counts[name] = np.zeros(n_matrices)
        self.values[name][matrix] += squares
        self.counts[name][matrix] += n_tokens

    def merge(self, other: Sums) -> None:
        """Add all of ``other``. Merged in window order, the result does not depend on threads."""
        for name, values in other.values.items():
            if name not in self.values:
                self.values[name] = np.zeros_like(values)
                self.counts[name] = np.zeros_like(other.counts[name])
            self.values[name] += values
            self.counts[name] += other.counts[name]

    def scaled(self, factor: float) -> Sums:
        """A copy with sums and tokens times ``factor``."""
        return Sums(*({name: own * factor for name, own in found.items()} for found in (self.values, self.counts)))

    def entries(self, scale: float = 1.0) -> tuple[dict[str, Entry], tuple[str, ...]]:
        """Imatrix entries (sums divided by ``scale``) with the prior for never-routed experts."""
        raw = {
            name: Entry((values / scale).astype(np.float32), self.counts[name].astype(np.float32))
            for name, values in self.values.items()
        }
        return with_prior(raw)


@dataclass
class Tally:
    """What was summed over tokens of one kind; ``gate_weights[layer]`` [n_expert]."""

    activation: Sums = field(default_factory=Sums)
    gradient: Sums = field(default_factory=Sums)
    gate_weights: dict[int, Doubles] = field(default_factory=dict)

    def merge(self, other: Tally) -> None:
        """Add all of ``other``."""
        self.activation.merge(other.activation)
        self.gradient.merge(other.gradient)
        for layer, weights in other.gate_weights.items():
            self.add_gate_weights(layer, weights)

    def add_gate_weights(self, layer: int, weights: Doubles) -> None:
        """Add ``weights`` [n_expert]."""
        self.gate_weights[layer] = self.gate_weights.get(layer, 0.0) + weights

    def scaled(self, factor: float) -> Tally:
        """A copy with everything times ``factor``."""
        weights = {layer: own * factor for layer, own in self.gate_weights.items()}
        return Tally(self.activation.scaled(factor), self.gradient.scaled(factor), weights)


Tallies = Mapping[str, Tally]
"""By kind of token."""


def new_tallies() -> Tallies:
    """Nothing of any kind yet."""
    return {kind: Tally() for kind in KINDS}


@dataclass(frozen=True)
class Routing:
    """What the router did with the calibration text.

    ``counts[layer]`` and ``gate_weights[layer]`` [n_expert]: tokens sent to each expert and the sum of
    their gate weights. ``token_counts`` [n_vocab]: how often each token id was read.
    """

    n_tokens: int
    counts: Mapping[int, Doubles]
    gate_weights: Mapping[int, Doubles]
    token_counts: Doubles

    def unrouted(self) -> list[tuple[int, int]]:
        """(layer, expert) that no token reached."""
        return [(layer, int(e)) for layer, c in sorted(self.counts.items()) for e in np.flatnonzero(c == 0)]


def write_routing(routing: Routing, path: Path, made_from: str) -> None:
    """Write ``routing`` as safetensors; ``made_from`` is the hash of what it was measured on."""
    arrays: dict[str, npt.NDArray[np.generic]] = {"token_counts": routing.token_counts}
    for layer in sorted(routing.counts):
        arrays[f"blk.{layer}.counts"] = routing.counts[layer]
        if layer in routing.gate_weights:
            arrays[f"blk.{layer}.gate_weights"] = routing.gate_weights[layer]
    write_arrays(path, FORMAT, VERSION, {"made_from": made_from, "n_tokens": routing.n_tokens}, arrays)


def read_routing(path: Path) -> Routing:
    """Read what :func:`write_routing` wrote. Raises :class:`FormatError` for anything else."""
    again = "calibrate again"
    info, arrays = read_arrays(path, FORMAT, VERSION, again)
    with refusing(path, FORMAT, again):
        layers = sorted(int(key.split(".")[1]) for key in arrays if key.endswith(".counts"))
        if not is_count(info["n_tokens"]):
            raise ValueError(f"n_tokens is {shown(info['n_tokens'])}")
        counts = {n: arrays[f"blk.{n}.counts"] for n in layers}
        weights = {n: arrays[f"blk.{n}.gate_weights"] for n in layers if f"blk.{n}.gate_weights" in arrays}
        if any(array.ndim != 1 or (array < 0).any() for array in (arrays["token_counts"], *counts.values())):
            raise ValueError("counts are no vectors of numbers that are not negative")
        if any(found.shape != counts[n].shape for n, found in weights.items()):
            raise ValueError("gate weights are of another shape than the counts")
        return Routing(info["n_tokens"], counts, weights, arrays["token_counts"])


def routing_from_imatrix(imatrix: Imatrix, source: Source, token_counts: Doubles | None = None) -> Routing:
    """Routing as far as an imatrix tells: its counts; gate weights are unknown and left out.

    Without ``token_counts`` [n_vocab] every token counts the same.
    """
    unrouted = set(imatrix.unrouted)
    counts: dict[int, Doubles] = {}
    for name, entry in imatrix.entries.items():
        layer, projection = layer_of(name), projection_of(name)
        if layer is not None and projection is not None:
            seen = np.array([f"{name}[{expert}]" not in unrouted for expert in range(len(entry.counts))])
            counts[layer] = np.where(seen, entry.counts, 0.0).astype(np.float64)
    if token_counts is None:
        vocabulary = next(t for t in source.tensors if t.role is Role.EMBEDDING)
        token_counts = np.zeros(vocabulary.n_out)
    return Routing(imatrix.n_tokens, counts, {}, token_counts)
