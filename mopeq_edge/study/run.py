"""Write, measure and delete the file of each case; what is finished already is not run again."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np

from mopeq_edge.artifacts import file_digest
from mopeq_edge.atomic import remove_leftovers
from mopeq_edge.evaluate.run import evaluate
from mopeq_edge.gguf_file import read_header
from mopeq_edge.pipeline import run_emit
from mopeq_edge.plan.fixed import predicted
from mopeq_edge.progress import SilentProgress
from mopeq_edge.sensitivity.scores import FISHER, Doubles
from mopeq_edge.study.cases import Case
from mopeq_edge.study.presets import write_preset
from mopeq_edge.study.rows import Row, RowFile
from mopeq_edge.study.setup import POSITIONS, Setup

_EXPERT_WEIGHTS = re.compile(r"^blk\.\d+\.ffn_(gate|up|down|gate_up)_exps\.(\d+\.)?weight$")


def run_cases(setup: Setup, cases: Sequence[Case], file: RowFile, *, keep: bool = False) -> list[Row]:
    """The row of every case, in order; new ones go to ``file`` as soon as they are measured.

    The GGUFs are written to ``study`` in the work directory and deleted after their measurement unless ``keep``.
    """
    rows = []
    with setup.context.progress.step("study", len(cases), "files") as step:
        for case in cases:
            made_from = case.made_from(setup)
            row = file.get(case.name, made_from)
            if row is None:
                row = _run(setup, case, made_from, keep)
                file.put(row)
            rows.append(row)
            step.advance()
    return rows


def _run(setup: Setup, case: Case, made_from: str, keep: bool) -> Row:
    folder = setup.context.work.file("study")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{case.name}.gguf"
    remove_leftovers(folder, ".*")
    start = time.monotonic()
    try:
        _write(setup, case, path)
        found = evaluate(path, setup.reference, n_threads=setup.context.threads, positions=POSITIONS)
        fisher, own = _predictions(setup, case)
        return Row(
            case=case.name,
            kind=case.kind,
            sensitivity=case.sensitivity,
            planner=case.planner,
            layout=case.layout,
            budget_bytes=case.budget_bytes,
            file_bytes=found.target_bytes,
            expert_bpw=_expert_bpw(path),
            predicted_fisher=fisher,
            predicted_own=own,
            kld_mean=found.divergence.kld_mean,
            kld_p99_9=found.divergence.kld_p99_9,
            same_top=found.divergence.same_top,
            ppl=found.divergence.ppl_target,
            file_sha256=file_digest(path),
            plan_sha256=case.plan.sha256 if case.plan is not None else "",
            seconds=round(time.monotonic() - start, 2),
            made_from=made_from,
            kld_by_window=found.kld_by_window,
        )
    finally:
        if not keep:
            path.unlink(missing_ok=True)
            with suppress(OSError):
                folder.rmdir()


def _write(setup: Setup, case: Case, path: Path) -> None:
    if case.preset is not None:
        write_preset(setup, case.preset, path)
        return
    assert case.plan is not None
    # one bar for the study, not one for each file
    context = replace(setup.context, progress=SilentProgress())
    run_emit(context, case.plan, setup.calibrated.statistics, path, quantizer=setup.quantizer)


def _predictions(setup: Setup, case: Case) -> tuple[float | None, float | None]:
    """(damage by fisher, damage by the case's own score)"""
    if case.plan is None:
        return None, None
    return predicted_total(setup, case, FISHER), predicted_total(setup, case, case.sensitivity)


def predicted_total(setup: Setup, case: Case, score: str) -> float | None:
    """Damage of the whole file of ``case`` by ``score``; None for a preset or a score that the table lacks."""
    if case.plan is None or score not in setup.table.scores:
        return None
    return math.fsum(predicted(setup.context.source.tensors, case.plan.type_of(), setup.table, score).values())


def predicted_totals(setup: Setup, cases: Sequence[Case]) -> dict[str, Doubles]:
    """The same of several cases with plans [n_cases], by every score of the table."""
    return {
        score: np.array([predicted_total(setup, case, score) or 0.0 for case in cases]) for score in setup.table.scores
    }


def layer_damages(setup: Setup, case: Case, score: str) -> Doubles:
    """Damage of the experts of each layer that has some [n_layers] by ``score``; ``case`` has a plan."""
    assert case.plan is not None
    found = predicted(setup.stacks, case.plan.type_of(), setup.table, score)
    layers = sorted({stack.layer for stack in setup.stacks if stack.layer is not None})
    return np.array([sum(found[s.name] for s in setup.stacks if s.layer == layer) for layer in layers])


def _expert_bpw(path: Path) -> float:
    own = [tensor for tensor in read_header(path).tensors if _EXPERT_WEIGHTS.match(tensor.name)]
    return 8 * sum(tensor.nbytes for tensor in own) / sum(math.prod(tensor.shape) for tensor in own)
