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

ROWS = "study.csv"
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
@click.option("--eval-text", type=FILE, help="Held-out text (default: evaluation.txt in MODEL).")
@click.option("--windows", type=click.IntRange(min=2), default=40, show_default=True, help="Windows of it, at most.")
@click.option("--eval-ctx", type=click.IntRange(min=2), default=256, show_default=True, help="Tokens of each.")
@click.option("--keep", is_flag=True, help="Keep the GGUFs, in the work directory's folder study.")
@options.calibration_options
@options.work_option
@options.pre_option
@threads_option
@json_option
def study(model: Path, **given: Any) -> None:
    """Measure plans of MODEL by every sensitivity, planner and layout, with controls of no more bytes.

    Every run is a row of study.csv in the work directory. After an interruption the same command goes on
    where it was; a row is measured again only if source, texts, windows, plan or llama.cpp changed.

    \b
    Example:
      mopeq-edge study OLMoE-1B-7B --work-dir olmoe.mopeq --budgets 3,3.5
    """
    from mopeq_edge.cli.console import console_progress, print_json
    from mopeq_edge.plan.budget import Budget
    from mopeq_edge.study.cases import Grid, check_scores, grid_cases
    from mopeq_edge.study.controls import CONTROLS
    from mopeq_edge.study.rows import RowFile
    from mopeq_edge.study.run import run_cases

    budgets = tuple(Budget(gb=gb) for gb in _numbers("--budgets", given["budgets"]))
    controls = {"all": tuple(CONTROLS), "none": ()}.get(given["controls"]) or _names(given["controls"], "none")
    with console_progress() as progress:
        # what is wrong with the request is said before hours of calibration
        Grid(_names(given["sensitivities"]) or ("any",), budgets, *_axes(given), controls, given["seeds"])
        setup = _setup(model, given, progress)
        scores = check_scores(setup, _names(given["sensitivities"]))
        grid = Grid(scores, budgets, *_axes(given), controls, given["seeds"])
        cases = grid_cases(setup, grid)
        rows = run_cases(setup, cases, RowFile(setup.context.work.file(ROWS)), keep=given["keep"])
    if given["as_json"]:
        print_json([row.case for row in rows])
        return
    for row in rows:
        click.echo(f"{row.case}: {row.kld_mean:.5f}")


def _setup(model: Path, given: dict[str, Any], progress: Progress) -> Setup:
    from mopeq_edge.evaluate.chunks import read_text
    from mopeq_edge.pipeline import open_context
    from mopeq_edge.plan.candidates import parse_types
    from mopeq_edge.plan.options import BITS
    from mopeq_edge.study.setup import prepare

    work = options.work_directory(given["work_dir"], model)
    held_out = given["eval_text"] or (model if model.is_dir() else model.parent) / EVALUATION_NAME
    read_text(held_out)
    context = open_context(model, work, pre=given["pre"], threads=given["threads"], progress=progress)
    text = options.calibration_text(model, given["text"], given["imatrix"])
    names = ("imatrix", "ctx", "chunks", "fisher", "seed", "trace", "probes", "trace_chunks")
    request = options.calibration_request(
        model, text, read_text(text) if text is not None else "", **{name: given[name] for name in names}
    )
    types = tuple(sorted({*parse_types(given["types"]), *BITS.values()}, key=lambda kind: (kind.bpw, kind.name)))
    return prepare(context, request, types, held_out, n_ctx=given["eval_ctx"], n_windows=given["windows"])


def _axes(given: dict[str, Any]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    return _names(given["planners"]), _names(given["layouts"])


def _names(text: str, *but: str) -> tuple[str, ...]:
    return tuple(name for name in dict.fromkeys(part.strip() for part in text.split(",")) if name and name not in but)


def _numbers(option: str, text: str) -> tuple[float, ...]:
    from mopeq_edge.errors import PlanError

    try:
        return tuple(float(name) for name in _names(text))
    except ValueError:
        raise PlanError(f"{option} {text}: expected numbers separated by commas, as in 3,3.5") from None
