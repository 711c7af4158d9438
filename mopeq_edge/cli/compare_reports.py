"""``mopeq-edge validate --compare``: two reports of ``runtime_tests`` side by side."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from rich.table import Table

    from mopeq_edge.device_report.compare import Comparison


def compare_reports(first: Path, second: Path, as_json: bool) -> None:
    """Print both; exit code 1 if a test passed in one and failed in the other.

    Raises :class:`FormatError` for what is no report.
    """
    from mopeq_edge.cli.console import print_json, print_table
    from mopeq_edge.device_report.compare import compare
    from mopeq_edge.device_report.document import read_report

    found = compare(read_report(first), read_report(second))
    if as_json:
        print_json(found.as_dict())
    else:
        click.echo("Both tested the same file." if found.same_file else "The reports are of different files.")
        for table in _tables(found, first.name, second.name):
            print_table(table)
        click.echo(_verdict(found))
    if found.contradictions:
        sys.exit(1)


def _tables(found: Comparison, first: str, second: str) -> list[Table]:
    tables = []
    known = [v for v in found.values if v.first is not None or v.second is not None]
    values = [v for v in known if v.differs or v.section not in ("model", "options")]
    rows = [(f"{v.section} {v.name}", _shown(v.first), _shown(v.second), "≠" if v.differs else "") for v in values]
    tables.append(_table("Device, llama.cpp, file", ("", first, second, ""), rows))
    if found.outcomes:
        rows = [
            (o.name, _outcome(o.first, o.first_reason), _outcome(o.second, o.second_reason), "") for o in found.outcomes
        ]
        tables.append(_table("Tests with another outcome", ("test", first, second, ""), rows))
    figures = [figure for figure in found.figures if figure.first != figure.second]
    if found.figures:
        rows = [(f"{_short(f.test)} {f.name}", _shown(f.first), _shown(f.second), _shown(f.ratio)) for f in figures]
        title = f"Figures; {len(found.figures) - len(figures)} more are the same in both"
        tables.append(_table(title, ("", first, second, "ratio"), rows))
    if found.texts:
        rows = [
            (f"{_short(t.test)} {t.name}", t.first, t.second, f"{t.same_words} words the same") for t in found.texts
        ]
        tables.append(_table("Texts that differ", ("", first, second, ""), rows))
    return tables


def _table(title: str, columns: tuple[str, ...], rows: list[tuple[str, str, str, str]]) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, title_justify="left", box=box.SIMPLE)
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        # what a model says is no markup
        table.add_row(*map(Text, row))
    return table


def _verdict(found: Comparison) -> str:
    count = len(found.contradictions)
    if count:
        names = ", ".join(outcome.name for outcome in found.contradictions)
        return f"{count} passed in one and failed in the other: {names}"
    return "No test passed in one and failed in the other."


def _outcome(outcome: str, reason: str | None) -> str:
    return f"{outcome}: {reason}" if reason else outcome


def _short(test: str) -> str:
    """Without the file, which a reader does not look for."""
    return test.rpartition("::")[2].removeprefix("test_")


def _shown(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 1e5 else f"{value:.4g}"
    return str(value)
