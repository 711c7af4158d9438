"""What calibration with pictures takes and changes, on test-size models with random weights.

``python -m tools.bench.images`` calibrates each on the bundled text with and without 8 pictures (CPU time of every
step), plans from text alone, from pictures alone and from both by halves, and prices each plan by the statistics of
text and of pictures, in nats per token.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import numpy as np
from PIL import Image

from mopeq_edge.cli.console import print_json
from mopeq_edge.pipeline import open_context, planner_of, run_sensitivity
from mopeq_edge.pipeline_calibrate import CalibrationRequest, load_routing_by_kind, run_calibrate
from mopeq_edge.pipeline_context import Context
from mopeq_edge.pipeline_pictures import PicturesRequest
from mopeq_edge.plan.artifact import PER_EXPERT, Plan, PlannedTensor
from mopeq_edge.plan.budget import Budget
from mopeq_edge.plan.candidates import parse_types
from mopeq_edge.plan.options import PlanOptions
from mopeq_edge.progress import SilentProgress, Step
from mopeq_edge.sensitivity.scores import FISHER
from mopeq_edge.sensitivity.table import SensitivityTable
from tools.vision_language_checkpoints import EXAMPLE, Options, write_checkpoint
from tools.vision_language_configs import MOLMOE, TINY

N_PICTURES, N_WINDOWS, N_CTX, BPW = 8, 16, 64, 5.5
WEIGHTS = {"text": 0.0, "half": 0.5, "pictures": 1.0}


class Clock(SilentProgress):
    """CPU seconds of every step."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def step(self, title: str, total: float | None, unit: str = "") -> Iterator[Step]:
        """Time the block."""
        before = time.process_time()
        with super().step(title, total, unit) as step:
            yield step
        self.seconds[title] = self.seconds.get(title, 0.0) + time.process_time() - before


def write_pictures(folder: Path) -> None:
    """Smooth colours with noise, of several shapes."""
    folder.mkdir()
    for i in range(N_PICTURES):
        random = np.random.default_rng(i)
        small = random.integers(0, 256, (3 + i % 3, 3 + i % 4, 3), dtype=np.uint8)
        size = (40 + 30 * (i % 4), 40 + 25 * (i % 3))
        Image.fromarray(small).resize(size, Image.Resampling.BICUBIC).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"Colours that flow, number {i}.")


def priced(plan: Plan, table: SensitivityTable) -> float:
    """Damage of ``plan`` by ``table``, in nats."""
    total = 0.0
    for tensor in plan.tensors:
        if not plan.is_quantized(tensor):
            continue
        errors = table.require(tensor.name, FISHER)
        damage, kind = errors.damage[FISHER], tensor.written_as()
        groups = [(kind, slice(None))] if not isinstance(kind, tuple) else [(g.type, list(g.experts)) for g in kind]
        total += sum(float(damage[errors.types.index(k.name)][experts].sum()) for k, experts in groups)
    return total


def unlike(plan: Plan, other: Plan) -> int:
    """Matrices of experts that have another type."""
    found = 0
    for mine, theirs in zip(plan.tensors, other.tensors, strict=True):
        if mine.role == "expert":
            found += sum(a != b for a, b in zip(types_of(mine), types_of(theirs), strict=True))
    return found


def types_of(tensor: PlannedTensor) -> list[str]:
    """Of every expert of a stack."""
    kind = tensor.written_as()
    if not isinstance(kind, tuple):
        return [kind.name] * tensor.shape[2]
    by_expert = {expert: group.type.name for group in kind for expert in group.experts}
    return [by_expert[expert] for expert in sorted(by_expert)]


def measure(context: Context, clock: Clock, pictures: Path) -> dict[str, Any]:
    """Everything of one model."""
    text = (EXAMPLE / "calibration.txt").read_text(encoding="utf-8")
    request = CalibrationRequest(text=text, dataset="calibration.txt", n_ctx=N_CTX, chunks=N_WINDOWS)
    run_calibrate(context, request)
    alone, clock.seconds = clock.seconds, {}
    options = PlanOptions(FISHER, parse_types("Q4_0,Q5_0,Q8_0"), {}, PER_EXPERT)
    tables, plans = {}, {}
    for name, weight in WEIGHTS.items():
        own = replace(request, pictures=PicturesRequest(pictures, weight=weight))
        found = run_calibrate(context, own)
        if name == "text":
            both = dict(clock.seconds)
        tables[name] = run_sensitivity(context, found, options.types, "gradient", None)
        plans[name] = planner_of(context, tables[name], found.statistics, options).plan(Budget(bpw=BPW))
    routing = load_routing_by_kind(context.work)
    assert routing is not None
    said = routing.as_dict()
    return {
        "cpu_seconds_text": alone,
        "cpu_seconds_with_pictures": both,
        "tokens": said["tokens"],
        "experts_alone": said["experts_alone"],
        "routing_distance": said["routing_distance"],
        "damage_nats": {
            by: {name: priced(plan, tables[by]) for name, plan in plans.items()} for by in ("text", "pictures")
        },
        "expert_matrices_unlike_text": {name: unlike(plan, plans["text"]) for name, plan in plans.items()},
    }


@click.command()
@click.option("--threads", type=int, default=1, show_default=True, help="Threads.")
def main(threads: int) -> None:
    """Measure both models; print everything as JSON."""
    result = {}
    with tempfile.TemporaryDirectory() as folder:
        pictures = Path(folder) / "pictures"
        write_pictures(pictures)
        for name in (TINY, MOLMOE):
            model = write_checkpoint(Path(folder) / name, Options(name, shrink=True, dtype="bfloat16"))
            clock = Clock()
            work = Path(folder) / f"{name}.mopeq"
            context = open_context(model, work, pre=None, threads=threads, progress=clock)
            result[name] = measure(context, clock, pictures)
    print_json(result)


if __name__ == "__main__":
    main()
