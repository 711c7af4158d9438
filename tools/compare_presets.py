"""Our files against llama-quantize's presets, at equal or fewer bytes and with the same imatrix.

For every preset: llama-quantize makes a file with each imatrix that calibration left; mopeq-edge makes one of at
most as many bytes. All are measured on the same held-out tokens. Prints a Markdown table, or JSON.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from mopeq_edge.cli.console import available_threads, console_progress, print_json
from mopeq_edge.evaluate.chunks import read_text
from mopeq_edge.evaluate.run import Evaluation, evaluate, make_reference
from mopeq_edge.ggml.types import GgmlType
from mopeq_edge.imatrix import ACTIVATION, GRADIENT
from mopeq_edge.pipeline import (
    CalibrationRequest,
    Context,
    imatrix_file,
    open_context,
    run_calibrate,
    run_emit,
    run_plan,
    run_sensitivity,
    source_gguf,
)
from mopeq_edge.plan.budget import Budget
from mopeq_edge.plan.candidates import FLOORS, parse_types
from mopeq_edge.plan.make import PlanOptions
from mopeq_edge.progress import Progress
from mopeq_edge.runtime.tools import run_tool
from mopeq_edge.units import GB

PRESETS = ("Q2_K", "Q3_K_S", "Q3_K_M", "Q4_K_S", "Q4_K_M")


def compare(
    context: Context, text: str, evaluation_text: Path, presets: tuple[str, ...], types: tuple[GgmlType, ...]
) -> list[dict[str, Any]]:
    """One row a preset: bytes and what was measured, of theirs by imatrix and of ours."""
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

    def measure(path: Path) -> Evaluation:
        return evaluate(path, reference, positions="all", n_threads=context.threads, progress=context.progress)

    rows = []
    for preset in presets:
        theirs: dict[str, Any] = {}
        for kind in (ACTIVATION, GRADIENT):
            path = context.work.file(f"preset-{preset}-{kind}.gguf")
            imatrix = str(context.work.file(imatrix_file(kind)))
            run_tool("llama-quantize", ["--imatrix", imatrix, str(source_gguf(context)), str(path), preset])
            theirs[kind] = _numbers(measure(path))
        budget = Budget(gb=min(numbers["bytes"] for numbers in theirs.values()) / GB)
        plan = run_plan(context, table, calibrated.statistics, budget, PlanOptions("fisher", types, FLOORS))
        ours: dict[str, Any] = {}
        for kind in (ACTIVATION, GRADIENT):
            path = context.work.file(f"ours-{preset}-{kind}.gguf")
            run_emit(context, plan, calibrated.statistics, path, kind)
            ours[kind] = _numbers(measure(path))
        rows.append({"preset": preset, "llama_quantize": theirs, "mopeq_edge": ours, "predicted_kld": plan.damage})
    return rows


def _numbers(result: Evaluation) -> dict[str, float]:
    d = result.divergence
    return {
        "bytes": result.target_bytes,
        "kld_mean_nats": d.kld_mean,
        "kld_p99_9_nats": d.kld_p99_9,
        "ppl": d.ppl_target,
        "same_top_fraction": d.same_top,
    }


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
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--text", type=click.Path(path_type=Path), help="Calibration text (default: calibration.txt in MODEL).")
@click.option("--eval-text", type=click.Path(path_type=Path), help="Held-out text (default: evaluation.txt in MODEL).")
@click.option("--work-dir", type=click.Path(path_type=Path), required=True, help="Where the artifacts and files go.")
@click.option("--presets", default=",".join(PRESETS), show_default=True, help="Presets of llama-quantize.")
@click.option("--types", default="default", show_default=True, help="Our candidate types: default, k, all, or a list.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of Markdown.")
def main(
    model: Path, text: Path | None, eval_text: Path | None, work_dir: Path, presets: str, types: str, as_json: bool
) -> None:
    """Compare our files with llama-quantize's presets on MODEL."""
    progress: Progress
    with console_progress() as progress:
        context = open_context(model, work_dir, pre=None, threads=available_threads(), progress=progress)
        rows = compare(
            context,
            read_text(text or model / "calibration.txt"),
            eval_text or model / "evaluation.txt",
            tuple(presets.split(",")),
            parse_types(types),
        )
    if as_json:
        print_json(rows)
        return
    for kind in (ACTIVATION, GRADIENT):
        click.echo(f"\nBoth quantized with the {kind} imatrix:\n\n{markdown(rows, kind)}")


if __name__ == "__main__":
    main()
