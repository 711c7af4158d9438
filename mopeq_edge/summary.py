"""What a GGUF file is and what runs it, from its header and the maps of its expert groups."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mopeq_edge.errors import printable
from mopeq_edge.expert_groups.layout import VERSION
from mopeq_edge.expert_groups.read import GroupedStack, is_part, read_groups
from mopeq_edge.ggml.types import GgmlType
from mopeq_edge.gguf_file import MAGIC, GGUFHeader
from mopeq_edge.model_keys import check_model_keys
from mopeq_edge.plan.artifact import PER_EXPERT, STOCK
from mopeq_edge.source.roles import role_of
from mopeq_edge.split import read_parts
from mopeq_edge.units import plural
from mopeq_edge.vision.mmproj import is_mmproj


@dataclass(frozen=True)
class Summary:
    """Sizes in bytes. ``layout`` is ``stock`` or ``per-expert``; ``bytes_by_type`` is tensor data, largest first."""

    path: Path
    layout: str
    architecture: str | None
    """``general.architecture``; None for what is no model, an imatrix, say."""
    kind: str
    """``general.type`` of what is no model, or sees for one."""
    n_layer: int
    n_expert: int
    n_expert_used: int
    file_bytes: int
    header_bytes: int
    n_tensors: int
    n_weights: int
    bytes_by_type: dict[str, int]
    bytes_by_role: dict[str, int]
    stacks: tuple[GroupedStack, ...]
    projector: str | None = None
    """How what sees pictures joins its model, of an mmproj."""

    @property
    def tensor_bytes(self) -> int:
        return sum(self.bytes_by_type.values())

    @property
    def bpw(self) -> float:
        """Tensor data over weights; the maps are no weights."""
        return 8 * self.tensor_bytes / self.n_weights if self.n_weights else 0.0

    def sentence(self) -> str:
        """What the file is, and what runs it."""
        if self.stacks:
            groups = f"{plural(len(self.stacks), 'stack')} of {self.architecture} in groups of different types"
            return (
                f"expert groups, version {VERSION}: {groups}; runs in the llama.cpp that `mopeq-edge runtime install` "
                f"builds; stock llama.cpp refuses it (a tensor such as '{self.stacks[0].name}' is not found)"
            )
        tensors = plural(self.n_tensors, "tensor")
        if self.projector is not None:
            return (
                f"no model but what sees pictures for one (mmproj, {self.projector}), {tensors}; llama.cpp loads both: "
                "-m MODEL --mmproj FILE"
            )
        if self.architecture is None:
            return f"no model but a file of type '{self.kind}', {tensors}"
        return f"stock GGUF of {self.architecture}, {tensors}; runs in any llama.cpp that knows it"

    def as_dict(self) -> dict[str, Any]:
        """Plain values; ``stacks`` has the experts of every group."""
        return {
            "architecture": self.architecture,
            "bpw": self.bpw,
            "bytes_by_role": self.bytes_by_role,
            "bytes_by_type": self.bytes_by_type,
            "description": self.sentence(),
            "expert_groups_version": VERSION if self.stacks else None,
            "file_bytes": self.file_bytes,
            "header_bytes": self.header_bytes,
            "layout": self.layout,
            "n_expert": self.n_expert,
            "n_expert_used": self.n_expert_used,
            "n_layer": self.n_layer,
            "n_tensors": self.n_tensors,
            "n_weights": self.n_weights,
            "projector": self.projector,
            "stacks": {
                stack.name: {
                    "shape": list(stack.shape),
                    "groups": [{"type": g.type.name, "experts": list(g.experts)} for g in stack.groups],
                }
                for stack in self.stacks
            },
            "tensor_bytes": self.tensor_bytes,
        }


def summarise(path: Path) -> Summary:
    """Read and check ``path``, given the first file of a split GGUF all of them.

    Raises :class:`FormatError` for whatever is wrong with the structure.

    Checked are the header, that every tensor lies in the file, and the expert groups; no weights are read.
    """
    headers = read_parts(path)
    header = headers[0]
    infos = [info for part in headers for info in part.tensors]
    stacks = read_groups(*headers)
    shapes = [*((info.name, info.shape) for info in infos), *((stack.name, stack.shape) for stack in stacks)]
    check_model_keys(path, header.kvs, shapes)
    architecture, kind = header.get("general.architecture"), header.get("general.type")
    by_type: Counter[str] = Counter()
    by_role: Counter[str] = Counter()
    for info in infos:
        by_type[info.type.name] += info.nbytes
        by_role[role_of(info.name).value] += info.nbytes
    projector = header.get("clip.projector_type") or header.get("clip.vision.projector_type")
    return Summary(
        path=path,
        layout=PER_EXPERT if stacks else STOCK,
        architecture=architecture if isinstance(architecture, str) else None,
        kind=printable(kind, 80) if isinstance(kind, str) else "unknown",
        n_layer=_number(header, f"{architecture}.block_count"),
        n_expert=_number(header, f"{architecture}.expert_count"),
        n_expert_used=_number(header, f"{architecture}.expert_used_count"),
        file_bytes=sum(part.file_size for part in headers),
        header_bytes=sum(part.data_start for part in headers),
        n_tensors=len(infos),
        n_weights=sum(i.n_weights for i in infos if not (is_part(i.name) and i.name.endswith(".map"))),
        bytes_by_type=dict(by_type.most_common()),
        bytes_by_role=dict(by_role.most_common()),
        stacks=stacks,
        projector=printable(str(projector), 80) if is_mmproj(header) else None,
    )


def summarise_finished(path: Path) -> Summary | None:
    """:func:`summarise` of a GGUF that no conversion can start from, expert groups or an mmproj; else None."""
    if not path.is_file():
        return None
    with path.open("rb") as file:
        if file.read(len(MAGIC)) != MAGIC:
            return None
    found = summarise(path)
    return found if found.stacks or found.projector is not None else None


def experts_by_type(stacks: Iterable[GroupedStack]) -> dict[str, int]:
    """Number of matrices of each type in ``stacks``, by bits per weight."""
    counts: Counter[GgmlType] = Counter()
    for stack in stacks:
        for group in stack.groups:
            counts[group.type] += len(group.experts)
    return {kind.name: counts[kind] for kind in sorted(counts, key=lambda kind: (kind.bpw, kind.name))}


def _number(header: GGUFHeader, key: str) -> int:
    value = header.get(key)
    return value if isinstance(value, int) else 0
