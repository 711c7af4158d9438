"""What a pass over the weights found: scales that are no numbers, and zeros where weights should be."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from mopeq_edge.source.model import Source, SourceTensor
from mopeq_edge.source.padded import BLOCK, ExpertPadding
from mopeq_edge.source.roles import Role, role_of
from mopeq_edge.units import plural
from mopeq_edge.validate.blocks import has_scales
from mopeq_edge.validate.check import Check, Names, count_matrices, shortened
from mopeq_edge.validate.scan import Scanned
from mopeq_edge.validate.stored import Matrix, StoredModel

SCALES, ZEROS = "scales", "zeros"
SHOWN = 20
"""Failed matrices that get a line each."""

_UNUSED = 5
"""``tokenizer.ggml.token_type`` of an id without a token."""


def check_scales(found: Sequence[Scanned]) -> list[Check]:
    """Every block's scales, and every plain number, must be finite: one line for a matrix in which one is not."""
    n_blocks = sum(
        s.matrix.n_out * s.matrix.n_in // s.matrix.type.block_size for s in found if has_scales(s.matrix.type)
    )
    looked_at = f"{plural(n_blocks, 'block')} of {count_matrices(len(found))}"
    bad = [s for s in found if s.bad is not None]
    checks = []
    for one in bad[:SHOWN]:
        matrix, wrong = one.matrix, one.bad
        if wrong is None:
            continue
        in_row = matrix.n_in // matrix.type.block_size
        what = f"'{wrong.scale}' is {wrong.found}"
        where = f"block {wrong.block} (row {wrong.block // in_row}, block {wrong.block % in_row} of it)"
        if not matrix.type.is_quantized:
            what, where = f"is {wrong.found}", f"number {wrong.block % in_row} of row {wrong.block // in_row}"
        more = f"; {wrong.n_blocks} such in it" if wrong.n_blocks > 1 else ""
        message = f"{matrix.label}{matrix.where}: {matrix.type.name} {where}: {what}{more}"
        checks.append(Check(SCALES, matrix.label, wrong.n_blocks, 0, False, message, Names.BLOCK))
    if len(bad) > SHOWN:
        message = f"{len(bad) - SHOWN} matrices more have scales that are no numbers"
        checks.append(Check(SCALES, looked_at, len(bad), 0, False, message))
    return checks or [Check(SCALES, looked_at, 0, 0, True, "every scale and every plain number is finite")]


def check_zeros(
    model: StoredModel, found: Sequence[Scanned], padding: ExpertPadding | None, source: Source | None
) -> list[Check]:
    """Matrices of zeros, or with rows of zeros at their end: what a download leaves that was cut short and filled up.

    Zeros are meant where ``padding`` (of the plan or the source) says so, or without it where all experts of one type
    and projection end in equally many rows, less than a block of the K-types. They are meant where the ``source`` has
    them, and in the rows of ids that no token has.
    """
    meant = _meant(model, found, padding)
    by_tensor: dict[str, list[tuple[Scanned, int]]] = {}
    for one in found:
        rows = one.zero_rows
        if rows <= meant.get((one.matrix.tensor, one.matrix.number), 0) or not _needs_weights(one.matrix):
            continue
        if source is not None and _zero_in_source(source, one):
            continue
        by_tensor.setdefault(one.matrix.tensor, []).append((one, rows))
    checks = [_zeros_of(tensor, own) for tensor, own in list(by_tensor.items())[:SHOWN]]
    if len(by_tensor) > SHOWN:
        message = f"{len(by_tensor) - SHOWN} tensors more end in zeros"
        checks.append(Check(ZEROS, model.path.name, len(by_tensor), 0, False, message))
    looked_at = f"the ends of {len(found)} matrices"
    return checks or [Check(ZEROS, looked_at, 0, 0, True, "no matrix ends in zeros that it should not have")]


def _zeros_of(tensor: str, own: Sequence[tuple[Scanned, int]]) -> Check:
    whole = [s.matrix for s, rows in own if rows == s.matrix.n_out]
    parts = [(s.matrix, rows) for s, rows in own if rows < s.matrix.n_out]
    said = []
    if whole and whole[0].n_matrices > 1:
        kind = "expert" if whole[0].is_expert else "matrix"
        said.append(f"all of {kind} {shortened([m.number for m in whole])}")
    elif whole:
        said.append("all of it")
    for matrix, rows in parts[:3]:
        last = f"the last {plural(rows, 'row')} of {matrix.n_out}"
        of = f" of {matrix.label.partition(' of ')[0]}" if matrix.n_matrices > 1 else ""
        said.append(last + of)
    if len(parts) > 3:
        said.append(f"the ends of {len(parts) - 3} more")
    message = f"{tensor}: zeros: {', '.join(said)}; was the file cut short and filled up? download or make it again"
    names = Names.BLOCK if parts else Names.EXPERT if own[0][0].matrix.is_expert else Names.TENSOR
    return Check(ZEROS, tensor, sum(rows for _, rows in own), 0, False, message, names)


def _needs_weights(matrix: Matrix) -> bool:
    """A bias may be zeros; a norm's few numbers may end in some."""
    if not matrix.tensor.endswith(".weight"):
        return False
    return matrix.n_out > 1 or role_of(matrix.tensor) is Role.NORM


def _meant(
    model: StoredModel, found: Sequence[Scanned], padding: ExpertPadding | None
) -> Mapping[tuple[str, int], int]:
    """Rows of zeros at the end that are on purpose, by tensor and matrix."""
    meant: dict[tuple[str, int], int] = {}
    ends: dict[tuple[str, str], list[Scanned]] = {}
    for one in found:
        matrix, key = one.matrix, (one.matrix.tensor, one.matrix.number)
        projection = matrix.tensor.partition(".ffn_")[2].partition(".")[0]
        if role_of(matrix.tensor) in (Role.EMBEDDING, Role.OUTPUT):
            meant[key] = _unused_at_the_end(model)
        elif projection in ("gate_exps", "up_exps", "gate_up_exps", "gate_shexp", "up_shexp"):
            if padding is None:
                ends.setdefault((projection, matrix.type.name), []).append(one)
            elif projection.endswith("_exps"):
                meant[key] = padding.padded - padding.width
            elif padding.shared:
                meant[key] = (padding.padded - padding.width) * (matrix.n_out // padding.padded)
    n_shared = max(1, model.number("expert_shared_count"))
    for (projection, _), ones in ends.items():
        fewest = min(one.zero_rows for one in ones)
        most = BLOCK * (n_shared if projection.endswith("shexp") else 1)
        if fewest < most:
            meant.update({(one.matrix.tensor, one.matrix.number): fewest for one in ones})
    return meant


def _unused_at_the_end(model: StoredModel) -> int:
    kv = model.kvs.get("tokenizer.ggml.token_type")
    types = kv.value if kv is not None and isinstance(kv.value, list) else []
    n = 0
    while n < len(types) and types[-1 - n] == _UNUSED:
        n += 1
    return n


def _zero_in_source(source: Source, one: Scanned) -> bool:
    """Whether the source has zeros in these rows too."""
    matrix = one.matrix
    tensor: SourceTensor | None = next((t for t in source.tensors if t.name == matrix.tensor), None)
    if tensor is None or (tensor.n_in, tensor.n_out) != (matrix.n_in, matrix.n_out):
        return False
    if matrix.number >= tensor.n_matrices:
        return False
    return not np.any(source.read(tensor, matrix.number, slice(matrix.n_out - one.zero_rows, matrix.n_out)))
