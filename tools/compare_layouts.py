"""The per-expert layout against the stock layout: the same model, sensitivity, imatrix and bytes, measured KLD.

For every budget both layouts are planned, written, and measured on the same held-out tokens. Prints a Markdown table,
or JSON.
"""

from __future__ import annotations

import math
from typing import Any

import click

from mopeq_edge.pipeline import planner_of, run_emit, run_plan
from mopeq_edge.plan.artifact import PER_EXPERT, STOCK
from mopeq_edge.plan.budget import Budget
from mopeq_edge.plan.candidates import FLOORS
from mopeq_edge.plan.options import PlanOptions
from mopeq_edge.source.roles import Role
from mopeq_edge.study.setup import Setup
from tools.measured import comparison_options, numbers, print_comparison

BUDGETS_GB = (0.0066, 0.0070, 0.0075, 0.0080, 0.0085, 0.0092)
"""The bundled model's experts have 2.7 to 4.1 bits per weight in these."""


def compare(model: Setup, budgets: tuple[float, ...]) -> list[dict[str, Any]]:
    """One row a budget in GB: bytes, bits per weight of the experts, predicted and measured KLD in both layouts."""
    rows = []
    for budget in budgets:
        row: dict[str, Any] = {"budget_gb": budget}
        for layout in (STOCK, PER_EXPERT):
            options = PlanOptions("fisher", model.types, FLOORS, layout)
            plan = run_plan(
                model.context,
                planner_of(model.context, model.table, model.calibrated.statistics, options),
                Budget(gb=budget),
            )
            path = model.context.work.file(f"{layout}-{budget}.gguf")
            run_emit(model.context, plan, model.calibrated.statistics, path)
            experts = [t for t in plan.tensors if t.role == Role.EXPERT.value]
            bpw = 8 * sum(t.nbytes for t in experts) / sum(math.prod(t.shape) for t in experts)
            row[layout] = {"expert_bpw": bpw, "predicted_kld_nats": plan.damage, **numbers(model, path)}
        rows.append(row)
    return rows


def markdown(rows: list[dict[str, Any]]) -> str:
    """The table, stock first; ratios are per-expert over stock."""
    lines = [
        "| budget, GB | experts, bpw | stock, bytes | per-expert, bytes | mean KLD, stock | per-expert | ratio "
        "| predicted ratio | 99.9 % KLD, stock | per-expert | ratio | same top, stock | per-expert |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        a, b = row[STOCK], row[PER_EXPERT]

        def ratio(key: str, ours: dict[str, float] = b, theirs: dict[str, float] = a) -> str:
            return f"{ours[key] / theirs[key]:.2f}"

        lines.append(
            f"| {row['budget_gb']} | {b['expert_bpw']:.2f} | {a['bytes']:,} | {b['bytes']:,} "
            f"| {a['kld_mean_nats']:.5f} | {b['kld_mean_nats']:.5f} | {ratio('kld_mean_nats')} "
            f"| {ratio('predicted_kld_nats')} | {a['kld_p99_9_nats']:.3f} | {b['kld_p99_9_nats']:.3f} "
            f"| {ratio('kld_p99_9_nats')} | {a['same_top_fraction']:.3f} | {b['same_top_fraction']:.3f} |"
        )
    return "\n".join(lines)


@click.command()
@comparison_options
@click.option("--budgets", default=",".join(map(str, BUDGETS_GB)), show_default=True, help="File sizes in GB.")
def main(**given: Any) -> None:
    """Compare both layouts on MODEL."""
    print_comparison(compare, markdown, given)


if __name__ == "__main__":
    main()
