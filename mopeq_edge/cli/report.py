"""``mopeq-edge report``: one HTML file of what was asked for, what came out and what was measured."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from mopeq_edge.cli.console import FILE, json_option

if TYPE_CHECKING:
    from mopeq_edge.progress import Progress
    from mopeq_edge.report.document import Report


LEFT_OUT = "left out"


@click.command()
@click.argument("path", type=FILE, metavar="WORKDIR_OR_OUT")
@click.option("-o", "--output", type=FILE, help="The page (default: OUT.report.html beside OUT).")
@click.option("--work-dir", type=FILE, help="Where plan.json and the measurements are (default: OUT.mopeq).")
@click.option("--validation", type=FILE, help="What mopeq-edge validate OUT --json printed: how routers agree.")
@click.option(
    "--points",
    type=click.IntRange(min=0),
    default=8,
    show_default=True,
    help="Other plans of each layout for the curve; 0 leaves curve and presets out.",
)
@click.option("--force", is_flag=True, help="Replace the page if it exists.")
@json_option
def report(
    path: Path,
    output: Path | None,
    work_dir: Path | None,
    validation: Path | None,
    points: int,
    force: bool,
    as_json: bool,
) -> None:
    """Write what a conversion made as one HTML page that needs no network.

    WORKDIR_OR_OUT is a GGUF, or the work directory of its conversion. The page shows what was asked for and what came
    out, every expert's precision, sizes, damage against size with llama-quantize's presets, what the calibration
    reached, how routers agree, memory, and where all of it comes from. What is not known says which command makes it.
    Needs matplotlib and jinja2 (the extra "pictures"). --json prints the same numbers; alone it writes no page.

    \b
    Example:
      mopeq-edge report out.gguf -o report.html
    """
    from mopeq_edge.atomic import check_output
    from mopeq_edge.cli.console import console_progress, print_json
    from mopeq_edge.errors import MopeqError
    from mopeq_edge.report.artifacts import read_artifacts
    from mopeq_edge.report.charts import require_libraries
    from mopeq_edge.report.document import make_report
    from mopeq_edge.report.page import parts_missing
    from mopeq_edge.split import gguf_parts

    if work_dir is not None and path.is_dir():
        raise MopeqError(f"--work-dir {work_dir}: {path} is a work directory already; leave it out")
    wanted = output is not None or not as_json
    if output is None:
        output = default_output(path)
    if wanted:
        require_libraries()
        inputs = [] if path.is_dir() else gguf_parts(path)
        check_output(output, [*inputs, validation] if validation is not None else inputs, force=force)
    with console_progress() as progress:
        found = make_report(read_artifacts(path, work_dir, validation), progress, points)
        if wanted:
            write_page(found, output)
    for name, part in parts_missing(found).items():
        click.echo(f"note: {name}: {part.why}; this makes it: {part.command}", err=True)
    if as_json:
        print_json(found.as_dict())
    else:
        click.echo(f"{output}: {found.title}, {output.stat().st_size / 1e6:.2f} MB")


def default_output(path: Path) -> Path:
    """``OUT.report.html`` beside OUT, also for its work directory ``OUT.mopeq``."""
    from mopeq_edge.split import whole_name

    if path.is_dir():
        folder = path.resolve()
        return folder.with_name(f"{folder.name.removesuffix('.mopeq')}.report.html")
    return path.with_name(f"{whole_name(path).removesuffix('.gguf')}.report.html")


def write_page(found: Report, output: Path) -> None:
    """The page of the report ``found`` at ``output``, whole or not at all."""
    from mopeq_edge.atomic import atomic_write
    from mopeq_edge.report.page import page

    text = page(found)
    with atomic_write(output) as file:
        file.write(text)


def report_of_conversion(out: Path, work: Path, output: Path, progress: Progress) -> str:
    """Write the report at the end of ``convert``; one line of what became of it. A report never makes that fail."""
    from mopeq_edge.errors import MopeqError
    from mopeq_edge.report.artifacts import read_artifacts
    from mopeq_edge.report.charts import require_libraries
    from mopeq_edge.report.document import make_report

    try:
        require_libraries()
        write_page(make_report(read_artifacts(out, work), progress), output)
    except (MopeqError, OSError) as error:
        return f"{LEFT_OUT}: {error}"
    return str(output)
