"""docs/cli.md from the commands themselves: every command with its usage, text, example and options.

``python -m tools.cli_reference`` writes it. A test compares the file with what this gives, so a change of a help text
needs another run. Nothing is wrapped and nothing depends on a terminal.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path

import click

from mopeq_edge.atomic import atomic_write
from mopeq_edge.cli import COMMANDS, cli

REFERENCE = Path(__file__).parent.parent / "docs" / "cli.md"

_HEAD = """# Commands

Every command as `--help` shows it; `mopeq-edge COMMAND --help` shows one. This page is written by
`python -m tools.cli_reference` from the commands themselves: change a command's help, then run that.
"""


def reference() -> str:
    """The page as Markdown."""
    parent = click.Context(cli, info_name="mopeq-edge", **cli.context_settings)
    table = ["| command | what it does |", "|---|---|"]
    sections = []
    for name, (_, _, line) in COMMANDS.items():
        command = cli.get_command(parent, name)
        assert command is not None
        # GitHub's anchor of the heading below
        table.append(f"| [`mopeq-edge {name}`](#mopeq-edge-{name}) | {_cell(line)} |")
        sections += _sections(command, name, parent, 2)
    return "\n".join([_HEAD, *table, *sections])


def _sections(command: click.Command, name: str, parent: click.Context, level: int) -> Iterator[str]:
    """``command`` under a heading of ``level``, then its subcommands one level below."""
    context = click.Context(command, info_name=name, parent=parent, **command.context_settings)
    yield f"\n{'#' * level} {context.command_path}\n"
    pieces = [piece.strip() for piece in command.collect_usage_pieces(context)]
    yield f"```\n{' '.join([context.command_path, *pieces])}\n```\n"
    yield "\n\n".join(_paragraphs(command.help or "")) + "\n"
    options = [parameter for parameter in command.get_params(context) if isinstance(parameter, click.Option)]
    records = [option.get_help_record(context) for option in options]
    rows = [record for record in records if record is not None]
    yield "| option | what it does |\n|---|---|"
    yield from (f"| `{_bar(names)}` | {_cell(text)} |" for names, text in rows)
    if isinstance(command, click.Group):
        for child_name in command.list_commands(context):
            child = command.get_command(context, child_name)
            assert child is not None
            if not child.hidden:
                yield from _sections(child, child_name, context, level + 1)


def _paragraphs(text: str) -> Iterator[str]:
    """Paragraphs of a help text; what is not to be wrapped (after click's backspace) is a title and a block of code."""
    for paragraph in inspect.cleandoc(text).split("\n\n"):
        lines = paragraph.strip().splitlines()
        if lines[:1] != ["\b"]:
            yield _escaped(" ".join(line.strip() for line in lines))
            continue
        yield lines[1]
        yield "\n".join(["```", *(line.strip() for line in lines[2:]), "```"])


def _cell(text: str) -> str:
    return _escaped(_bar(text))


def _bar(text: str) -> str:
    # a bar would end the cell, also inside of code
    return text.replace("|", "\\|")


def _escaped(text: str) -> str:
    """Characters of the help's plain text that would be marks in Markdown."""
    return "".join(f"\\{c}" if c in "*_`<[" else c for c in text)


def main() -> None:
    with atomic_write(REFERENCE) as file:
        file.write(reference().encode())
    print(REFERENCE.name)


if __name__ == "__main__":
    main()
