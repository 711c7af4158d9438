"""``mopeq-edge validate``: whether a GGUF is what it should be, and what runs it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mopeq_edge.cli.console import FILE, json_option, threads_option
from mopeq_edge.errors import MopeqError

if TYPE_CHECKING:
    from rich.table import Table

    from mopeq_edge.pipeline_validate import Validated


@click.command()
@click.argument("file", type=FILE, required=False)
@click.option(
    "--compare",
    type=FILE,
    nargs=2,
    metavar="A.json B.json",
    help="Put two reports of runtime_tests side by side instead.",
)
@click.option("--plan", type=FILE, help="plan.json that FILE was written from (default: the one in OUT.mopeq).")
@click.option("--against", type=FILE, help="Checkpoint or GGUF that FILE was made from.")
@click.option("--text", type=FILE, help="UTF-8 text to run FILE on (default: a few sentences).")
@click.option(
    "--tokens", type=click.IntRange(min=2), default=64, show_default=True, help="Tokens to compare with ONNX on."
)
@click.option("--run/--no-run", default=True, help="Run FILE in llama.cpp, or only read it (default: run).")
@click.option("--max-kld", type=click.FloatRange(min=0), help="Mean KLD to the source, in nats, that is allowed.")
@click.option("--max-kld-99.9", "max_kld_p99_9", type=click.FloatRange(min=0), help="99.9 % KLD that is allowed.")
@click.option(
    "--min-same-top", type=click.FloatRange(0, 1), help="Fraction of tokens that must have the source's top token."
)
@click.option("--ctx", type=click.IntRange(min=2), default=512, show_default=True, help="Tokens of a window of --text.")
@click.option("--chunks", type=click.IntRange(min=1), help="Windows to measure against the source (default: all).")
@threads_option
@click.option("--work-dir", type=FILE, help="Where plan.json and the source's logits are (default: OUT.mopeq).")
@json_option
def validate(
    file: Path | None,
    compare: tuple[Path, Path] | None,
    plan: Path | None,
    against: Path | None,
    text: Path | None,
    tokens: int,
    run: bool,
    max_kld: float | None,
    max_kld_p99_9: float | None,
    min_same_top: float | None,
    ctx: int,
    chunks: int | None,
    threads: int,
    work_dir: Path | None,
    as_json: bool,
) -> None:
    """Check that the GGUF FILE is what it should be, and say what runs it.

    The structure must be sound and as planned, every weight a number and no part of the file lost; llama.cpp must
    compute what standard ONNX operators compute with the same weights. With --against weights and key-values must be
    the source's, and with --text too the source's logits are compared. Each check that lacks what it needs is left
    out and says so: see docs/validate.md. Needs neither torch nor transformers, unless SOURCE is a directory and a
    text is given.

    A failed check is one line on stderr, the most specific first, and exit code 1. With --compare so is a test that
    passed in one report of runtime_tests and failed in the other: see docs/device.md.

    \b
    Example:
      mopeq-edge validate out.gguf --against bf16.gguf --text held-out.txt
      mopeq-edge validate --compare laptop.report.json orin.report.json
    """
    from mopeq_edge.cli.console import console_progress, print_json, print_table
    from mopeq_edge.cli.evaluate import resolve_source
    from mopeq_edge.cli.options import work_directory_of_output
    from mopeq_edge.pipeline_validate import ValidateRequest
    from mopeq_edge.pipeline_validate import validate as validate_file
    from mopeq_edge.split import whole_path
    from mopeq_edge.validate.measured import Thresholds

    if compare is not None:
        from mopeq_edge.cli.compare_reports import compare_reports

        if file is not None:
            raise MopeqError(f"{file}: --compare takes two reports and nothing else; leave it out")
        compare_reports(*compare, as_json)
        return
    if file is None:
        raise click.UsageError("Missing argument 'FILE'.")
    limits = Thresholds(max_kld, max_kld_p99_9, min_same_top)
    if limits != Thresholds() and (against is None or text is None):
        raise MopeqError("a threshold needs something to be measured: give --against SOURCE and --text FILE")
    work = work_directory_of_output(work_dir, whole_path(file))
    with console_progress() as progress:
        request = ValidateRequest(
            path=file,
            work=work,
            plan=plan,
            against=against,
            text=text,
            n_tokens=tokens,
            run=run,
            thresholds=limits,
            n_ctx=ctx,
            n_chunks=chunks,
            threads=threads,
            source_gguf=None if against is None else lambda: resolve_source(against, work, threads, progress),
        )
        found = validate_file(request, progress)
    if as_json:
        print_json(found.as_dict())
    else:
        word = "valid" if found.passed else "not valid"
        click.echo(f"{file}: {word}: {found.summary.sentence()}")
        print_table(checks_table(found))
    for check in found.failed:
        click.echo(f"mopeq-edge: {check.name}: {' '.join(check.message.split())}", err=True)
    if not found.passed:
        sys.exit(1)


def checks_table(found: Validated) -> Table:
    """All checks as a table of at most 80 columns."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE, show_edge=False)
    for name in ("Check", "", "What was found"):
        table.add_column(name, overflow="fold")
    words = {True: Text("passed", "green"), False: Text("FAILED", "bold red"), None: Text("left out", "dim")}
    for check in found.checks:
        table.add_row(check.name, words[check.passed], Text(f"{check.looked_at}: {check.message}"))
    return table
