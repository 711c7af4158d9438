"""docs/cli.md is what the commands say, whatever terminal it is made in."""

from __future__ import annotations

import click
import pytest

from mopeq_edge.cli import COMMANDS, cli
from tools.cli_reference import REFERENCE, reference


def test_the_page_is_what_the_commands_say() -> None:
    if REFERENCE.read_text(encoding="utf-8") != reference():
        pytest.fail("docs/cli.md is not what the commands say; run: python -m tools.cli_reference", pytrace=False)


def test_the_page_does_not_depend_on_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = reference()
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setenv("LANG", "C")
    monkeypatch.setattr("os.cpu_count", lambda: 77)
    assert reference() == expected


def leaves(command: click.Command, path: str) -> list[tuple[str, click.Command]]:
    if not isinstance(command, click.Group):
        return [(path, command)]
    return [leaf for name, child in command.commands.items() for leaf in leaves(child, f"{path} {name}")]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_is_there_with_every_option(name: str) -> None:
    page = reference()
    command = cli.get_command(click.Context(cli), name)
    assert command is not None
    for path, leaf in leaves(command, name):
        heading = f" mopeq-edge {path}\n"
        assert page.count(f"#{heading}") == 1
        section = page.split(heading, 1)[1].split("\n#", 1)[0]
        assert section.startswith(f"\n```\nmopeq-edge {path} ")
        for parameter in leaf.params:
            if isinstance(parameter, click.Option):
                assert all(name in section for name in (*parameter.opts, *parameter.secondary_opts))
                rows = [row for row in section.splitlines() if row.startswith(f"| `{parameter.opts[0]}")]
                assert rows
                # a bar inside a cell would make a third one
                assert all(row.replace("\\|", "").count("|") == 3 for row in rows)
        example = (leaf.help or "").partition("Example:\n")[2].strip().splitlines()
        assert all(f"\n{line.strip()}\n" in section for line in example)
