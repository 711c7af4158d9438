"""The reading side of expert groups: which experts are where, and every way in which a file can be wrong."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mopeq_edge.errors import FormatError
from mopeq_edge.expert_groups.layout import ABSENT, MAX_GROUPS, VERSION, VERSION_KEY, ExpertGroup, Grouping
from mopeq_edge.ggml.types import I32
from mopeq_edge.gguf_file import GGUFHeader, TensorInfo, ValueType
from mopeq_edge.model_keys import MAX_EXPERTS

_STACK = r"^(blk\.[0-9]+\.ffn_(?:gate|up|down|gate_up)_exps)"
_GROUP = re.compile(_STACK + r"\.([0-9]+)\.weight$")
_MAP = re.compile(_STACK + r"\.map$")

Found = Mapping[str, tuple[GGUFHeader, TensorInfo]]
"""The tensors of all files by name, each with the header of its file."""


@dataclass(frozen=True)
class GroupedStack:
    """One stack that is stored in groups; ``shape`` is that of the stack, [n_in, n_out, n_expert]."""

    name: str
    """Of the stack that the groups replace, ``blk.N.ffn_X_exps.weight``."""
    shape: tuple[int, int, int]
    groups: Grouping
    """Group g holds its experts in the order of its rows."""


def is_part(name: str) -> bool:
    """Whether ``name`` is that of a group's tensor or of a map."""
    return _GROUP.match(name) is not None or _MAP.match(name) is not None


def read_groups(first: GGUFHeader, *others: GGUFHeader) -> tuple[GroupedStack, ...]:
    """The grouped stacks of a file in the order of their first tensors; none for a stock file.

    Of a split file (:func:`mopeq_edge.split.read_parts`) the headers of all parts are given: a stack's groups and map
    may be in different ones. Reads the maps, no weights. Raises :class:`FormatError` for whatever
    docs/expert-groups.md says a reader must reject, in one line that names the tensor.
    """
    found: Found = {info.name: (header, info) for header in (first, *others) for info in header.tensors}
    numbered: dict[str, dict[int, TensorInfo]] = {}
    for name, (header, info) in found.items():
        if match := _GROUP.match(name):
            if match[2] != str(int(match[2])):
                raise _error(header, name, f"a group number without leading zeros, found '{match[2]}'")
            numbered.setdefault(match[1], {})[int(match[2])] = info
        elif match := _MAP.match(name):
            numbered.setdefault(match[1], {})
    _check_version(first, numbered, found)
    return tuple(_read_stack(first, base, groups, found) for base, groups in numbered.items())


def _error(header: GGUFHeader, name: str, expected: str) -> FormatError:
    return FormatError(f"{header.path}: tensor '{name}': expected {expected}; make the file again")


def _check_version(header: GGUFHeader, numbered: Mapping[str, object], found: Found) -> None:
    kv = header.kvs.get(VERSION_KEY)
    if kv is None and numbered:
        name = next(name for name in found if is_part(name))
        raise _error(header, name, f"the key '{VERSION_KEY}' beside expert groups, found none")
    if kv is not None and (kv.type is not ValueType.UINT32 or kv.value != VERSION):
        raise FormatError(
            f"{header.path}: {VERSION_KEY} is {kv.value!r} ({kv.type.name}), expected {VERSION} (UINT32); "
            "a newer mopeq-edge made it?"
        )
    if kv is not None and not numbered:
        raise FormatError(f"{header.path}: {VERSION_KEY} is {kv.value}, but no tensor is in groups; make it again")


