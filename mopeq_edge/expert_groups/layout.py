"""The writing side of expert groups: names, maps, and the layout of a file with grouped stacks.

A stack ``blk.N.ffn_X_exps.weight`` [n_in, n_out, n_expert] becomes G tensors ``blk.N.ffn_X_exps.{g}.weight``
[n_in, n_out, n_g] and the map ``blk.N.ffn_X_exps.map`` (I32, [G, n_expert]).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mopeq_edge.errors import FormatError
from mopeq_edge.ggml.types import I32, GgmlType
from mopeq_edge.gguf_file import KV
from mopeq_edge.gguf_layout import Layout, TensorSpec, layout, uint32
from mopeq_edge.source.model import SourceTensor

VERSION = 1
VERSION_KEY = "mopeq.expert_groups.version"
MAX_GROUPS = 7
"""Groups of one stack that the runtime takes."""

ABSENT = -1
"""Map entry of an expert that is not in the group."""

_STACK = ".weight"


@dataclass(frozen=True)
class ExpertGroup:
    """Experts (router ids, rising) of one stack that share a type; a row of the group's tensor each."""

    type: GgmlType
    experts: tuple[int, ...]


Grouping = tuple[ExpertGroup, ...]
"""All groups of a stack; every expert is in exactly one."""

Types = Mapping[str, GgmlType | Grouping]
"""What becomes of each tensor: one type, or for a stack its groups."""


def group_name(stack: str, group: int) -> str:
    """``blk.0.ffn_up_exps.2.weight`` for group 2 of ``blk.0.ffn_up_exps.weight``."""
    return f"{stack.removesuffix(_STACK)}.{group}{_STACK}"


def map_name(stack: str) -> str:
    """``blk.0.ffn_up_exps.map`` for ``blk.0.ffn_up_exps.weight``."""
    return f"{stack.removesuffix(_STACK)}.map"


def groups_of(types: Sequence[GgmlType]) -> GgmlType | Grouping:
    """The groups of a stack whose expert e has ``types[e]``, by bits per weight, then name.

    One type for all is that type: such a stack is written as stock. Raises :class:`FormatError` for more than
    :data:`MAX_GROUPS` types.
    """
    experts: dict[GgmlType, list[int]] = {}
    for expert, kind in enumerate(types):
        experts.setdefault(kind, []).append(expert)
    kinds = sorted(experts, key=lambda kind: (kind.bpw, kind.name))
    if len(kinds) == 1:
        return kinds[0]
    groups = tuple(ExpertGroup(kind, tuple(experts[kind])) for kind in kinds)
    if len(groups) > MAX_GROUPS:
        names = ", ".join(kind.name for kind in kinds)
        raise FormatError(f"a stack of {len(groups)} types ({names}), expected at most {MAX_GROUPS}")
    return groups


def expert_map(groups: Grouping, n_expert: int) -> npt.NDArray[np.int32]:
    """[n_expert, G]: the row of each expert in each group, or :data:`ABSENT`."""
    rows = np.full((n_expert, len(groups)), ABSENT, dtype="<i4")
    for g, group in enumerate(groups):
        rows[list(group.experts), g] = np.arange(len(group.experts))
    return rows


def stack_specs(tensor: SourceTensor, groups: Grouping) -> list[TensorSpec]:
    """The tensors that replace the stack ``tensor``, in writing order: its groups, then its map.

    Raises :class:`FormatError` for groups that are no partition of the experts into 1 to :data:`MAX_GROUPS`.
    """
    _check(tensor, groups)
    n_in, n_out, n_expert = tensor.shape
    specs: list[TensorSpec] = [
        (group_name(tensor.name, g), (n_in, n_out, len(group.experts)), group.type) for g, group in enumerate(groups)
    ]
    return [*specs, (map_name(tensor.name), (len(groups), n_expert), I32)]


def file_specs(tensors: Iterable[SourceTensor], types: Types) -> list[TensorSpec]:
    """All tensors of a file of ``tensors`` in their ``types``, in writing order."""
    specs: list[TensorSpec] = []
    for tensor in tensors:
        kind = types[tensor.name]
        if isinstance(kind, GgmlType):
            specs.append((tensor.name, tensor.shape, kind))
        else:
            specs.extend(stack_specs(tensor, kind))
    return specs


def file_kvs(kvs: Mapping[str, KV], types: Types) -> dict[str, KV]:
    """Key-values of a file with these ``types``: with a grouped stack the version key comes last, else it is stock."""
    own = {key: kv for key, kv in kvs.items() if key != VERSION_KEY}
    if any(not isinstance(kind, GgmlType) for kind in types.values()):
        own[VERSION_KEY] = uint32(VERSION)
    return own


def file_layout(kvs: Mapping[str, KV], tensors: Iterable[SourceTensor], types: Types) -> Layout:
    """Lay out one file of ``tensors`` in their ``types``."""
    return layout(file_kvs(kvs, types), file_specs(tensors, types))


def _check(tensor: SourceTensor, groups: Grouping) -> None:
    if tensor.projection is None or len(tensor.shape) != 3:
        raise FormatError(f"tensor '{tensor.name}': only a stack of experts can be in groups")
    if not 1 <= len(groups) <= MAX_GROUPS:
        raise FormatError(f"tensor '{tensor.name}': {len(groups)} groups, expected 1 to {MAX_GROUPS}")
    for group in groups:
        if not group.experts or list(group.experts) != sorted(set(group.experts)):
            raise FormatError(f"tensor '{tensor.name}': a group's experts must rise, found {list(group.experts)}")
    found = sorted(expert for group in groups for expert in group.experts)
    if found != list(range(tensor.n_matrices)):
        raise FormatError(
            f"tensor '{tensor.name}': its groups hold experts {found}, expected each of {tensor.n_matrices} once"
        )
