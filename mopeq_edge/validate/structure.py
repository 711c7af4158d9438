"""The structure of a file: what it is, and the plan that it names."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mopeq_edge.errors import FormatError
from mopeq_edge.expert_groups.read import is_part
from mopeq_edge.gguf_file import GGUFHeader
from mopeq_edge.output_kvs import PLAN_KEY
from mopeq_edge.plan.artifact import Plan, read_plan
from mopeq_edge.source.file_bytes import read_bytes
from mopeq_edge.summary import Summary
from mopeq_edge.units import format_bytes, plural
from mopeq_edge.validate.check import Check

STRUCTURE = "structure"
_CHUNK = 1 << 22


def check_structure(summary: Summary) -> Check:
    """That the header is sound, all tensors lie in the file and groups add up: :func:`summarise` has seen to it."""
    groups = f", {plural(len(summary.stacks), 'stack')} in groups" if summary.stacks else ""
    looked_at = f"{plural(summary.n_tensors, 'tensor')}, {format_bytes(summary.file_bytes)}{groups}"
    return Check(STRUCTURE, looked_at, None, None, True, "header, places of all tensors and groups are sound")


def zeroed_tail(header: GGUFHeader) -> FormatError | None:
    """What to say of a file that ends in zeros where tensors should be, maps among them: the structure then breaks at a
    map, which is not where the fault is. None if it does not end so.
    """
    first, at = header.file_size, header.file_size
    while first == at and at > header.data_start:
        count = min(_CHUNK, at - header.data_start)
        at -= count
        used = np.flatnonzero(read_bytes(header.path, at, count))
        first = at + int(used[-1]) + 1 if len(used) else at
    lost = [info for info in header.tensors if header.data_start + info.offset + info.nbytes > first]
    if not any(header.data_start + info.offset >= first and is_part(info.name) for info in lost):
        return None
    return FormatError(
        f"{header.path}: its last {header.file_size - first} bytes are zeros, from within tensor '{lost[0].name}' on "
        f"({plural(len(lost), 'tensor')}); it was cut short and filled up, download or make it again"
    )


def find_plan(headers: Sequence[GGUFHeader], work: Path) -> tuple[Plan | None, str]:
    """The plan of a file with these ``headers`` in the work directory ``work``, or why there is none."""
    wanted = headers[0].get(PLAN_KEY)
    if wanted is None:
        return None, f"the file names no plan ({PLAN_KEY}); give --plan FILE"
    path = work / "plan.json"
    if not path.is_file():
        return None, f"{path} is not there; give --plan FILE"
    try:
        plan = read_plan(path)
    except FormatError as error:
        return None, str(error)
    if plan.sha256 != wanted:
        return None, f"{path} is not the plan of this file (its SHA-256 is another one); give --plan FILE"
    return plan, ""
