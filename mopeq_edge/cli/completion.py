"""``mopeq-edge completion``: the script that completes commands and options in a shell."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

PROGRAM, VARIABLE = "mopeq-edge", "_MOPEQ_EDGE_COMPLETE"
"""The program, and the variable in which the script tells it what to complete: click's own name for it."""


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print the script that completes commands, options and files in SHELL: bash, zsh or fish.

    In ~/.bashrc or ~/.zshrc: eval "$(mopeq-edge completion bash)", with zsh in the latter. For fish write it to
    ~/.config/fish/completions/mopeq-edge.fish. Needs bash 4.4 or newer.

    \b
    Example:
      mopeq-edge completion bash
    """
    script = get_completion_class(shell)
    assert script is not None
    root = click.get_current_context().find_root().command
    click.echo(script(root, {}, PROGRAM, VARIABLE).source())
