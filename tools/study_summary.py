"""Several finished studies side by side: how models differ, what the per-expert layout brought, and what was best.

For each model and budget: the forecast's statistics, the predicted and the measured ratio of the two layouts (knapsack
by the best score that was measured), and the best and second best case of all that was measured. Reads work
directories, measures nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click

from mopeq_edge.cli.console import console_progress, json_option, print_json
from mopeq_edge.cli.study import ROWS
from mopeq_edge.ggml.types import BY_NAME
from mopeq_edge.pipeline import Context, load_sensitivity, open_context, planner_of, run_forecast
from mopeq_edge.pipeline_calibrate import load_statistics
from mopeq_edge.plan.artifact import KNAPSACK, PER_EXPERT, STOCK
from mopeq_edge.plan.budget import Budget
from mopeq_edge.plan.candidates import FLOORS
from mopeq_edge.plan.forecast import Forecast
from mopeq_edge.plan.options import PlanOptions
from mopeq_edge.sensitivity.scores import BEST
from mopeq_edge.study.bootstrap import Estimate, ratio_estimate
from mopeq_edge.study.report import Entry, entries, label
from mopeq_edge.study.rows import Row, RowFile
from mopeq_edge.units import GB


@dataclass(frozen=True)
class Compared:
    """One model at one budget; ``ratio`` is the KLD of per-expert over that of stock."""

    model: str
    budget_bytes: int
    expert_bpw: float
    kld_stock: float
    kld_per_expert: float
    ratio: Estimate
    forecast: Forecast
    best: str
    second: str
    above_best: Estimate

    @property
    def measured_over_predicted(self) -> float:
        return self.ratio.value / self.forecast.ratio


def compare(name: str, context: Context, rows: Sequence[Row]) -> list[Compared]:
    """All budgets of one study that have both layouts."""
    table, statistics = load_sensitivity(context.work), load_statistics(context)
    kinds = sorted({kind for errors in table.errors.values() for kind in errors.types[:-1]})
    types = tuple(sorted((BY_NAME[kind] for kind in kinds), key=lambda kind: (kind.bpw, kind.name)))
    found = []
    by_budget: dict[int, list[Entry]] = {}
    for entry in entries(rows):
        by_budget.setdefault(entry.row.budget_bytes or 0, []).append(entry)
    for budget_bytes, own in sorted(by_budget.items()):
        planned = {(e.row.sensitivity, e.row.layout): e.row for e in own if e.row.planner == KNAPSACK}
        score = next((s for s in BEST if {(s, STOCK), (s, PER_EXPERT)} <= planned.keys()), None)
        if score is None:
            continue
        stock, per_expert = planned[score, STOCK], planned[score, PER_EXPERT]
        options, budget = PlanOptions(score, types, FLOORS), Budget(gb=budget_bytes / GB)
        planner = planner_of(context, table, statistics, options)
        plan = planner.plan(budget)
        forecast = run_forecast(planner, statistics.routing, budget, plan)
        assert forecast is not None, "the knapsack has both layouts"
        found.append(
            Compared(
                name,
                budget_bytes,
                per_expert.expert_bpw,
                stock.kld_mean,
                per_expert.kld_mean,
                ratio_estimate(per_expert.kld_by_window, stock.kld_by_window),
                forecast,
                _case(own[0]),
                _case(own[1]),
                own[1].above_best,
            )
        )
    return found


def markdown(found: Sequence[Compared]) -> str:
    """Two tables: the layouts, and the best case of each budget."""
    lines = [
        "| model | budget, MB | experts, bpw | routing skew | damage spread | coding gain | KLD, stock | per-expert "
        "| ratio | 95 % | predicted | measured / predicted |",
        "|" + "---|" * 12,
    ]
    for one in found:
        f = one.forecast
        lines.append(
            f"| {one.model} | {one.budget_bytes / 1e6:g} | {one.expert_bpw:.2f} | {f.routing_skew or 0:.2f} "
            f"| {f.damage_spread:.2f} | {f.coding_gain:.2f} | {one.kld_stock:.5f} | {one.kld_per_expert:.5f} "
            f"| {one.ratio.value:.2f} | {one.ratio.low:.2f} to {one.ratio.high:.2f} | {f.ratio:.2f} "
            f"| {one.measured_over_predicted:.2f} |"
        )
    lines += ["", "| model | budget, MB | best | second | above the best, 95 % |", "|" + "---|" * 5]
    for one in found:
        gap = f"{one.above_best.low:.5f} to {one.above_best.high:.5f}"
        noise = " (within noise)" if one.above_best.low <= 0 else ""
        lines.append(f"| {one.model} | {one.budget_bytes / 1e6:g} | {one.best} | {one.second} | {gap}{noise} |")
    return "\n".join(lines)


def _case(entry: Entry) -> str:
    row = entry.row
    return f"{label(row)}, {row.layout}" + (f", {row.sensitivity}" if row.sensitivity else "")


def _as_dict(one: Compared) -> dict[str, Any]:
    return {**asdict(one), "forecast": one.forecast.as_dict(), "measured_over_predicted": one.measured_over_predicted}


@click.command()
@click.argument("studies", nargs=-1, required=True)
@json_option
def main(studies: tuple[str, ...], as_json: bool) -> None:
    """Compare finished STUDIES, each given as MODEL=WORK_DIRECTORY."""
    found: list[Compared] = []
    with console_progress() as progress:
        for study in studies:
            model, _, work = study.partition("=")
            context = open_context(Path(model), Path(work), pre=None, threads=1, progress=progress)
            found += compare(Path(model).name, context, RowFile(Path(work) / ROWS).rows)
    if as_json:
        print_json([_as_dict(one) for one in found])
    else:
        click.echo(markdown(found))


if __name__ == "__main__":
    main()