def _read_stack(first: GGUFHeader, base: str, numbered: Mapping[int, TensorInfo], found: Found) -> GroupedStack:
    stack = f"{base}.weight"
    if stack in found:
        raise _error(found[stack][0], stack, "either the stack or its groups, found both")
    if f"{base}.map" not in found:
        raise _error(first, f"{base}.map", "an I32 map beside the groups, found none")
    header, table = found[f"{base}.map"]
    if not numbered:
        raise _error(header, table.name, f"the groups '{base}.0.weight' and on, found none")
    n_groups = len(numbered)
    if n_groups > MAX_GROUPS:
        raise _error(header, stack, f"at most {MAX_GROUPS} groups, found {n_groups}")
    gap = next((g for g in range(n_groups) if g not in numbered), None)
    if gap is not None:
        raise _error(header, f"{base}.{gap}.weight", f"groups 0 to {n_groups - 1}, found {sorted(numbered)}")
    groups = [numbered[g] for g in range(n_groups)]
    # ggml drops trailing axes of 1
    shapes = [(*info.shape, 1, 1)[:3] for info in groups]
    for info, shape in zip(groups, shapes, strict=True):
        if len(info.shape) > 3 or shape[:2] != shapes[0][:2]:
            own = found[info.name][0]
            raise _error(own, info.name, f"shape {[*shapes[0][:2], 'n']} as group 0, found {list(info.shape)}")
    n_rows = [shape[2] for shape in shapes]
    if table.type is not I32 or len(table.shape) != 2 or table.shape[0] != n_groups:
        instead = f"{table.type.name} {list(table.shape)}"
        raise _error(header, table.name, f"I32 [{n_groups}, n_expert] for {n_groups} groups, found {instead}")
    if sum(n_rows) != table.shape[1]:
        raise _error(header, table.name, f"{sum(n_rows)} experts as in its groups, found {table.shape[1]}")
    if table.shape[1] > MAX_EXPERTS:
        raise _error(header, table.name, f"at most {MAX_EXPERTS} experts, found {table.shape[1]}")
    experts = _experts_by_group(header, table, n_rows)
    parts = tuple(ExpertGroup(info.type, rows) for info, rows in zip(groups, experts, strict=True))
    return GroupedStack(stack, (shapes[0][0], shapes[0][1], sum(n_rows)), parts)


def _experts_by_group(header: GGUFHeader, table: TensorInfo, n_rows: list[int]) -> list[tuple[int, ...]]:
    """For each group the expert of every row."""
    rows = _read_map(header, table)
    counts = (rows != ABSENT).sum(axis=1)
    limits = np.array(n_rows, dtype=np.int64)
    outside = np.argwhere((rows < ABSENT) | (rows >= limits))
    if len(outside):
        e, g = (int(i) for i in outside[0])
        raise _error(
            header, table.name, f"rows from {ABSENT} to {n_rows[g] - 1} in group {g}, found {rows[e, g]} for expert {e}"
        )
    wrong = np.flatnonzero(counts != 1)
    if len(wrong):
        found = f"found it in {counts[wrong[0]]}"
        raise _error(header, table.name, f"expert {wrong[0]} in exactly one group, {found}")
    experts: list[tuple[int, ...]] = []
    # n_expert members of as many rows: where no row is used twice, none is left out
    for g in range(len(n_rows)):
        members = np.flatnonzero(rows[:, g] != ABSENT)
        order = np.argsort(rows[members, g], kind="stable")
        used = rows[members[order], g]
        twice = np.flatnonzero(np.diff(used) == 0)
        if len(twice):
            both = members[order][twice[0] : twice[0] + 2].tolist()
            raise _error(header, table.name, f"row {used[twice[0]]} of group {g} once, found it for experts {both}")
        experts.append(tuple(int(e) for e in members[order]))
    return experts


def _read_map(header: GGUFHeader, table: TensorInfo) -> npt.NDArray[np.int32]:
    """[n_expert, G]"""
    with header.path.open("rb") as file:
        file.seek(header.data_start + table.offset)
        raw = file.read(table.nbytes)
    if len(raw) != table.nbytes:
        raise FormatError(f"{header.path}: truncated GGUF: the file shrank while it was read")
    return np.frombuffer(raw, dtype="<i4").reshape(table.shape[1], table.shape[0])
