"""What comparisons of files share: a calibrated model, and how far a GGUF is from it on held-out tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import click

from mopeq_edge.cli.console import available_threads, console_progress, print_json
from mopeq_edge.evaluate.chunks import read_text
from mopeq_edge.evaluate.run import evaluate
from mopeq_edge.pipeline import Context, open_context
from mopeq_edge.pipeline_calibrate import CalibrationRequest
from mopeq_edge.plan.candidates import parse_types
from mopeq_edge.study.setup import POSITIONS, Setup, prepare

F = TypeVar("F", bound=Callable[..., Any])


def measured(context: Context, text: Path | None, evaluation_text: Path | None, types: str) -> Setup:
    """Calibrate on ``text`` and run the source on 60 windows of 256 tokens of ``evaluation_text``.

    The texts default to calibration.txt and evaluation.txt in the model's directory.
    """
    words = read_text(text or context.source.path / "calibration.txt")
    calibration = CalibrationRequest(text=words, dataset="calibration.txt", chunks=128)
    held_out = evaluation_text or context.source.path / "evaluation.txt"
    return prepare(context, calibration, parse_types(types), held_out, n_ctx=256, n_windows=60)


def numbers(model: Setup, path: Path) -> dict[str, float]:
    """Bytes of ``path`` and its divergence from the model; KLD in nats."""
    context = model.context
    found = evaluate(path, model.reference, positions=POSITIONS, n_threads=context.threads, progress=context.progress)
    d = found.divergence
    return {
        "bytes": found.target_bytes,
        "kld_mean_nats": d.kld_mean,
        "kld_p99_9_nats": d.kld_p99_9,
        "ppl": d.ppl_target,
        "same_top_fraction": d.same_top,
    }


def print_comparison(
    compare: Callable[[Setup, tuple[float, ...]], list[dict[str, Any]]],
    markdown: Callable[[list[dict[str, Any]]], str],
    given: Mapping[str, Any],
) -> None:
    """Run ``compare`` on what the options ``given`` ask for and print its rows, as Markdown or JSON."""
    with console_progress() as progress:
        threads = available_threads()
        context = open_context(given["model"], given["work_dir"], pre=None, threads=threads, progress=progress)
        model = measured(context, given["text"], given["eval_text"], given["types"])
        rows = compare(model, tuple(float(gb) for gb in given["budgets"].split(",")))
    if given["as_json"]:
        print_json(rows)
        return
    click.echo(markdown(rows))


def comparison_options(command: F) -> F:
    """MODEL, its texts, where the files go, candidate types and the form of the output."""
    for decorate in (
        click.option("--json", "as_json", is_flag=True, help="Print JSON instead of Markdown."),
        click.option(
            "--types", default="default", show_default=True, help="Candidate types: default, k, all, or a list."
        ),
        click.option(
            "--work-dir", type=click.Path(path_type=Path), required=True, help="Where artifacts and files go."
        ),
        click.option("--eval-text", type=click.Path(path_type=Path), help="Default: evaluation.txt in MODEL."),
        click.option("--text", type=click.Path(path_type=Path), help="Default: calibration.txt in MODEL."),
        click.argument("model", type=click.Path(path_type=Path)),
    ):
        command = decorate(command)
    return command
