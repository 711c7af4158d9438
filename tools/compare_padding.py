"""Padded experts against 32-wide types: the same model, sensitivity, imatrix and bytes, measured KLD.

``python -m tools.narrow_experts examples/tiny-olmoe NARROW`` makes a model to try it on: experts 224 wide, which is to
256 as DeepSeek-VL2-Tiny's 896 is to 1024. Prints a Markdown table, or JSON.
"""

from __future__ import annotations

from typing import Any

import click

from mopeq_edge.pipeline import planner_of, run_emit, run_plan, run_sensitivity
from mopeq_edge.plan.artifact import LAYOUTS
from mopeq_edge.plan.budget import Budget
from mopeq_edge.plan.candidates import FLOORS
from mopeq_edge.plan.options import ALWAYS, AUTO, NEVER, PlanOptions
from mopeq_edge.study.setup import Setup
from tools.measured import comparison_options, numbers, print_comparison

BUDGETS_GB = (0.0060, 0.0065, 0.0070, 0.0080)


def compare(model: Setup, budgets: tuple[float, ...]) -> list[dict[str, Any]]:
    """A row for each budget in GB and layout: predicted and measured KLD of both ways, and what the planner takes."""
    context, statistics = model.context, model.calibrated.statistics
    # with the types that only padded rows take
    table = run_sensitivity(context, model.calibrated, model.types, statistics.richest, None)
    rows = []
    for budget in budgets:
        for layout in LAYOUTS:
            row: dict[str, Any] = {"budget_gb": budget, "layout": layout}
            for way in (NEVER, ALWAYS, AUTO):
                options = PlanOptions("fisher", model.types, FLOORS, layout, pad_experts=way)
                plan = run_plan(context, planner_of(context, table, statistics, options), Budget(gb=budget))
                if way == AUTO:
                    row[way] = NEVER if plan.expert_padding is None else ALWAYS
                    continue
                path = context.work.file(f"padding-{way}.gguf")
                run_emit(context, plan, statistics, path)
                row[way] = {"predicted_kld_nats": plan.damage, **numbers(model, path)}
            rows.append(row)
    return rows


def markdown(rows: list[dict[str, Any]]) -> str:
    """The table; ratios are padded over not padded."""
    lines = [
        "| budget, GB | layout | mean KLD, not padded | padded | ratio | predicted ratio | 99.9 % KLD, not padded "
        "| padded | same top, not padded | padded | the planner pads |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        a, b = row[NEVER], row[ALWAYS]
        measured_ratio, predicted = (b[key] / a[key] for key in ("kld_mean_nats", "predicted_kld_nats"))
        lines.append(
            f"| {row['budget_gb']} | {row['layout']} | {a['kld_mean_nats']:.5f} | {b['kld_mean_nats']:.5f} "
            f"| {measured_ratio:.2f} | {predicted:.2f} "
            f"| {a['kld_p99_9_nats']:.3f} | {b['kld_p99_9_nats']:.3f} | {a['same_top_fraction']:.3f} "
            f"| {b['same_top_fraction']:.3f} | {'yes' if row[AUTO] == ALWAYS else 'no'} |"
        )
    return "\n".join(lines)


@click.command()
@comparison_options
@click.option("--budgets", default=",".join(map(str, BUDGETS_GB)), show_default=True, help="File sizes in GB.")
def main(**given: Any) -> None:
    """Compare both ways on MODEL."""
    print_comparison(compare, markdown, given)


if __name__ == "__main__":
    main()
