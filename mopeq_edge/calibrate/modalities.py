"""Statistics of text and of pictures, kept apart, and how they become one. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mopeq_edge.array_file import Arrays, read_arrays, refusing, write_arrays
from mopeq_edge.calibrate.statistics import KINDS, TEXT, VISION, Doubles, Routing, Sums, Tallies, Tally
from mopeq_edge.imatrix import GRADIENT, Imatrix
from mopeq_edge.json_file import Check, is_count, is_texts, require
from mopeq_edge.sensitivity.pricing import Statistics
from mopeq_edge.source.roles import layer_of
from mopeq_edge.units import plural

FORMAT, VERSION = "mopeq-edge modalities", "1"

DEFAULT_WEIGHT = 0.5
"""Share of the tokens of pictures: what is measured then depends on neither how many pictures nor how much text."""

_DOWN = "ffn_down_exps"


@dataclass(frozen=True)
class Modalities:
    """A calibration: sums by kind of token, of ``n_windows`` windows with at most ``n_ctx`` tokens of text.

    ``n_tokens`` by kind; ``token_counts`` [n_vocab]: how often each id was looked up. ``fisher``: there was a backward
    pass. ``datasets`` names the text, and then the folder of pictures.
    """

    tallies: Tallies
    n_tokens: Mapping[str, int]
    token_counts: Doubles
    datasets: tuple[str, ...]
    n_windows: int
    n_ctx: int
    n_pictures: int
    fisher: bool

    def factors(self, weight: float | None) -> dict[str, float]:
        """What each kind's tokens count so that pictures have the share ``weight`` and the sum stays; None: 1 each."""
        n = self.n_tokens
        if weight is None or not (n[TEXT] and n[VISION]):
            return dict.fromkeys(KINDS, 1.0)
        total = n[TEXT] + n[VISION]
        return {TEXT: (1 - weight) * total / n[TEXT], VISION: weight * total / n[VISION]}

    def statistics(self, weight: float | None = None) -> Statistics:
        """Both kinds as one: every sum and every count times its kind's factor."""
        whole = self.tallies[TEXT]
        if self.n_tokens[VISION]:
            whole = Tally()
            for kind, factor in self.factors(weight).items():
                whole.merge(self.tallies[kind].scaled(factor))
        entries, unrouted = whole.activation.entries()
        activation = Imatrix(entries, self.datasets, self.n_windows, self.n_ctx, unrouted=unrouted)
        routing = Routing(
            n_tokens=sum(self.n_tokens.values()),
            counts=_expert_counts(whole.activation),
            gate_weights=whole.gate_weights,
            token_counts=self.token_counts,
        )
        return Statistics(activation, self._gradient(whole) if self.fisher else None, routing)

    def _gradient(self, whole: Tally) -> Imatrix:
        """Scaled so that the mean weight is 1: the quantizers work in float32 and raw gradients are tiny."""
        gradients = Sums(dict(whole.gradient.values), dict(whole.gradient.counts))
        for name, values in whole.activation.values.items():
            # a stack with experts that no gradient reached still needs its shape
            if name in gradients.values or "_exps." not in name:
                continue
            gradients.values[name], gradients.counts[name] = np.zeros_like(values), np.zeros(len(values))
        total = sum(float(v.sum()) for v in gradients.values.values())
        weights = sum(float(gradients.counts[name].sum()) * v.shape[1] for name, v in gradients.values.items())
        scale = total / weights if total > 0 else 1.0
        entries, unrouted = gradients.entries(scale)
        return Imatrix(
            entries, self.datasets, self.n_windows, self.n_ctx, kind=GRADIENT, scale=scale, unrouted=unrouted
        )

    def routing(self, weight: float | None) -> RoutingByKind:
        """Who goes where."""
        counts = {kind: _expert_counts(self.tallies[kind].activation) for kind in KINDS}
        shapes = {layer: found.shape for own in counts.values() for layer, found in own.items()}
        full = {
            layer: {kind: counts[kind].get(layer, np.zeros(shape)) for kind in KINDS}
            for layer, shape in sorted(shapes.items())
        }
        return RoutingByKind(self.n_pictures, self.n_tokens, weight, full)


