"""``mopeq-edge evaluate``: measure a GGUF against its source."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from mopeq_edge.cli.console import FILE, json_option, threads_option

if TYPE_CHECKING:
    from rich.table import Table

    from mopeq_edge.evaluate.chunks import Positions
    from mopeq_edge.evaluate.run import Evaluation
    from mopeq_edge.progress import Progress


@click.command()
@click.argument("target", type=FILE)
@click.option("--against", "source", type=FILE, required=True, help="Checkpoint or GGUF that TARGET was made from.")
@click.option("--text", type=FILE, required=True, help="UTF-8 text to measure on.")
@click.option("--ctx", type=click.IntRange(min=2), default=512, show_default=True, help="Tokens of one window.")
@click.option("--chunks", type=click.IntRange(min=1), help="Windows to measure on (default: the whole text).")
@click.option(
    "--positions",
    type=click.Choice(["second-half", "all"]),
    default="second-half",
    show_default=True,
    help="Tokens of a window that count; second-half is what llama-perplexity counts.",
)
@threads_option
@click.option("--work-dir", type=FILE, help="Directory that keeps the source's logits (default: SOURCE with .mopeq).")
@json_option
def evaluate(
    target: Path,
    source: Path,
    text: Path,
    ctx: int,
    chunks: int | None,
    positions: Positions,
    threads: int,
    work_dir: Path | None,
    as_json: bool,
) -> None:
    """Measure how far TARGET is from its source.

    Both run in llama.cpp on the same tokens. KLD is the KL divergence of the next token's distribution from
    the source's, in nats; 0 means the same. The source runs once: its logits stay in the work directory and
    serve every later TARGET on the same text. They take 4 bytes per counted token and vocabulary entry.

    \b
    Example:
      mopeq-edge evaluate out.gguf --against bf16.gguf --text held-out.txt
    """
    from mopeq_edge.alone import alone
    from mopeq_edge.cli.console import console_progress, print_json, print_table
    from mopeq_edge.cli.options import work_directory
    from mopeq_edge.evaluate.run import evaluate as evaluate_target
    from mopeq_edge.evaluate.run import make_reference
    from mopeq_edge.split import read_parts

    # a target that cannot be read is told before the source has run for hours
    read_parts(target)
    work = work_directory(work_dir, source)
    with console_progress() as progress, alone(work):
        gguf = resolve_source(source, work, threads, progress)
        reference = make_reference(
            gguf,
            text,
            work,
            n_ctx=ctx,
            n_chunks=chunks,
            positions=positions,
            n_threads=threads,
            progress=progress,
        )
        result = evaluate_target(target, reference, n_threads=threads, positions=positions, progress=progress)
    if as_json:
        print_json(result.as_dict())
    else:
        print_table(evaluation_table(result))


def resolve_source(source: Path, work: Path, threads: int, progress: Progress) -> Path:
    """The GGUF whose logits are the truth for ``--against SOURCE``; a checkpoint becomes a lossless one in ``work``.

    Raises :class:`MopeqError` if there is none.
    """
    from mopeq_edge.errors import MopeqError

    if source.is_dir():
        # transformers reads the vocabulary; on a device give the GGUF
        from mopeq_edge.pipeline import open_context, source_gguf

        return source_gguf(open_context(source, work, pre=None, threads=threads, progress=progress))
    if not source.is_file():
        raise MopeqError(f"{source}: does not exist; give the source as a checkpoint directory or a GGUF file")
    return source


def evaluation_table(result: Evaluation) -> Table:
    """The result as a table of at most 80 columns."""
    from rich.table import Table

    from mopeq_edge.units import format_bytes, plural

    d = result.divergence
    table = Table(
        title=f"{result.target_name} ({format_bytes(result.target_bytes)}) against {result.source_name}",
        caption=f"{plural(d.n_positions, 'token')}, {result.positions}, in {plural(result.n_windows, 'window')} "
        f"of {result.n_ctx}; {result.library}",
    )
    table.add_column("Measure")
    table.add_column("Value", justify="right")
    table.add_column("± standard error", justify="right")
    rows: list[tuple[str, str, str]] = [
        ("Mean KLD (nats)", f"{d.kld_mean:.6f}", f"{d.kld_mean_se:.6f}"),
        ("Median KLD (nats)", f"{d.kld_median:.6f}", ""),
        ("99 % KLD (nats)", f"{d.kld_p99:.6f}", ""),
        ("99.9 % KLD (nats)", f"{d.kld_p99_9:.6f}", ""),
        ("Largest KLD (nats)", f"{d.kld_max:.6f}", ""),
        ("Same top token (%)", f"{100 * d.same_top:.3f}", f"{100 * d.same_top_se:.3f}"),
        ("PPL of the source", f"{d.ppl_base:.4f}", f"{d.ppl_base_se:.4f}"),
        ("PPL of the target", f"{d.ppl_target:.4f}", f"{d.ppl_target_se:.4f}"),
        ("Mean ln(PPL ratio)", f"{d.ln_ppl_ratio:.6f}", f"{d.ln_ppl_ratio_se:.6f}"),
    ]
    for row in rows:
        table.add_row(*row)
    return table
