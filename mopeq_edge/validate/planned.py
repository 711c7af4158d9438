"""A file against the plan that it was written from: every tensor's name, shape, type and size, the groups and maps."""

from __future__ import annotations

from collections.abc import Sequence

from mopeq_edge.expert_groups.layout import file_specs
from mopeq_edge.expert_groups.read import read_groups
from mopeq_edge.ggml.types import F32, GgmlType
from mopeq_edge.gguf_file import GGUFHeader
from mopeq_edge.output_kvs import PLAN_KEY
from mopeq_edge.plan.artifact import Plan, id_runs
from mopeq_edge.source.model import SourceTensor
from mopeq_edge.units import plural
from mopeq_edge.validate.check import Check, Names

PLAN = "plan"


def check_plan(headers: Sequence[GGUFHeader], plan: Plan) -> list[Check]:
    """A line for every difference between the file with these ``headers`` and what ``plan`` says.

    Raises :class:`FormatError` for groups that are broken by themselves.
    """
    checks = [*_hash(headers[0], plan), *_tensors(headers, plan), *_groups(headers, plan), *_size(headers, plan)]
    looked_at = f"{plural(len(plan.tensors), 'tensor')} of the plan"
    return checks or [Check(PLAN, looked_at, 0, 0, True, "names, shapes, types, sizes and groups are as planned")]


def _fail(looked_at: str, message: str, names: Names = Names.TENSOR) -> Check:
    return Check(PLAN, looked_at, None, None, False, message, names)


def _hash(header: GGUFHeader, plan: Plan) -> list[Check]:
    found = header.get(PLAN_KEY)
    if found == plan.sha256:
        return []
    return [_fail(PLAN_KEY, f"{PLAN_KEY} is {found}, expected {plan.sha256}: the file is of another plan", Names.FILE)]


def _tensors(headers: Sequence[GGUFHeader], plan: Plan) -> list[Check]:
    tensors = [SourceTensor(t.name, t.shape, F32) for t in plan.tensors]
    wanted = {name: (shape, kind) for name, shape, kind in file_specs(tensors, plan.type_of())}
    found = {info.name: info for header in headers for info in header.tensors}
    checks = []
    for name, (shape, kind) in wanted.items():
        if name not in found:
            checks.append(_fail(name, f"{name}: is missing, planned as {kind.name} {list(shape)}"))
            continue
        info = found[name]
        if info.type is not kind:
            message = f"{name}: has type {info.type.name} ({info.nbytes} bytes), planned was {kind.name}"
            checks.append(_fail(name, f"{message} ({kind.nbytes(info.n_weights)} bytes)"))
        elif _trimmed(info.shape) != _trimmed(shape):
            checks.append(_fail(name, f"{name}: has shape {list(info.shape)}, planned was {list(shape)}"))
    checks += [_fail(name, f"{name}: is not in the plan") for name in found if name not in wanted]
    return checks


def _groups(headers: Sequence[GGUFHeader], plan: Plan) -> list[Check]:
    planned = {name: kind for name, kind in plan.type_of().items() if not isinstance(kind, GgmlType)}
    checks = []
    for stack in read_groups(*headers):
        groups = planned.get(stack.name)
        for g, (got, want) in enumerate(zip(stack.groups, groups or (), strict=False)):
            if set(got.experts) != set(want.experts):
                found, expected = id_runs(sorted(got.experts)), id_runs(want.experts)
                message = f"{stack.name}: its map puts experts {found} in group {g}, planned were {expected}"
                checks.append(_fail(stack.name, message, Names.EXPERT))
                break
            if got.experts != want.experts:
                row = next(i for i, (a, b) in enumerate(zip(got.experts, want.experts, strict=True)) if a != b)
                message = f"{stack.name}: its map says expert {got.experts[row]} is row {row} of group {g}"
                message += f", planned was expert {want.experts[row]}"
                checks.append(_fail(stack.name, message, Names.EXPERT))
                break
    return checks


def _size(headers: Sequence[GGUFHeader], plan: Plan) -> list[Check]:
    # a split file has a header a part, which the plan does not count
    if len(headers) > 1 or headers[0].file_size == plan.file_bytes:
        return []
    size = headers[0].file_size
    return [_fail("size", f"has {size} bytes, planned were {plan.file_bytes}", Names.FILE)]


def _trimmed(shape: tuple[int, ...]) -> tuple[int, ...]:
    while len(shape) > 1 and shape[-1] == 1:
        shape = shape[:-1]
    return shape
