"""Our files against llama-quantize's presets, at equal or fewer bytes and with the same imatrix.

For every preset: llama-quantize makes a file with each imatrix that calibration left; mopeq-edge makes one of at
most as many bytes. All are measured on the same held-out tokens. Prints a Markdown table, or JSON.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from mopeq_edge.cli.console import available_threads, console_progress, print_json
from mopeq_edge.imatrix import ACTIVATION, GRADIENT
from mopeq_edge.pipeline import imatrix_file, open_context, planner_of, run_emit, run_plan, source_gguf
from mopeq_edge.plan.budget import Budget
from mopeq_edge.plan.candidates import FLOORS
from mopeq_edge.plan.options import PlanOptions
from mopeq_edge.runtime.tools import run_tool
from mopeq_edge.study.setup import Setup
from mopeq_edge.units import GB
from tools.measured import comparison_options, measured, numbers

PRESETS = ("Q2_K", "Q3_K_S", "Q3_K_M", "Q4_K_S", "Q4_K_M")


def compare(model: Setup, presets: tuple[str, ...]) -> list[dict[str, Any]]:
    """One row a preset: bytes and what was measured, of theirs by imatrix and of ours."""
    work, source = model.context.work, str(source_gguf(model.context))
    rows = []
    for preset in presets:
        theirs: dict[str, Any] = {}
        for kind in (ACTIVATION, GRADIENT):
            path = work.file(f"preset-{preset}-{kind}.gguf")
            run_tool("llama-quantize", ["--imatrix", str(work.file(imatrix_file(kind))), source, str(path), preset])
            theirs[kind] = numbers(model, path)
        budget = Budget(gb=min(found["bytes"] for found in theirs.values()) / GB)
        options = PlanOptions("fisher", model.types, FLOORS)
        plan = run_plan(
            model.context, planner_of(model.context, model.table, model.calibrated.statistics, options), budget
        )
        ours: dict[str, Any] = {}
        for kind in (ACTIVATION, GRADIENT):
            path = work.file(f"ours-{preset}-{kind}.gguf")
            run_emit(model.context, plan, model.calibrated.statistics, path, kind)
            ours[kind] = numbers(model, path)
        rows.append({"preset": preset, "llama_quantize": theirs, "mopeq_edge": ours, "predicted_kld": plan.damage})
    return rows


def markdown(rows: list[dict[str, Any]], kind: str) -> str:
    """The table for one imatrix, ours with the same one."""
    lines = [
        "| preset | its bytes | our bytes | its mean KLD | our mean KLD | ratio | its 99.9 % | our 99.9 % "
        "| its same top | our same top | its PPL | our PPL |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        a, b = row["llama_quantize"][kind], row["mopeq_edge"][kind]
        lines.append(
            f"| {row['preset']} | {a['bytes']:,} | {b['bytes']:,} | {a['kld_mean_nats']:.5f} "
            f"| {b['kld_mean_nats']:.5f} | {b['kld_mean_nats'] / a['kld_mean_nats']:.2f} "
            f"| {a['kld_p99_9_nats']:.3f} | {b['kld_p99_9_nats']:.3f} | {a['same_top_fraction']:.3f} "
            f"| {b['same_top_fraction']:.3f} | {a['ppl']:.2f} | {b['ppl']:.2f} |"
        )
    return "\n".join(lines)


@click.command()
@comparison_options
@click.option("--presets", default=",".join(PRESETS), show_default=True, help="Presets of llama-quantize.")
def main(
    model: Path, text: Path | None, eval_text: Path | None, work_dir: Path, presets: str, types: str, as_json: bool
) -> None:
    """Compare our files with llama-quantize's presets on MODEL."""
    with console_progress() as progress:
        context = open_context(model, work_dir, pre=None, threads=available_threads(), progress=progress)
        rows = compare(measured(context, text, eval_text, types), tuple(presets.split(",")))
    if as_json:
        print_json(rows)
        return
    for kind in (ACTIVATION, GRADIENT):
        click.echo(f"\nBoth quantized with the {kind} imatrix:\n\n{markdown(rows, kind)}")


if __name__ == "__main__":
    main()
