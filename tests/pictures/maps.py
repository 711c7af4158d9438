"""Plans and files whose experts' types are known."""

from __future__ import annotations

from pathlib import Path

from mopeq_edge.expert_groups.layout import expert_map, file_layout, groups_of
from mopeq_edge.ggml.types import BF16, BY_NAME, F32, GgmlType
from mopeq_edge.gguf_layout import string, uint32
from mopeq_edge.pictures.type_map import TypeMap
from mopeq_edge.source.model import SourceTensor

KINDS = {number: BY_NAME[name] for number, name in ((2, "Q2_K"), (3, "Q3_K"), (4, "Q4_K"))}

DIGITS = {
    (0, "gate"): "2342",
    (0, "up"): "3333",
    (0, "down"): "4422",
    # layer 1 is dense
    (2, "gate"): "2224",
    (2, "up"): "3432",
    (2, "down"): "4444",
}
"""Bits of four experts."""


def types(digits: dict[tuple[int, str], str] = DIGITS) -> dict[tuple[int, str], tuple[GgmlType, ...]]:
    return {key: tuple(KINDS[int(digit)] for digit in row) for key, row in digits.items()}


def type_map(digits: dict[tuple[int, str], str] = DIGITS) -> TypeMap:
    return TypeMap("x.gguf", "per-expert", "olmoe", 1_234_567, 3.25, types(digits))


def write(path: Path, digits: dict[tuple[int, str], str] = DIGITS) -> Path:
    """A GGUF of zeros with these experts, a router, and a dense layer 1."""
    own = types(digits)
    stacks = {
        SourceTensor(f"blk.{n}.ffn_{p}_exps.weight", (256, 2, len(row)), BF16): groups_of(row)
        for (n, p), row in own.items()
    }
    others = [
        SourceTensor("blk.0.ffn_gate_inp.weight", (256, 4), F32),
        SourceTensor("blk.1.ffn_gate.weight", (256, 2), F32),
        SourceTensor("blk.0.ffn_gate_exps.bias", (2, 4), F32),
    ]
    kinds = {t.name: kind for t, kind in stacks.items()} | {t.name: t.type for t in others}
    kvs = {
        "general.architecture": string("olmoe"),
        **{f"olmoe.{key}": uint32(4) for key in ("block_count", "expert_used_count")},
        "olmoe.expert_count": uint32(max(len(row) for row in own.values())),
    }
    place = file_layout(kvs, [*stacks, *others], kinds)
    with path.open("wb") as file:
        file.write(place.header)
        for info in place.tensors:
            groups = kinds.get(info.name.removesuffix(".map") + ".weight")
            is_map = info.name.endswith(".map") and isinstance(groups, tuple)
            file.write(expert_map(groups, info.shape[1]).tobytes() if is_map else bytes(info.nbytes))
            file.write(bytes(-file.tell() % 32))
    return path
