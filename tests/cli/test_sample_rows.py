"""What ``--sample-rows`` takes."""

from __future__ import annotations

import click
import pytest
from click.testing import CliRunner

from mopeq_edge.cli import cli, options


@click.command()
@options.measure_options
def shown(sample_rows: object, quantize_with: str) -> None:
    """Print what a command gets."""
    click.echo(repr(sample_rows))


@pytest.mark.parametrize(
    ("given", "expected"), [([], "'auto'"), (["auto"], "'auto'"), (["all"], "None"), (["2"], "2"), (["64"], "64")]
)
def test_rows_are_auto_all_or_a_number(given: list[str], expected: str) -> None:
    options_given = ["--sample-rows", *given] if given else []
    assert CliRunner().invoke(shown, options_given).output == f"{expected}\n"


@pytest.mark.parametrize("given", ["1", "0", "-3", "few", "2.5", ""])
def test_anything_else_is_refused(given: str) -> None:
    done = CliRunner().invoke(shown, ["--sample-rows", given])
    assert done.exit_code == 2
    assert f"'{given}' is neither auto, all nor a number from 2" in done.output


def test_rows_alone_are_not_all_rows() -> None:
    done = CliRunner().invoke(cli, ["sensitivity", "model", "--rows-only", "--sample-rows", "all"])
    assert done.exit_code == 2
    assert "--rows-only with --sample-rows all: all rows are to be measured; leave out one of them" in done.output
