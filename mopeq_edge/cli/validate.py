"""``mopeq-edge validate``: whether a GGUF's structure is sound, and what runs it."""

from __future__ import annotations

from pathlib import Path

import click

from mopeq_edge.cli.console import FILE, json_option


@click.command()
@click.argument("file", type=FILE)
@json_option
def validate(file: Path, as_json: bool) -> None:
    """Check the structure of the GGUF FILE and say what it is and what runs it.

    The header must be sound, every tensor must lie in the file, and expert groups must add up: see
    docs/expert-groups.md. Weights are not read. A file that is not valid is one line on stderr and exit code 1.

    \b
    Example:
      mopeq-edge validate out.gguf
    """
    from mopeq_edge.cli.console import print_json
    from mopeq_edge.summary import summarise

    found = summarise(file)
    if as_json:
        print_json(found.as_dict())
    else:
        click.echo(f"{file}: valid: {found.sentence()}")
