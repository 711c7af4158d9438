"""``mopeq-edge map``: a picture of every expert's type."""

from __future__ import annotations

from pathlib import Path

import click

from mopeq_edge.cli.console import FILE


@click.command("map")
@click.argument("plan_or_gguf", type=FILE)
@click.option("-o", "--output", type=FILE, required=True, help="The picture: a name that ends in .png or .svg.")
@click.option("--scatter", is_flag=True, help="A column for each layer, its experts at their bits per weight.")
@click.option("--force", is_flag=True, help="Replace the picture if it exists.")
def map_command(plan_or_gguf: Path, output: Path, scatter: bool, force: bool) -> None:
    """Draw the types of all experts of a plan.json or a GGUF: layers by experts for each projection.

    Colours are bits per weight, the same in every picture. Needs matplotlib (the extra "pictures").

    \b
    Example:
      mopeq-edge map olmoe.mopeq/plan.json -o map.svg
    """
    from mopeq_edge.atomic import atomic_write, check_output
    from mopeq_edge.errors import OutputError
    from mopeq_edge.pictures.draw import map_picture
    from mopeq_edge.pictures.figure import FORMATS
    from mopeq_edge.pictures.type_map import read_type_map

    picture_format = output.suffix.lower().removeprefix(".")
    if picture_format not in FORMATS:
        raise OutputError(f"{output}: expected a name that ends in .png or .svg; give one of them")
    check_output(output, [plan_or_gguf], force=force)
    types = read_type_map(plan_or_gguf)
    picture = map_picture(types, picture_format, scatter=scatter)
    with atomic_write(output) as file:
        file.write(picture)
    click.echo(f"{output}: {len(types.layers)} layers of {types.n_expert} experts, {', '.join(types.projections)}")
