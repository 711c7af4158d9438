"""Finished files with their plan and source, and ways to damage them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from converters import CONVERTERS
from mopeq_edge.emit import emit, planned_files
from mopeq_edge.expert_groups.layout import ExpertGroup, Types
from mopeq_edge.ggml.library import load_ggml
from mopeq_edge.ggml.types import BY_NAME, GgmlType
from mopeq_edge.gguf_file import TensorInfo, read_header
from mopeq_edge.gguf_layout import encode_kv
from mopeq_edge.imatrix import Entry, Imatrix
from mopeq_edge.output_kvs import Provenance, output_kvs
from mopeq_edge.plan.artifact import KNAPSACK, PER_EXPERT, Plan, PlannedGroup, PlannedTensor, id_runs, write_plan
from mopeq_edge.progress import SilentProgress
from mopeq_edge.source.model import Source
from mopeq_edge.source.open import open_source

from ..builders import build_olmoe

N_EXPERT = 8
GROUPS = (ExpertGroup(BY_NAME["Q4_0"], (1, 3, 6)), ExpertGroup(BY_NAME["Q8_0"], (0, 2, 4, 5, 7)))


@dataclass(frozen=True)
class Made:
    """A finished file beside its plan and its source."""

    file: Path
    plan: Path
    source: Path


def flat_imatrix(source: Source) -> Imatrix:
    """Every column of every matrix weighs the same: for the types that want an imatrix."""
    entries = {
        t.name: Entry(np.ones((t.n_matrices, t.n_in), np.float32), np.ones(t.n_matrices, np.float32))
        for t in source.tensors
        if t.quantizable
    }
    return Imatrix(entries, ("flat",), 1, 1)


def write_planned(source: Source, types: Types, path: Path, **fields: Any) -> Path:
    """Write ``path`` with a plan of ``types`` beside it in PATH's work directory; returns the plan's path."""
    every: dict[str, Any] = {t.name: types.get(t.name, t.type) for t in source.tensors}
    planned = []
    for t in source.tensors:
        kind = every[t.name]
        if isinstance(kind, GgmlType):
            planned.append(PlannedTensor(t.name, t.role.value, t.shape, kind.name, 0, 0.0))
        else:
            groups = tuple(PlannedGroup(g.type.name, id_runs(g.experts), 0) for g in kind)
            planned.append(PlannedTensor(t.name, t.role.value, t.shape, "mixed", 0, 0.0, groups))
    sizes = {"file_bytes": 0, "header_bytes": 0, "smallest_bytes": 0, "largest_bytes": 0, "budget_bytes": None}
    settings = {"layout": PER_EXPERT, "planner": KNAPSACK, "sensitivity": "fisher", "unit": "nats of KLD per token"}
    rest = {"damage": 0.01, "gap": 0.0, "quantized_with": "activation", "types": (), "made_from": "", "n_weights": 1}
    plan = Plan(**{**sizes, **settings, **rest, "tensors": tuple(planned), **fields})
    imatrix = flat_imatrix(source)
    size = sum(p.file_size for p in planned_files(source, every, output_kvs(source.kvs, 0, imatrix, "", Provenance())))
    plan = replace(plan, file_bytes=size)
    kvs = output_kvs(source.kvs, 0, imatrix, "", Provenance(plan=plan.sha256))
    emit(source, every, kvs, imatrix, load_ggml(), path, threads=1, progress=SilentProgress())
    beside = path.with_name(f"{path.stem}.mopeq") / "plan.json"
    beside.parent.mkdir(exist_ok=True)
    write_plan(plan, beside)
    return beside


def make(directory: Path, **sizes: Any) -> Made:
    """A tiny OLMoE with the experts of the second layer in groups, everything else that is large in Q8_0."""
    model = build_olmoe(directory / "model", n_expert=N_EXPERT, dtype="float32", **sizes)
    source = open_source(model, CONVERTERS, pre="gpt-2")
    q8 = BY_NAME["Q8_0"]
    types: dict[str, Any] = {t.name: q8 for t in source.tensors if t.quantizable}
    types |= {t.name: GROUPS for t in source.tensors if t.layer == 1 and t.projection is not None}
    return Made(directory / "out.gguf", write_planned(source, types, directory / "out.gguf"), model)


def place(path: Path, name: str) -> tuple[TensorInfo, int]:
    """A tensor, and where its bytes begin."""
    header = read_header(path)
    info = next(info for info in header.tensors if info.name == name)
    return info, header.data_start + info.offset


def change(path: Path, name: str, edit: Callable[[npt.NDArray[Any]], None], dtype: str = "u1") -> None:
    """Let ``edit`` change the numbers of a tensor, in numpy's order of axes; of blocks it gets bytes."""
    info, start = place(path, name)
    raw = np.fromfile(path, dtype=np.uint8)
    shape = info.shape[::-1] if dtype != "u1" else (*info.shape[:0:-1], info.type.nbytes(info.shape[0]))
    values = raw[start : start + info.nbytes].view(dtype).reshape(shape)
    edit(values)
    raw.tofile(path)


def swap(path: Path, name: str, a: int, b: int) -> None:
    """Exchange two matrices of a stack or a group."""

    def edit(values: npt.NDArray[Any]) -> None:
        values[[a, b]] = values[[b, a]]

    change(path, name, edit)


def exchange(path: Path, first: str, second: str) -> None:
    """Exchange the bytes of two tensors of one size."""
    raw = np.fromfile(path, dtype=np.uint8)
    (info, a), (other, b) = place(path, first), place(path, second)
    assert info.nbytes == other.nbytes
    here, there = raw[a : a + info.nbytes].copy(), raw[b : b + info.nbytes].copy()
    raw[a : a + info.nbytes], raw[b : b + info.nbytes] = there, here
    raw.tofile(path)


def set_key(path: Path, key: str, value: Any) -> None:
    """Give a key another value of the same bytes."""
    kv = read_header(path).kvs[key]
    before, after = encode_kv(key, kv), encode_kv(key, replace(kv, value=value))
    raw = path.read_bytes()
    assert raw.count(before) == 1
    assert len(before) == len(after)
    path.write_bytes(raw.replace(before, after))