@dataclass(frozen=True)
class RoutingByKind:
    """Tokens of each kind by expert: ``counts[layer][kind]`` [n_expert]. ``weight`` is that of the statistics."""

    n_pictures: int
    n_tokens: Mapping[str, int]
    weight: float | None
    counts: Mapping[int, Mapping[str, Doubles]] = field(default_factory=dict)

    def alone(self, kind: str) -> list[tuple[int, int]]:
        """(layer, expert) that tokens of ``kind`` reach and those of the other do not."""
        other = VISION if kind == TEXT else TEXT
        return [
            (layer, int(expert))
            for layer, own in self.counts.items()
            for expert in np.flatnonzero((own[kind] > 0) & (own[other] == 0))
        ]

    def distance(self) -> float:
        """Mean over layers of the total variation distance between both kinds' shares: 0 alike, 1 no expert shared."""
        found = [
            float(np.abs(own[TEXT] / own[TEXT].sum() - own[VISION] / own[VISION].sum()).sum() / 2)
            for own in self.counts.values()
            if own[TEXT].sum() and own[VISION].sum()
        ]
        return float(np.mean(found)) if found else 0.0

    def as_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "counts": {str(layer): {k: own[k].tolist() for k in KINDS} for layer, own in self.counts.items()},
            "experts_alone": {kind: [f"{layer}[{e}]" for layer, e in self.alone(kind)] for kind in KINDS},
            "pictures": self.n_pictures,
            "routing_distance": self.distance(),
            "tokens": dict(self.n_tokens),
            "vision_weight": self.weight,
        }

    def rows(self) -> list[tuple[str, str]]:
        """What a person wants to know, as rows of a table."""
        text, seen = self.n_tokens[TEXT], self.n_tokens[VISION]
        share = "as they come" if self.weight is None else f"counted as {100 * self.weight:g} %"
        n_experts = sum(len(own[TEXT]) for own in self.counts.values())
        alone = {kind: len(self.alone(kind)) for kind in KINDS}
        return [
            ("pictures", f"{plural(self.n_pictures, 'picture')}, {seen:,} of {text + seen:,} tokens, {share}"),
            (
                "routing",
                f"of {plural(n_experts, 'expert')} {alone[VISION]} see pictures alone, {alone[TEXT]} text alone; "
                f"shares differ by {self.distance():.2f} (total variation, mean of layers)",
            ),
        ]


def routing_by_kind(found: Mapping[str, Any]) -> RoutingByKind:
    """What :meth:`RoutingByKind.as_dict` gave."""
    counts = {int(n): {k: np.array(own[k], dtype=np.float64) for k in KINDS} for n, own in found["counts"].items()}
    return RoutingByKind(
        found["pictures"], found["tokens"], found["vision_weight"], {n: counts[n] for n in sorted(counts)}
    )


def write_modalities(found: Modalities, path: Path, made_from: str) -> None:
    """Write as safetensors, in float64; ``made_from`` is the hash of what it was measured on."""
    arrays: dict[str, Any] = {"token_counts": found.token_counts}
    for kind in KINDS:
        tally = found.tallies[kind]
        for what, sums in (("activation", tally.activation), ("gradient", tally.gradient)):
            for name, values in sums.values.items():
                arrays[f"{kind}/{what}/sums/{name}"] = values
                arrays[f"{kind}/{what}/counts/{name}"] = sums.counts[name]
        arrays |= {f"{kind}/gate_weights/{layer}": own for layer, own in tally.gate_weights.items()}
    info = {
        "datasets": list(found.datasets),
        "fisher": found.fisher,
        "made_from": made_from,
        "n_ctx": found.n_ctx,
        "n_pictures": found.n_pictures,
        "n_tokens": dict(found.n_tokens),
        "n_windows": found.n_windows,
    }
    write_arrays(path, FORMAT, VERSION, info, arrays)


def read_modalities(path: Path) -> Modalities:
    """Read what :func:`write_modalities` wrote. Raises :class:`FormatError` for anything else."""
    again = "calibrate with --images again"
    info, arrays = read_arrays(path, FORMAT, VERSION, again)
    with refusing(path, FORMAT, again):
        require(info, _INFO)
        tallies = {kind: _tally(arrays, kind) for kind in KINDS}
        if any((array < 0).any() for array in arrays.values()):
            raise ValueError("sums or counts are negative")
        return Modalities(
            tallies=tallies,
            n_tokens={kind: info["n_tokens"][kind] for kind in KINDS},
            token_counts=arrays["token_counts"],
            datasets=tuple(info["datasets"]),
            n_windows=info["n_windows"],
            n_ctx=info["n_ctx"],
            n_pictures=info["n_pictures"],
            fisher=info["fisher"],
        )


def _tally(arrays: Arrays, kind: str) -> Tally:
    sums = {what: Sums() for what in ("activation", "gradient")}
    for what, own in sums.items():
        for name, values in _under(arrays, f"{kind}/{what}/sums/"):
            counts = arrays[f"{kind}/{what}/counts/{name}"]
            if values.ndim != 2 or counts.shape != values.shape[:1]:
                raise ValueError(f"'{name}' has sums of shape {values.shape} and counts of shape {counts.shape}")
            own.values[name], own.counts[name] = values, counts
    weights = {int(layer): own for layer, own in _under(arrays, f"{kind}/gate_weights/")}
    return Tally(sums["activation"], sums["gradient"], weights)


def _under(arrays: Arrays, beginning: str) -> Iterator[tuple[str, Any]]:
    return ((key.removeprefix(beginning), arrays[key]) for key in sorted(arrays) if key.startswith(beginning))


def _expert_counts(sums: Sums) -> dict[int, Doubles]:
    found = {layer_of(name): counts for name, counts in sums.counts.items() if _DOWN in name}
    return {layer: found[layer] for layer in sorted(n for n in found if n is not None)}


_INFO: dict[str, Check] = {
    "datasets": is_texts,
    "fisher": lambda value: isinstance(value, bool),
    "made_from": lambda value: isinstance(value, str),
    "n_ctx": is_count,
    "n_pictures": is_count,
    "n_tokens": lambda value: (
        isinstance(value, dict) and sorted(value) == sorted(KINDS) and all(is_count(n) for n in value.values())
    ),
    "n_windows": is_count,
}
