"""The command line: a table of commands, each imported when it is called."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from importlib import import_module
from typing import NoReturn

import click
from click.shell_completion import CompletionItem

from mopeq_edge import __version__, interrupts
from mopeq_edge.errors import MopeqError

COMMANDS: Mapping[str, tuple[str, str, str]] = {
    "convert": ("mopeq_edge.cli.convert", "convert", "All stages: a checkpoint to a GGUF under a byte budget."),
    "inspect": ("mopeq_edge.cli.inspect", "inspect", "What is in a checkpoint or GGUF, and the sizes it can have."),
    "calibrate": ("mopeq_edge.cli.stages", "calibrate", "Text to imatrix and routing statistics."),
    "sensitivity": ("mopeq_edge.cli.stages", "sensitivity", "Measure what every type would hurt."),
    "plan": ("mopeq_edge.cli.stages", "plan", "Choose types under a byte budget."),
    "emit": ("mopeq_edge.cli.stages", "emit", "Write the GGUF of a plan."),
    "evaluate": ("mopeq_edge.cli.evaluate", "evaluate", "KLD and PPL of a GGUF against its source."),
    "map": ("mopeq_edge.cli.map", "map_command", "A picture of every expert's type."),
    "study": ("mopeq_edge.cli.study", "study", "Plans and controls of equal bytes, measured."),
    "run": ("mopeq_edge.cli.run", "run", "Run a GGUF in llama-cli."),
    "serve": ("mopeq_edge.cli.run", "serve", "Serve a GGUF with llama-server."),
    "memory": ("mopeq_edge.cli.memory", "memory", "Predict a model's memory in llama.cpp, and whether it fits."),
    "validate": ("mopeq_edge.cli.validate", "validate", "Whether a GGUF is what it should be."),
    "verify": ("mopeq_edge.cli.verify", "verify", "Whether every byte of a GGUF is still as written."),
    "report": ("mopeq_edge.cli.report", "report", "One HTML page of what a conversion made and measured."),
    "card": ("mopeq_edge.cli.card", "card", "A model card of GGUF files for the Hugging Face Hub."),
    "runtime": ("mopeq_edge.cli.runtime", "runtime", "Install, show or patch llama.cpp."),
    "completion": ("mopeq_edge.cli.completion", "completion", "Print what completes commands in a shell."),
}
"""Name: (module, attribute, one line of help), in the order of the pipeline."""


class _Commands(click.Group):
    """Imports a command only when it runs, so that on-device commands never load torch."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module, attribute, _ = COMMANDS[cmd_name]
        command: click.Command = getattr(import_module(module), attribute)
        return command

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        # from the table: a press of Tab should import no command
        names = [CompletionItem(name, help=line) for name, (_, _, line) in COMMANDS.items()]
        found = [item for item in names if item.value.startswith(incomplete)]
        return found + click.Command.shell_complete(self, ctx, incomplete)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, help_line) for name, (_, _, help_line) in COMMANDS.items()])


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 80})
@click.version_option(__version__, prog_name="mopeq-edge")
def cli() -> None:
    """Mixture-of-Experts models on edge devices.

    Measures how much quantization hurts each expert, plans GGUF types under a hard byte budget, writes the
    file and proves it in llama.cpp.

    \b
    Example:
      mopeq-edge convert model_dir out.gguf --target-gb 4 --text corpus.txt
    """


def main() -> None:
    """Run the command line; an expected failure is one line on stderr and exit code 1, an interruption 130 or 143."""
    try:
        interrupts.install()
        cli()
    except interrupts.Interrupted as signal:
        interrupts.end(signal.number)
    except MopeqError as error:
        _fail(str(error))
    except OSError as error:
        # a full or read-only disk outside the output's own folder
        _fail(f"{error.filename or 'file system'}: {error.strerror or error}; free space or check the permissions")


def _fail(message: str) -> NoReturn:
    click.echo(f"mopeq-edge: error: {' '.join(message.split())}", err=True)
    sys.exit(1)
