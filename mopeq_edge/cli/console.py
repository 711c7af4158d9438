"""What the commands share: progress bars on stderr, results on stdout, errors as one line."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from mopeq_edge.errors import printable

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID
    from rich.table import Table

    from mopeq_edge.progress import Progress

F = TypeVar("F", bound=Callable[..., Any])

FILE = click.Path(path_type=Path)
WIDTH = 80


class _Model(click.Path):
    """A path, or the URL of a checkpoint directory; ``file://`` is a path."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not isinstance(value, str) or "://" not in value:
            return super().convert(value, param, ctx)
        if value.startswith("file://"):
            from urllib.parse import unquote, urlsplit

            return Path(unquote(urlsplit(value).path))
        from mopeq_edge.source.remote import ModelURL

        return ModelURL(value)


MODEL = _Model(path_type=Path)
"""What the stages read."""


json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")


def available_threads() -> int:
    """CPUs that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def threads_option(command: F) -> F:
    """``--threads``, by default all CPUs."""
    return click.option(
        "--threads", type=click.IntRange(min=1), default=available_threads, help="CPU threads (default: every CPU)."
    )(command)


class _BarStep:
    def __init__(self, bars: RichProgress, task: TaskID) -> None:
        self._bars, self._task = bars, task

    def advance(self, amount: float = 1.0) -> None:
        self._bars.advance(self._task, amount)


class _Bars:
    def __init__(self, bars: RichProgress) -> None:
        self._bars = bars

    @contextmanager
    def step(self, title: str, total: float | None, unit: str = "") -> Iterator[_BarStep]:
        task = self._bars.add_task(title, total=total, unit=unit)
        try:
            yield _BarStep(self._bars, task)
        finally:
            if sys.exc_info()[0] is None:
                # of what had no total: one, so that the bar stands full and still
                self._bars.update(task, total=total or 1, completed=total or 1, refresh=True)

    def note(self, message: str) -> None:
        self._bars.console.print(printable(message), highlight=False, markup=False, soft_wrap=True)


@contextmanager
def console_progress() -> Iterator[Progress]:
    """Bars with rate, elapsed and remaining time on stderr; where stderr is no terminal only the notes are printed."""
    from rich.console import Console
    from rich.progress import Progress

    from mopeq_edge.cli.bars import columns

    console = Console(stderr=True)
    with Progress(*columns(), console=console, disable=not console.is_terminal) as bars:
        yield _Bars(bars)


def print_json(value: object) -> None:
    """``value`` as JSON with sorted keys on stdout."""
    click.echo(json.dumps(value, indent=2, sort_keys=True))


def print_table(table: Table) -> None:
    """A rich table on stdout, within :data:`WIDTH` columns."""
    from rich.console import Console

    Console(width=WIDTH).print(table)


def rows_table(title: str, rows: list[tuple[str, str]]) -> Table:
    """A table of names and values."""
    from rich import box
    from rich.table import Table

    table = Table(title=title, title_justify="left", show_header=False, box=box.SIMPLE)
    table.add_column("name", style="bold", no_wrap=True)
    table.add_column("value", overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table
