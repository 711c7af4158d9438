"""Plans of other sizes from the artifacts alone: no checkpoint is opened."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mopeq_edge.errors import PlanError
from mopeq_edge.expert_groups.layout import VERSION_KEY
from mopeq_edge.ggml.types import BY_NAME
from mopeq_edge.gguf_file import KV, GGUFHeader
from mopeq_edge.plan.artifact import KNAPSACK, PER_EXPERT, STOCK, Plan
from mopeq_edge.plan.budget import Budget
from mopeq_edge.plan.candidates import FLOORS
from mopeq_edge.plan.make import Planner, size_range
from mopeq_edge.plan.options import NEVER, PlanOptions
from mopeq_edge.progress import Progress
from mopeq_edge.sensitivity.table import SensitivityTable
from mopeq_edge.source.model import Bytes, Floats, SourceTensor, mark_mtp

WIDEST = 2
"""The largest replan, as a multiple of the file."""


@dataclass(frozen=True)
class PlannedSource:
    """Names, shapes and key-values of a planned file's source, as far as planning asks: nothing can be read."""

    path: Path
    architecture: str
    kvs: Mapping[str, KV]
    tensors: tuple[SourceTensor, ...]
    kind: str = "gguf"
    warnings: tuple[str, ...] = ()
    files: tuple[Path, ...] = ()

    def read(self, tensor: SourceTensor, matrix: int = 0, rows: slice | None = None) -> Floats:
        raise NotImplementedError(f"{self.path}: a plan has no weights")

    def read_stored(self, tensor: SourceTensor, matrix: int = 0, rows: slice | None = None) -> Bytes:
        raise NotImplementedError(f"{self.path}: a plan has no weights")


@dataclass(frozen=True)
class Point:
    """A plan of ``layout``: bytes of its file and predicted damage."""

    layout: str
    file_bytes: int
    damage: float


@dataclass(frozen=True)
class Curve:
    """Plans of rising budgets in both layouts. ``same_rules``: a replan of this file's size has this file's damage, so
    floors and padding are those that it was planned with."""

    score: str
    unit: str
    points: tuple[Point, ...]
    same_rules: bool

    def as_dict(self) -> dict[str, Any]:
        points = [{"layout": p.layout, "file_bytes": p.file_bytes, "damage": p.damage} for p in self.points]
        return {"points": points, "same_rules": self.same_rules, "score": self.score, "unit": self.unit}


def planned_source(plan: Plan, table: SensitivityTable, header: GGUFHeader) -> PlannedSource:
    """The source of ``plan`` by what the table says of its types; experts are padded as they are in the plan."""
    kvs = {k: v for k, v in header.kvs.items() if k != VERSION_KEY and not k.startswith("split.")}
    tensors = []
    for tensor in plan.tensors:
        errors = table.errors.get(tensor.name)
        own = BY_NAME[errors.types[-1] if errors is not None else tensor.type]
        tensors.append(SourceTensor(tensor.name, tensor.shape, own))
    architecture = str(header.get("general.architecture"))
    return PlannedSource(header.path, architecture, kvs, mark_mtp(tensors, architecture, kvs))


def replan(plan: Plan, table: SensitivityTable, header: GGUFHeader, n_points: int, progress: Progress) -> Curve:
    """``n_points`` plans by the knapsack in each layout, from the smallest file up, with the plan's score and types.

    Raises :class:`PlanError` where the table has no damages for them.
    """
    source = planned_source(plan, table, header)
    types = tuple(BY_NAME[name] for name in plan.types)

    options = PlanOptions(plan.sensitivity, types, FLOORS, pad_experts=NEVER)
    planner = Planner(source, table, source.kvs, options)
    smallest, largest = size_range(source, source.kvs, options, has_imatrix=True)
    largest = max(min(largest, int(WIDEST * plan.file_bytes)), smallest)
    budgets = sorted({int(b) for b in np.geomspace(smallest, largest, n_points)})
    points: list[Point] = []
    with progress.step("Planning other sizes", 2 * len(budgets) + 1) as step:
        for layout in (STOCK, PER_EXPERT):
            for budget in budgets:
                made = planner.plan(Budget(nbytes=budget), layout, proven=False)
                points.append(Point(layout, made.file_bytes, made.damage))
                step.advance()
        same = plan.planner == KNAPSACK and plan.budget_bytes is not None
        if same:
            try:
                again = planner.plan(Budget(nbytes=plan.budget_bytes), plan.layout, proven=False)
                same = again.damage <= plan.damage * (1 + 1e-9)
            except PlanError:
                # lower floors allow smaller files than these
                same = False
        step.advance()
    return Curve(plan.sensitivity, plan.unit, tuple(dict.fromkeys(points)), same)
