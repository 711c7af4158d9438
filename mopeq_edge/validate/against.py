"""What the comparison with the source's weights comes to: a line for everything that is not where it belongs."""

from __future__ import annotations

from collections.abc import Sequence

from mopeq_edge.source.model import Source
from mopeq_edge.source.roles import Role, role_of
from mopeq_edge.units import plural
from mopeq_edge.validate.check import Check, Names, count_matrices, skipped
from mopeq_edge.validate.origin import Origin, find_origin
from mopeq_edge.validate.stored import Matrix, StoredModel
from mopeq_edge.validate.weights import Compared, shape_of

TENSORS, WEIGHTS = "tensors", "weights"
SHOWN = 8
"""Failed matrices of one tensor that get a line each."""


def check_tensors(model: StoredModel, source: Source) -> list[Check]:
    """The file must have the source's tensors, in their shapes, and no others."""
    wanted = {t.name: (t.n_in, t.n_out, t.n_matrices) for t in source.tensors}
    found = {name: shape_of(matrices[0]) for name, matrices in model.tensors.items()}
    checks = []
    for name in dict.fromkeys((*wanted, *found)):
        if wanted.get(name) == found.get(name):
            continue
        has = f"has shape {list(found[name])}" if name in found else "is missing"
        should = f"the source has {list(wanted[name])}" if name in wanted else "the source has no such tensor"
        checks.append(Check(TENSORS, name, None, None, False, f"{name}: {has}, {should}", Names.TENSOR))
    looked_at = plural(len(wanted), "tensor")
    return checks or [Check(TENSORS, looked_at, 0, 0, True, "the source's tensors in the source's shapes")]


def check_weights(model: StoredModel, compared: Sequence[Compared], source: Source) -> list[Check]:
    """Every matrix within the bound of its type; what is not is looked for elsewhere in the source."""
    checks: list[Check] = []
    wrong: dict[str, list[Compared]] = {}
    for one in compared:
        if not one.passed:
            wrong.setdefault(one.matrix.tensor, []).append(one)
    for ones in wrong.values():
        checks += _lines(ones, source)
    left_out = [m.label for m in model.matrices if m.type.name not in ("I32",)]
    left_out = sorted(set(left_out) - {one.matrix.label for one in compared})
    if left_out:
        reason = f"{count_matrices(len(left_out))} not compared, such as {left_out[0]}"
        checks.append(skipped(WEIGHTS, left_out[0], f"{reason}: no bound for the type, or not so in the source"))
    if wrong or not compared:
        return checks
    worst = max(compared, key=lambda one: one.error / one.bound.matrix if one.bound.matrix else one.error)
    n_rows = sum(len(one.rows) for one in compared)
    looked_at = f"{plural(n_rows, 'row')} of {len(compared)} matrices"
    message = f"nearest to its bound: {worst.matrix.label} ({worst.matrix.type.name}), "
    message += f"relative RMS error {worst.error:.3g} of {worst.bound.matrix:.3g}"
    return [*checks, Check(WEIGHTS, looked_at, worst.error, worst.bound.matrix, True, message)]


def _lines(ones: Sequence[Compared], source: Source) -> list[Check]:
    """Of one tensor whose matrices in ``ones`` do not fit."""
    first = ones[0].matrix
    origins = [find_origin(one, source) for one in ones[:SHOWN]]
    same = {(o.tensor, o.how, o.matrix - one.matrix.number) for o, one in zip(origins, ones, strict=False) if o}
    everywhere = len(ones) == first.n_matrices and None not in origins and len(same) == 1
    origin = origins[0]
    if everywhere and origin is not None and first.n_matrices > 1 and origin.matrix == first.number:
        what = f"holds the source's {origin.tensor}" if origin.tensor != first.tensor else f"has {origin.how}"
        how = f" ({origin.how})" if origin.how and origin.tensor != first.tensor else ""
        return [_fail(ones[0], f"{first.tensor} {what}{how}, in all of its {count_matrices(first.n_matrices)}", 1)]
    checks = [_fail(one, _said(one, found), 0) for one, found in zip(ones, origins, strict=False)]
    if len(ones) > SHOWN:
        others = [str(one.matrix.number) for one in ones[SHOWN:]]
        checks.append(_fail(ones[SHOWN], f"{first.tensor}: neither fit matrices {', '.join(others[:40])}", 1))
    return checks


def _said(one: Compared, origin: Origin | None) -> str:
    matrix = one.matrix
    label = f"{matrix.label}{matrix.where}"
    if origin is None:
        row = one.rows[one.worst_row]
        error, bound = (one.error, one.bound.matrix) if one.error > one.bound.matrix else (one.worst, one.bound.row)
        return (
            f"{label}: is no {matrix.type.name} of the source's: relative RMS error {error:.3g}, at most {bound:.3g} "
            f"expected; row {row} is worst; it fits no other matrix of the source that is like it"
        )
    if origin.tensor == matrix.tensor and origin.matrix == matrix.number:
        router = role_of(matrix.tensor) is Role.ROUTER
        return f"{label}: {origin.how}" + (", and the experts did not move with them" if router else "")
    return f"{label} holds the source's {_name(matrix, origin)}" + (f" ({origin.how})" if origin.how else "")


def _name(matrix: Matrix, origin: Origin) -> str:
    if matrix.n_matrices == 1:
        return origin.tensor
    number = f"{'expert' if matrix.is_expert else 'matrix'} {origin.matrix}"
    return number if origin.tensor == matrix.tensor else f"{number} of {origin.tensor}"


def _fail(one: Compared, message: str, whole: int) -> Check:
    matrix = one.matrix
    names = Names.EXPERT if matrix.is_expert and not whole else Names.TENSOR
    looked_at = matrix.tensor if whole else matrix.label
    return Check(WEIGHTS, looked_at, one.error, one.bound.matrix, False, message, names)
