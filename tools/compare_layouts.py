"""The per-expert layout against the stock layout: the same model, sensitivity, imatrix and bytes, measured KLD.

For every budget both layouts
are planned, written, and measured on the same held-out tokens.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from mopeq_edge.cli.console import available_threads, console_progress, print_json
from mopeq_edge.evaluate.chunks import read_text
from mopeq_edge.evaluate.run import evaluate, make_reference
from mopeq_edge.ggml.types import GgmlType
from mopeq_edge.imatrix import GRADIENT
from mopeq_edge.pipeline import (
    CalibrationRequest,
    Context,
    open_context,
    run_calibrate,
    run_emit,
    run_plan,
    run_sensitivity,
    source_gguf,
)
from mopeq_edge.plan.artifact import PER_EXPERT, STOCK
from mopeq_edge.plan.budget import Budget
from mopeq_edge.plan.candidates import FLOORS, parse_types
from mopeq_edge.plan.make import PlanOptions
from mopeq_edge.progress import Progress

BUDGETS_GB = (0.0060, 0.0065, 0.0070, 0.0075, 0.0085, 0.0095)


def compare(
    context: Context, text: str, evaluation_text: Path, budgets: tuple[float, ...], types: tuple[GgmlType, ...]
) -> list[dict[str, Any]]:
    """One row a budget: bytes, predicted and measured KLD in both layouts."""
    calibrated = run_calibrate(context, CalibrationRequest(text=text, dataset="calibration.txt", chunks=128))
    table = run_sensitivity(context, calibrated, types, GRADIENT, None)
    reference = make_reference(
        source_gguf(context),
        evaluation_text,
        context.work.path,
        n_ctx=256,
        n_chunks=60,
        positions="all",
        source_sha256=context.source_sha256,
        progress=context.progress,
    )
    rows = []
    for budget in budgets:
        row: dict[str, Any] = {"budget_gb": budget}
        for layout in (STOCK, PER_EXPERT):
            options = PlanOptions("fisher", types, FLOORS, layout)
            plan = run_plan(context, table, calibrated.statistics, Budget(gb=budget), options)
            path = context.work.file(f"{layout}-{budget}.gguf")
            run_emit(context, plan, calibrated.statistics, path)
            measured = evaluate(
                path, reference, positions="all", n_threads=context.threads, progress=context.progress
            ).divergence
            row[layout] = {
                "bytes": path.stat().st_size,
                "predicted_kld_nats": plan.damage,
                "kld_mean_nats": measured.kld_mean,
                "kld_p99_9_nats": measured.kld_p99_9,
                "same_top_fraction": measured.same_top,
                "ppl": measured.ppl_target,
            }
        rows.append(row)
    return rows


def markdown(rows: list[dict[str, Any]]) -> str:
    """The table, stock first; ratios are per-expert over stock."""
    lines = [
        "| budget, GB | stock, bytes | per-expert, bytes | mean KLD, stock | per-expert | ratio | predicted ratio "
        "| 99.9 % KLD, stock | per-expert | ratio | same top, stock | per-expert |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        a, b = row[STOCK], row[PER_EXPERT]

        def ratio(key: str, ours: dict[str, float] = b, theirs: dict[str, float] = a) -> str:
            return f"{ours[key] / theirs[key]:.2f}"

        lines.append(
            f"| {row['budget_gb']} | {a['bytes']:,} | {b['bytes']:,} | {a['kld_mean_nats']:.5f} "
            f"| {b['kld_mean_nats']:.5f} | {ratio('kld_mean_nats')} | {ratio('predicted_kld_nats')} "
            f"| {a['kld_p99_9_nats']:.3f} | {b['kld_p99_9_nats']:.3f} | {ratio('kld_p99_9_nats')} "
            f"| {a['same_top_fraction']:.3f} | {b['same_top_fraction']:.3f} |"
        )
    return "\n".join(lines)


@click.command()
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--text", type=click.Path(path_type=Path), help="Calibration text (default: calibration.txt in MODEL).")
@click.option("--eval-text", type=click.Path(path_type=Path), help="Held-out text (default: evaluation.txt in MODEL).")
@click.option("--work-dir", type=click.Path(path_type=Path), required=True, help="Where the artifacts and files go.")
@click.option("--budgets", default=",".join(map(str, BUDGETS_GB)), show_default=True, help="File sizes in GB.")
@click.option("--types", default="default", show_default=True, help="Candidate types: default, k, all, or a list.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of Markdown.")
def main(
    model: Path, text: Path | None, eval_text: Path | None, work_dir: Path, budgets: str, types: str, as_json: bool
) -> None:
    """Compare both layouts on MODEL."""
    progress: Progress
    with console_progress() as progress:
        context = open_context(model, work_dir, pre=None, threads=available_threads(), progress=progress)
        rows = compare(
            context,
            read_text(text or model / "calibration.txt"),
            eval_text or model / "evaluation.txt",
            tuple(float(budget) for budget in budgets.split(",")),
            parse_types(types),
        )
    if as_json:
        print_json(rows)
        return
    click.echo(markdown(rows))


if __name__ == "__main__":
    main()
