"""``mopeq-edge card``: a model card for the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path

import click

from mopeq_edge.cli.console import FILE, json_option


@click.command()
@click.argument("files", type=FILE, nargs=-1, required=True, metavar="OUT...")
@click.option("-o", "--output", type=FILE, help="The card, README.md say (default: printed).")
@click.option("--source", type=FILE, help="Checkpoint or GGUF that OUT was made from, for licence and language.")
@click.option("--base-model", metavar="ORG/NAME", help="The quantized model's id on the Hub (default: as OUT says).")
@click.option("--work-dir", type=FILE, help="Where plan.json and validation.json are (default: OUT.mopeq beside OUT).")
@click.option("--force", is_flag=True, help="Replace the card if it exists.")
@json_option
def card(
    files: tuple[Path, ...],
    output: Path | None,
    source: Path | None,
    base_model: str | None,
    work_dir: Path | None,
    force: bool,
    as_json: bool,
) -> None:
    """Write a model card of the GGUF files OUT, all of one model.

    Metadata for the Hub, sizes, what convert measured, how to run the files, how they were made, checksums. Nothing is
    invented: what neither OUT nor --source says is left out, and a note on stderr says so. A split GGUF is given by its
    first file.

    \b
    Example:
      mopeq-edge card out.gguf -o README.md --source OLMoE-1B-7B
    """
    from mopeq_edge.atomic import atomic_write, check_output
    from mopeq_edge.card.files import read_card_file
    from mopeq_edge.card.metadata import Origin, hub_id, origin_of_source
    from mopeq_edge.card.page import make_card
    from mopeq_edge.cli.console import console_progress, print_json
    from mopeq_edge.cli.options import work_directory_of_output
    from mopeq_edge.errors import SourceError
    from mopeq_edge.split import gguf_parts, whole_path

    if output is not None:
        inputs = [part for file in files for part in gguf_parts(file)]
        check_output(output, inputs if source is None else [*inputs, source, source / "README.md"], force=force)
    if base_model is not None:
        hub_id(base_model)
    if source is not None and not source.exists():
        raise SourceError(f"{source}: does not exist; give the source as a checkpoint directory or a GGUF file")
    origin = origin_of_source(source) if source is not None else Origin()
    with console_progress() as progress:
        read = [read_card_file(f, work_directory_of_output(work_dir, whole_path(f)), progress) for f in files]
    found = make_card(read, origin, base_model)
    for note in found.notes():
        click.echo(f"note: {note}", err=True)
    if output is not None:
        with atomic_write(output) as file:
            file.write(found.text().encode())
    if as_json:
        print_json(found.as_dict())
    elif output is None:
        click.echo(found.text(), nl=False)
    else:
        click.echo(f"{output}: the card of {', '.join(file.name for file in found.files)}")
