"""``mopeq-edge study``: a grid of plans with controls, measured."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mopeq_edge.cli import options
from mopeq_edge.cli.console import FILE, json_option, threads_option

if TYPE_CHECKING:
    from mopeq_edge.progress import Progress
    from mopeq_edge.study.setup import Setup

ROWS, GROUND_TRUTH = "study.csv", "ground-truth.csv"
EVALUATION_NAME = "evaluation.txt"


@click.command()
@click.argument("model", type=FILE)
@click.option("--budgets", default="", help="File sizes in GB (1e9 bytes), separated by commas.")
@click.option("--sensitivities", default="", help="Scores to plan by (default: all that calibration allows).")
@click.option("--planners", default="knapsack,mopeq", show_default=True, help="Of knapsack and mopeq.")
@click.option("--layouts", default="stock,per-expert", show_default=True, help="Of stock and per-expert.")
@click.option(
    "--controls",
    default="all",
    show_default=True,
    help="all, none, or some of random, inverse, uniform, presets and hand; beside the first sensitivity.",
)
@click.option("--seeds", type=click.IntRange(min=0), default=3, show_default=True, help="Random maps, each.")
@click.option("--types", default="default", show_default=True, help="Candidate types: default, k, all, or a list.")
@click.option(
    "--ground-truth",
    type=click.Choice(["expert", "projection"]),
    help="Instead: quantize each expert, or each projection of a layer, alone.",
)
@click.option("--type", "alone", default="Q2_K", show_default=True, help="Type of --ground-truth.")
@click.option("--eval-text", type=FILE, help="Held-out text (default: evaluation.txt in MODEL).")
@click.option("--windows", type=click.IntRange(min=2), default=40, show_default=True, help="Windows of it, at most.")
@click.option("--eval-ctx", type=click.IntRange(min=2), default=256, show_default=True, help="Tokens of each.")
@click.option("--keep", is_flag=True, help="Keep the GGUFs, in the work directory's folder study.")
@click.option("--pictures", type=click.Choice(["png", "svg"]), help="Also draw; needs matplotlib.")
@options.calibration_options
@options.work_option
@options.source_options
@threads_option
@json_option
def study(model: Path, **given: Any) -> None:
    """Measure plans of MODEL by every sensitivity, planner and layout, with controls of no more bytes.

    Every run is a row of study.csv (--ground-truth: ground-truth.csv) in the work directory. After an
    interruption the same command goes on where it was; a row is measured again only if source, texts,
    windows, plan or llama.cpp changed. Prints Markdown; intervals are of 95 %, over the windows.

    \b
    Example:
      mopeq-edge study OLMoE-1B-7B --work-dir olmoe.mopeq --budgets 3,3.5
    """
    from mopeq_edge.alone import alone
    from mopeq_edge.cli.console import console_progress
    from mopeq_edge.pictures.figure import require_matplotlib

    if given["pictures"]:
        require_matplotlib()
    with console_progress() as progress, alone(options.work_directory(given["work_dir"], model)):
        shown = (_grid if given["ground_truth"] is None else _ground_truth)(model, given, progress)
    click.echo(shown)


def _grid(model: Path, given: dict[str, Any], progress: Progress) -> str:
    from mopeq_edge.plan.budget import Budget
    from mopeq_edge.study import report
    from mopeq_edge.study.cases import Grid, check_scores, grid_cases
    from mopeq_edge.study.controls import CONTROLS
    from mopeq_edge.study.plots import kld_picture, prediction_picture
    from mopeq_edge.study.rows import RowFile
    from mopeq_edge.study.run import predicted_totals, run_cases

    budgets = tuple(Budget(gb=gb) for gb in _numbers("--budgets", given["budgets"]))
    controls = tuple(CONTROLS) if given["controls"] == "all" else _names(given["controls"], "none")
    rest = (_names(given["planners"]), _names(given["layouts"]), controls, given["seeds"])
    # what is wrong with the request is said before hours of calibration
    Grid(("any",), budgets, *rest)
    setup = _setup(model, given, progress)
    grid = Grid(check_scores(setup, _names(given["sensitivities"])), budgets, *rest)
    cases = grid_cases(setup, grid)
    rows = run_cases(setup, cases, RowFile(setup.context.work.file(ROWS)), keep=given["keep"])
    found, scores = report.entries(rows), report.predictors(setup, cases, rows)
    if given["pictures"]:
        planned = [i for i, case in enumerate(cases) if case.plan is not None]
        predicted = predicted_totals(setup, [cases[i] for i in planned])
        measured = [rows[i].kld_mean for i in planned]
        kind = given["pictures"]
        _write(setup, f"study-kld.{kind}", kld_picture(rows, kind))
        _write(setup, f"study-predicted.{kind}", prediction_picture(predicted, measured, "all plans", kind))
    if given["as_json"]:
        return _json(report.as_json(found, scores))
    tables = [report.markdown(found), *([report.correlation_markdown(scores)] if scores else [])]
    return "\n\n".join(tables)


def _ground_truth(model: Path, given: dict[str, Any], progress: Progress) -> str:
    from mopeq_edge.ggml.types import type_named
    from mopeq_edge.study import report
    from mopeq_edge.study.ground_truth import EXPERT, correlations, predictions, unit_cases, units_of
    from mopeq_edge.study.plots import prediction_picture
    from mopeq_edge.study.rows import RowFile
    from mopeq_edge.study.run import run_cases

    unit, kind = given["ground_truth"], type_named(given["alone"])
    setup = _setup(model, given, progress)
    units = units_of(setup, unit)
    cases = unit_cases(setup, units, kind)
    rows = run_cases(setup, cases, RowFile(setup.context.work.file(GROUND_TRUTH)), keep=given["keep"])
    predicted = predictions(setup, units, kind)
    found = correlations(units, predicted, rows, per_layer=unit == EXPERT)
    if given["pictures"]:
        what = f"each {unit} alone in {kind.name}"
        picture = prediction_picture(predicted, [row.kld_mean for row in rows], what, given["pictures"])
        _write(setup, f"ground-truth-{unit}.{given['pictures']}", picture)
    return _json(report.correlation_json(found)) if given["as_json"] else report.correlation_markdown(found)


def _write(setup: Setup, name: str, content: bytes) -> None:
    from mopeq_edge.atomic import atomic_write

    path = setup.context.work.file(name)
    with atomic_write(path) as file:
        file.write(content)
    setup.context.progress.note(f"picture: {path}")


def _json(value: object) -> str:
    import json

    return json.dumps(value, indent=2, sort_keys=True)


def _setup(model: Path, given: dict[str, Any], progress: Progress) -> Setup:
    from mopeq_edge.evaluate.chunks import read_text
    from mopeq_edge.pipeline import open_context
    from mopeq_edge.plan.candidates import parse_types
    from mopeq_edge.plan.options import BITS
    from mopeq_edge.study.setup import prepare

    work = options.work_directory(given["work_dir"], model)
    held_out = given["eval_text"] or (model if model.is_dir() else model.parent) / EVALUATION_NAME
    read_text(held_out)
    text = options.calibration_text(model, given["text"], given["imatrix"])
    context = open_context(
        model,
        work,
        pre=given["pre"],
        keep_mtp=given["keep_mtp"],
        threads=given["threads"],
        progress=progress,
        before_script=lambda _: options.check_before_script(model, given, text),
    )
    words = read_text(text) if text is not None else ""
    request = options.calibration_request(context.source.kind == "huggingface", text, words, given)
    types = tuple(sorted({*parse_types(given["types"]), *BITS.values()}, key=lambda kind: (kind.bpw, kind.name)))
    return prepare(context, request, types, held_out, n_ctx=given["eval_ctx"], n_windows=given["windows"])


def _names(text: str, *but: str) -> tuple[str, ...]:
    return tuple(name for name in dict.fromkeys(part.strip() for part in text.split(",")) if name and name not in but)


def _numbers(option: str, text: str) -> tuple[float, ...]:
    from mopeq_edge.errors import PlanError

    try:
        return tuple(float(name) for name in _names(text))
    except ValueError:
        raise PlanError(f"{option} {text}: expected numbers separated by commas, as in 3,3.5") from None
