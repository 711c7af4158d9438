"""What a study found: cases by budget and KLD, with what is within noise of the best, and how scores predict."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from mopeq_edge.plan.artifact import KNAPSACK
from mopeq_edge.sensitivity.scores import IN_NATS, WEIGHT_MSE, Doubles
from mopeq_edge.study.bootstrap import Estimate, mean_estimate, rank_estimate
from mopeq_edge.study.cases import PLAN, Case
from mopeq_edge.study.controls import RANDOM
from mopeq_edge.study.fit import FEWEST_MAPS, left_out
from mopeq_edge.study.ground_truth import Correlation
from mopeq_edge.study.rows import Row
from mopeq_edge.study.run import layer_damages, predicted_totals
from mopeq_edge.study.setup import Setup

FEWEST = 5
"""Files that a correlation is stated of, at least."""


@dataclass(frozen=True)
class Entry:
    """One case: its mean KLD, and how much that is above the best case of its budget; nats."""

    row: Row
    kld: Estimate
    above_best: Estimate

    @property
    def within_noise(self) -> bool:
        """Whether zero is in the interval of the difference to the best."""
        return self.above_best.low <= 0


def entries(rows: Iterable[Row]) -> list[Entry]:
    """By budget, then KLD. Differences are paired: the same windows are drawn for both files."""
    by_budget: dict[int, list[Row]] = {}
    for row in rows:
        by_budget.setdefault(row.budget_bytes or 0, []).append(row)
    found: list[Entry] = []
    for _, own in sorted(by_budget.items()):
        own = sorted(own, key=lambda row: (row.kld_mean, row.case))
        best = np.array(own[0].kld_by_window)
        for row in own:
            windows = np.array(row.kld_by_window)
            found.append(Entry(row, mean_estimate(windows), mean_estimate(windows - best)))
    return found


def predictors(setup: Setup, cases: Sequence[Case], rows: Sequence[Row]) -> list[Correlation]:
    """Rho of every score's predicted damage with the KLD: over the plans and controls of each budget, and over its
    random maps of each layout, which have the same bytes and the same types."""
    sets: dict[str, list[int]] = {}
    for index, case in enumerate(cases):
        if case.plan is None:
            continue
        sets.setdefault(f"all plans, {case.budget_bytes} bytes", []).append(index)
        if case.planner.startswith(RANDOM):
            sets.setdefault(f"{RANDOM} maps, {case.layout}, {case.budget_bytes} bytes", []).append(index)
    found: list[Correlation] = []
    for scope, members in sets.items():
        if len(members) < FEWEST:
            continue
        by_window = np.array([rows[i].kld_by_window for i in members])
        own = []
        for score, values in predicted_totals(setup, [cases[i] for i in members]).items():
            own.append(Correlation(score, scope, len(members), rank_estimate(values, by_window)))
        if scope.startswith(RANDOM) and len(members) >= FEWEST_MAPS:
            own += _fitted(setup, [cases[i] for i in members], by_window, scope)
        found += sorted(own, key=lambda one: -one.rho.value if math.isfinite(one.rho.value) else 2)
    return found


def _fitted(setup: Setup, cases: Sequence[Case], by_window: Doubles, scope: str) -> list[Correlation]:
    """Of the scores in nats with a factor for each layer, each map predicted by factors fitted to the others."""
    measured, found = by_window.mean(axis=1), []
    for score in sorted(IN_NATS.intersection(setup.table.scores)):
        damage = np.array([layer_damages(setup, case, score) for case in cases])
        rho = rank_estimate(left_out(damage, measured), by_window)
        found.append(Correlation(f"{score}, fitted by layer", scope, len(cases), rho))
    return found


def markdown(found: Sequence[Entry]) -> str:
    """The table of cases; ``≈`` marks those within noise of the best of their budget."""
    lines = [
        "| budget, bytes | case | layout | sensitivity | bytes | experts, bpw | predicted (fisher) | mean KLD "
        "| 95 % | above the best | 95 % | | 99.9 % KLD | same top | PPL |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    last = None
    for entry in found:
        row = entry.row
        best, last = row.budget_bytes != last, row.budget_bytes
        mark = "best" if best else "≈" if entry.within_noise else ""
        fisher = "" if row.predicted_fisher is None else f"{row.predicted_fisher:.5f}"
        above = ("", "") if best else (f"{entry.above_best.value:.5f}", _interval(entry.above_best, 5))
        budget = f"{row.budget_bytes:,}" if row.budget_bytes is not None else ""
        lines.append(
            f"| {budget} | {label(row)} | {row.layout} | {row.sensitivity} | {row.file_bytes:,} | {row.expert_bpw:.2f} "
            f"| {fisher} | {row.kld_mean:.5f} | {_interval(entry.kld, 5)} | {above[0]} | {above[1]} | {mark} "
            f"| {row.kld_p99_9:.3f} | {row.same_top:.3f} | {row.ppl:.2f} |"
        )
    return "\n".join(lines)


def label(row: Row) -> str:
    """What a case is, for people."""
    if row.case.split("-")[1:2] == ["preset"]:
        return f"llama-quantize {row.case.split('-', 2)[2]}"
    if (row.planner, row.sensitivity) == (KNAPSACK, WEIGHT_MSE) and row.kind == PLAN:
        return f"{row.planner} (weight error only)"
    return row.planner


def correlation_markdown(found: Sequence[Correlation]) -> str:
    """Spearman's rho with its interval, a line each."""
    lines = ["| score | over | n | Spearman's rho | 95 % |", "|---|---|---|---|---|"]
    for one in found:
        lines.append(f"| {one.score} | {one.scope} | {one.n} | {one.rho.value:.2f} | {_interval(one.rho, 2)} |")
    return "\n".join(lines)


def as_json(found: Sequence[Entry], scores: Sequence[Correlation]) -> dict[str, Any]:
    """Plain values: KLD in nats; rho is null where it is not defined."""
    return {
        "cases": [
            {**asdict(e.row), "kld": asdict(e.kld), "above_best": asdict(e.above_best), "within_noise": e.within_noise}
            for e in found
        ],
        "correlations": correlation_json(scores),
    }


def correlation_json(found: Sequence[Correlation]) -> list[dict[str, Any]]:
    """The same of correlations alone."""
    return [
        {**asdict(one), "rho": {k: v if math.isfinite(v) else None for k, v in asdict(one.rho).items()}}
        for one in found
    ]


def _interval(estimate: Estimate, digits: int) -> str:
    return f"{estimate.low:.{digits}f} to {estimate.high:.{digits}f}"
