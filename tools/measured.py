"""What comparisons of files share: a calibrated model, and how far a GGUF is from it on held-out tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import click

from mopeq_edge.evaluate.chunks import read_text
from mopeq_edge.evaluate.reference import ReferenceLogits
from mopeq_edge.evaluate.run import evaluate, make_reference
from mopeq_edge.ggml.types import GgmlType
from mopeq_edge.imatrix import GRADIENT
from mopeq_edge.pipeline import (
    CalibrationRequest,
    Context,
    run_calibrate,
    run_sensitivity,
    source_gguf,
)
from mopeq_edge.plan.candidates import parse_types
from mopeq_edge.sensitivity.pricing import Statistics
from mopeq_edge.sensitivity.table import SensitivityTable

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class Measured:
    """A model with its statistics, damages, and logits on 60 windows of 256 held-out tokens, all positions."""

    context: Context
    statistics: Statistics
    table: SensitivityTable
    types: tuple[GgmlType, ...]
    reference: ReferenceLogits

    def numbers(self, path: Path) -> dict[str, float]:
        """Bytes of ``path`` and its divergence from the model; KLD in nats."""
        context = self.context
        found = evaluate(path, self.reference, positions="all", n_threads=context.threads, progress=context.progress)
        d = found.divergence
        return {
            "bytes": found.target_bytes,
            "kld_mean_nats": d.kld_mean,
            "kld_p99_9_nats": d.kld_p99_9,
            "ppl": d.ppl_target,
            "same_top_fraction": d.same_top,
        }


def measured(context: Context, text: Path | None, evaluation_text: Path | None, types: str) -> Measured:
    """Calibrate on ``text`` and measure errors, as far as the work directory does not have them yet.

    The texts default to calibration.txt and evaluation.txt in the model's directory.
    """
    candidates = parse_types(types)
    words = read_text(text or context.source.path / "calibration.txt")
    calibrated = run_calibrate(context, CalibrationRequest(text=words, dataset="calibration.txt", chunks=128))
    table = run_sensitivity(context, calibrated, candidates, GRADIENT, None)
    reference = make_reference(
        source_gguf(context),
        evaluation_text or context.source.path / "evaluation.txt",
        context.work.path,
        n_ctx=256,
        n_chunks=60,
        positions="all",
        source_sha256=context.source_sha256,
        progress=context.progress,
    )
    return Measured(context, calibrated.statistics, table, candidates, reference)


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
