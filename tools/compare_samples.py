"""What measuring a few rows of each expert costs in a plan: sampled tables against the table of all rows.

For every budget and layout a plan is made from either table, at the same bytes. Both are judged by the table of all
rows (the ratio of damages, 1 for the same plan) and by the KL divergence that their files have on held-out text. Prints
a Markdown table, or JSON.
"""

from __future__ import annotations

from typing import Any

import click

from mopeq_edge.ggml.types import GgmlType
from mopeq_edge.pipeline import planner_of, run_emit, run_plan, run_sensitivity
from mopeq_edge.plan.artifact import PER_EXPERT, STOCK, Plan
from mopeq_edge.plan.budget import Budget
from mopeq_edge.plan.candidates import FLOORS
from mopeq_edge.plan.options import PlanOptions
from mopeq_edge.sensitivity.scores import FISHER
from mopeq_edge.sensitivity.table import SensitivityTable
from mopeq_edge.study.setup import Setup
from tools.measured import comparison_options, numbers, print_comparison

BUDGETS_GB = (0.0066, 0.0075, 0.0085)
SAMPLES = ((16, False), (32, False), (16, True), (32, True))
"""Fixed numbers of rows, and whether no others are read; ``auto`` begins with 16 and measures tensors as small as the
bundled model's whole."""


def damage_by(table: SensitivityTable, plan: Plan) -> float:
    """What ``table`` predicts of ``plan``, in nats per token."""
    total = 0.0
    for name, kind in plan.type_of().items():
        own = table.errors.get(name)
        if own is None:
            continue
        groups = [(kind, range(len(own.norms)))] if isinstance(kind, GgmlType) else [(g.type, g.experts) for g in kind]
        for of, experts in groups:
            total += float(own.damage[FISHER][own.types.index(of.name), list(experts)].sum())
    return total


def compare(model: Setup, budgets: tuple[float, ...]) -> list[dict[str, Any]]:
    """One row a budget, layout and sample."""
    context, statistics = model.context, model.calibrated.statistics
    kind = model.table.quantized_with
    tables = {None: model.table}
    for n, only in SAMPLES:
        table = run_sensitivity(context, model.calibrated, model.types, kind, n, rows_only=only)
        tables[n, only] = table.fitting(context.source.tensors)
    rows = []
    for budget in budgets:
        for layout in (STOCK, PER_EXPERT):
            found = {}
            for sample, table in tables.items():
                options = PlanOptions(FISHER, model.types, FLOORS, layout)
                plan = run_plan(context, planner_of(context, table, statistics, options), Budget(gb=budget))
                path = context.work.file(f"rows-{layout}-{budget}.gguf")
                run_emit(context, plan, statistics, path)
                found[sample] = {"damage": damage_by(model.table, plan), **numbers(model, path)}
                path.unlink()
            for n, only in SAMPLES:
                error = tables[n, only].relative_error(FISHER)
                row = {"budget_gb": budget, "layout": layout, "rows": n, "rows_only": only, "relative_error": error}
                rows.append({**row, "all": found[None], "sampled": found[n, only]})
    return rows


def markdown(rows: list[dict[str, Any]]) -> str:
    """The table; ratios are sampled over all rows."""
    lines = [
        "| budget, GB | layout | rows | rows read | standard error of a tensor's damage, at most | damage, ratio "
        "| mean KLD, all rows | sampled | ratio |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        a, b = row["all"], row["sampled"]
        lines.append(
            f"| {row['budget_gb']} | {row['layout']} | {row['rows']} | {'those' if row['rows_only'] else 'all'} "
            f"| {row['relative_error']:.3f} "
            f"| {b['damage'] / a['damage']:.4f} | {a['kld_mean_nats']:.5f} | {b['kld_mean_nats']:.5f} "
            f"| {b['kld_mean_nats'] / a['kld_mean_nats']:.3f} |"
        )
    return "\n".join(lines)


@click.command()
@comparison_options
@click.option("--budgets", default=",".join(map(str, BUDGETS_GB)), show_default=True, help="Budgets in GB.")
def main(**given: Any) -> None:
    """Compare plans from some rows of MODEL's experts with plans from all rows."""
    print_comparison(compare, markdown, given)


if __name__ == "__main__":
    main()
