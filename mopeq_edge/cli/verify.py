"""``mopeq-edge verify``: whether a GGUF, and what sees pictures for it, is, byte for byte, what was written."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from mopeq_edge.cli.console import FILE, json_option

NO_HASHES = 3
"""Exit code for a file that has nothing to verify with: neither whole (0) nor damaged (1); 2 is a wrong option."""
_SHOWN = 8


@click.command()
@click.argument("file", type=FILE)
@json_option
def verify(file: Path, as_json: bool) -> None:
    """Read every byte of the GGUF FILE and compare it with the hashes that mopeq-edge wrote into it.

    Finds every changed byte of tensors, header and padding, and names the tensors. Of a split GGUF give the first
    file. A vision file beside it (out.vision.onnx and its weights) is verified too; give it as FILE for itself alone.
    Exit code 0: as written; 1: damaged, or changed by another tool; 3: a file carries no hashes.

    \b
    Example:
      mopeq-edge verify out.gguf
    """
    from mopeq_edge.cli.console import console_progress, print_json
    from mopeq_edge.errors import DamagedError
    from mopeq_edge.units import plural
    from mopeq_edge.verify import verify as verify_file

    with console_progress() as progress:
        found = verify_file(file, progress)
    if as_json:
        print_json(found.as_dict())
    if found.damaged:
        many = len(found.files) > 1
        places = [f"{what} of {Path(part).name}" if many else what for part, what in found.damaged]
        more = f" and {len(places) - _SHOWN} more" if len(places) > _SHOWN else ""
        raise DamagedError(
            f"{file}: not as written: {', '.join(places[:_SHOWN])}{more}; copy or download it again, or write it anew "
            "(a tool that changed the file leaves the old hashes in it)"
        )
    if not found.has_hashes:
        click.echo(
            f"{found.without_hashes[0]}: carries no hashes, so there is nothing to verify with; mopeq-edge writes "
            "them (emit, convert)",
            err=True,
        )
        sys.exit(NO_HASHES)
    if not as_json:
        tensors, files = plural(found.n_tensors, "tensor"), plural(len(found.files), "file")
        click.echo(f"{file}: as written: {tensors}, {found.n_bytes:,} bytes in {files}")
