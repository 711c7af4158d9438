"""The sensitivity artifact: damage of every (tensor, expert, type) by every score, measured once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from mopeq_edge.array_file import read_arrays, read_info, refusing, write_arrays
from mopeq_edge.errors import PlanError
from mopeq_edge.ggml.types import BY_NAME
from mopeq_edge.json_file import Check, is_count, is_texts, require
from mopeq_edge.sensitivity.combine import with_fisher_trace
from mopeq_edge.sensitivity.measure import TensorErrors
from mopeq_edge.sensitivity.sample import AUTO, SampleRows
from mopeq_edge.sensitivity.scores import FISHER, FISHER_TRACE, TRACE, Doubles
from mopeq_edge.source.model import SourceTensor

FORMAT, VERSION = "mopeq-edge sensitivity", "1"


@dataclass(frozen=True)
class SensitivityTable:
    """Everything a planner needs to know about errors.

    ``errors[name]`` has the damages of one tensor; ``mopeq[layer]`` [n_expert] is S(e) of the paper.
    ``quantized_with`` says which imatrix weighed the quantizer (``activation``, ``gradient``, ``none``);
    ``unrouted`` names experts priced by the prior. ``made_from`` hashes the inputs and the options.
    """

    errors: Mapping[str, TensorErrors]
    mopeq: Mapping[int, Doubles]
    scores: tuple[str, ...]
    quantized_with: str
    unrouted: tuple[str, ...]
    sample_rows: SampleRows
    made_from: str
    rows_only: bool = False
    """Whether no rows but those were read: then norms are estimates, and so are the largest weights."""

    def require(self, name: str, score: str) -> TensorErrors:
        """Errors of the tensor ``name``. Raises :class:`PlanError` if it has no damage by ``score``."""
        errors = self.errors.get(name)
        if errors is None or score not in errors.damage:
            raise PlanError(
                f"tensor '{name}': the sensitivity table has no '{score}' damage for it; "
                "run sensitivity again on this source"
            )
        return errors

    def fitting(self, tensors: Iterable[SourceTensor]) -> SensitivityTable:
        """Without the types that ``tensors`` take only when they are padded (``source.padded``)."""
        n_in = {tensor.name: tensor.n_in for tensor in tensors}
        return replace(self, errors={name: own.fitting(n_in[name]) for name, own in self.errors.items()})

    def relative_error(self, score: str) -> float:
        """Largest sampling standard error of a tensor's damage (all its experts), relative to the damage."""
        worst = 0.0
        for errors in self.errors.values():
            total = errors.damage[score].sum(axis=1)
            deviation = np.sqrt(errors.variance[score].sum(axis=1))
            known = total > 0
            if known.any():
                worst = max(worst, float((deviation[known] / total[known]).max()))
        return worst


def write_table(table: SensitivityTable, path: Path) -> None:
    """Write as safetensors: keys ``damage/SCORE/TENSOR``, ``variance/…``, ``norms/TENSOR``, ``mopeq/LAYER``."""
    arrays: dict[str, Any] = {f"mopeq/{layer}": scores for layer, scores in table.mopeq.items()}
    for name, errors in table.errors.items():
        arrays[f"norms/{name}"] = errors.norms
        for score in table.scores:
            arrays[f"damage/{score}/{name}"] = errors.damage[score]
            arrays[f"variance/{score}/{name}"] = errors.variance[score]
    info = {
        "made_from": table.made_from,
        "quantized_with": table.quantized_with,
        "sample_rows": table.sample_rows,
        "scores": list(table.scores),
        "types": {name: list(errors.types) for name, errors in table.errors.items()},
        "unrouted": list(table.unrouted),
        **({"rows_only": True} if table.rows_only else {}),
    }
    write_arrays(path, FORMAT, VERSION, info, arrays)


def read_table(path: Path, choose: Callable[[Sequence[str]], str] | None = None) -> SensitivityTable:
    """Read what :func:`write_table` wrote, and add ``fisher-trace``, which follows from it.

    ``choose`` is given the scores that there are, and damages by the one that it returns are read alone: in a fifth of
    the time. Raises :class:`FormatError` for anything else.
    """
    again = "run sensitivity again"
    info = read_info(path, FORMAT, VERSION, again)
    with refusing(path, FORMAT, again):
        require({"rows_only": False, **info}, _INFO)
        scores = tuple(info["scores"])
    if choose is not None:
        wanted = choose((*scores, FISHER_TRACE) if {FISHER, TRACE} <= set(scores) else scores)
        parts = {FISHER, TRACE} if wanted == FISHER_TRACE else {wanted}
        scores = tuple(score for score in scores if score in parts)
    left_out = tuple(f"{kind}/{s}/" for kind in ("damage", "variance") for s in {*info["scores"]} - {*scores})
    _, arrays = read_arrays(path, FORMAT, VERSION, again, only=lambda key: not key.startswith(left_out))
    with refusing(path, FORMAT, again):
        plain = {name: _tensor_errors(name, types, scores, arrays) for name, types in info["types"].items()}
        layers = sorted(int(key.split("/")[1]) for key in arrays if key.startswith("mopeq/"))
        mopeq = {layer: arrays[f"mopeq/{layer}"] for layer in layers}
        if any(array.ndim != 1 for array in mopeq.values()):
            raise ValueError("a 'mopeq/LAYER' is no vector")
    errors = with_fisher_trace(plain)
    if all(FISHER_TRACE in own.damage for own in errors.values()):
        scores += (FISHER_TRACE,)
    return SensitivityTable(
        errors,
        mopeq,
        scores,
        info["quantized_with"],
        tuple(info["unrouted"]),
        info["sample_rows"],
        info["made_from"],
        info.get("rows_only", False),
    )


_INFO: dict[str, Check] = {
    "made_from": lambda value: isinstance(value, str),
    "quantized_with": lambda value: isinstance(value, str),
    "sample_rows": lambda value: value is None or value == AUTO or is_count(value),
    "rows_only": lambda value: isinstance(value, bool),
    "scores": is_texts,
    "types": lambda value: isinstance(value, dict) and all(is_texts(names) and names for names in value.values()),
    "unrouted": is_texts,
}


def _tensor_errors(name: str, types: list[str], scores: tuple[str, ...], arrays: Mapping[str, Any]) -> TensorErrors:
    norms = arrays[f"norms/{name}"]
    damage, variance = ({s: arrays[f"{kind}/{s}/{name}"] for s in scores} for kind in ("damage", "variance"))
    unknown = next((kind for kind in types if kind not in BY_NAME), None)
    if unknown is not None:
        raise ValueError(f"tensor '{name}' has type '{unknown}'")
    if norms.ndim != 1 or any(a.shape != (len(types), len(norms)) for a in (*damage.values(), *variance.values())):
        raise ValueError(f"tensor '{name}' has no damages of {len(types)} types and {norms.shape} matrices")
    return TensorErrors(tuple(types), damage, variance, norms)
