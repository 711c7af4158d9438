"""The trace artifact: mean diagonal of the calibration loss's Hessian for every expert matrix. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mopeq_edge.array_file import read_arrays, refusing, write_arrays
from mopeq_edge.calibrate.statistics import Doubles
from mopeq_edge.json_file import Check, is_count, is_number, is_texts, require
from mopeq_edge.source.roles import layer_of

FORMAT, VERSION = "mopeq-edge trace", "1"


@dataclass(frozen=True)
class Traces:
    """Mean diagonal tr(H_e)/n of each expert matrix, by stack [n_expert], in nats per token and squared weight.

    ``standard_error`` is of the estimates over ``n_probes`` probes; ``n_tokens`` and ``loss`` (nats per token) are of
    the text. ``clamped`` names, as ``tensor[expert]``, the matrices whose estimate was not positive: they have the
    prior of :func:`with_prior`. ``source_sha256`` says whose they are, ``made_from`` hashes all inputs.
    """

    mean_diagonal: Mapping[str, Doubles]
    standard_error: Mapping[str, Doubles]
    n_probes: int
    n_tokens: int
    loss: float
    clamped: tuple[str, ...]
    source_sha256: str
    made_from: str

    @property
    def relative_error(self) -> float:
        """Median of standard error over estimate, over all matrices whose estimate was positive."""
        ratios = [
            self.standard_error[name][expert] / value
            for name, values in sorted(self.mean_diagonal.items())
            for expert, value in enumerate(values)
            if f"{name}[{expert}]" not in self.clamped
        ]
        return float(np.median(ratios)) if ratios else float("inf")

    def summary(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "clamped": list(self.clamped),
            "loss_nats_per_token": self.loss,
            "median_relative_standard_error": self.relative_error,
            "probes": self.n_probes,
            "tokens": self.n_tokens,
        }

    def sentence(self) -> str:
        """How well the traces are known."""
        return (
            f"{self.n_probes} probes on {self.n_tokens:,} tokens, median relative standard error "
            f"{100 * self.relative_error:.0f} %, {len(self.clamped)} not positive"
        )


def with_prior(
    estimates: Mapping[str, Doubles], errors: Mapping[str, Doubles], counts: Mapping[int, Doubles]
) -> tuple[dict[str, Doubles], tuple[str, ...]]:
    """Estimates [n_expert] by stack with a prior for those that are not positive, and their names.

    A negative estimate is noise or a saddle, and would reward errors; zero means that no token came. Their prior is
    the stack's curvature per token, sum of its positive estimates over the tokens of all its experts, times the
    expert's own tokens, at least one (``counts[layer]`` [n_expert]). A stack without any positive estimate gets its
    mean standard error.
    """
    filled: dict[str, Doubles] = {}
    clamped: list[str] = []
    for name, estimate in sorted(estimates.items()):
        layer = layer_of(name)
        tokens = np.maximum(counts[layer], 1.0) if layer is not None else np.ones(len(estimate))
        bad = ~(estimate > 0)
        prior = np.maximum(estimate, 0.0).sum() / tokens.sum() * tokens
        filled[name] = np.where(bad, np.mean(errors[name]) if bad.all() else prior, estimate)
        clamped += [f"{name}[{expert}]" for expert in np.flatnonzero(bad)]
    return filled, tuple(clamped)


def write_traces(traces: Traces, path: Path) -> None:
    """Write as safetensors: keys ``mean_diagonal/TENSOR`` and ``standard_error/TENSOR``."""
    arrays = {f"mean_diagonal/{name}": values for name, values in traces.mean_diagonal.items()}
    arrays |= {f"standard_error/{name}": values for name, values in traces.standard_error.items()}
    info = {
        "clamped": list(traces.clamped),
        "loss": traces.loss,
        "made_from": traces.made_from,
        "n_probes": traces.n_probes,
        "n_tokens": traces.n_tokens,
        "source_sha256": traces.source_sha256,
    }
    write_arrays(path, FORMAT, VERSION, info, arrays)


def read_traces(path: Path) -> Traces:
    """Read what :func:`write_traces` wrote. Raises :class:`FormatError` for anything else."""
    again = "calibrate with --trace again"
    info, arrays = read_arrays(path, FORMAT, VERSION, again)

    def by_tensor(kind: str) -> dict[str, Doubles]:
        return {key.partition("/")[2]: values for key, values in sorted(arrays.items()) if key.startswith(f"{kind}/")}

    means, errors = by_tensor("mean_diagonal"), by_tensor("standard_error")
    with refusing(path, FORMAT, again):
        require(info, _INFO)
        if any(errors[name].shape != found.shape or found.ndim != 1 for name, found in means.items()):
            raise ValueError("estimates and their errors are of different shapes")
    return Traces(
        means,
        errors,
        info["n_probes"],
        info["n_tokens"],
        info["loss"],
        tuple(info["clamped"]),
        info["source_sha256"],
        info["made_from"],
    )


_INFO: dict[str, Check] = {
    "clamped": is_texts,
    "loss": is_number,
    "made_from": lambda value: isinstance(value, str),
    "n_probes": is_count,
    "n_tokens": is_count,
    "source_sha256": lambda value: isinstance(value, str),
}
