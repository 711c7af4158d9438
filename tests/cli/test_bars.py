"""Progress bars: the rate in its unit, within 80 columns, and nothing of them where stderr is no terminal."""

from __future__ import annotations

import io

import pytest
from rich.console import Console
from rich.progress import Progress

from mopeq_edge.cli.bars import columns, rate
from mopeq_edge.cli.console import console_progress
from mopeq_edge.progress import BYTES


@pytest.mark.parametrize(
    ("speed", "unit", "shown"),
    [
        (812_345_678, BYTES, "812 MB/s"),
        (999.4, BYTES, "999 B/s"),
        (999_600, BYTES, "1.00 MB/s"),
        (2.5e13, BYTES, "25000 GB/s"),
        (1_204_000, "weights", "1.20M weights/s"),
        (12_340, "matrices", "12.3k matrices/s"),
        (0.3125, "windows", "0.31 windows/s"),
        (99.6, "windows", "100 windows/s"),
    ],
)
def test_rates(speed: float, unit: str, shown: str) -> None:
    assert rate(speed, unit) == shown


def draw(seconds: float, total: float | None, unit: str, done: float) -> str:
    """The last state of a bar that came to ``done`` in ``seconds``."""
    now = [0.0]
    out = io.StringIO()
    console = Console(file=out, width=80, force_terminal=True, color_system=None)
    bars = Progress(*columns(), console=console, auto_refresh=False, get_time=lambda: now[0])
    task = bars.add_task("calibrate: backward", total=total, unit=unit)
    # rich takes the speed from what was advanced between two moments
    for share in (0.5, 1.0):
        now[0] = share * seconds
        bars.update(task, completed=share * done)
    console.print(bars.get_renderable())
    return out.getvalue().splitlines()[-1]


def test_a_bar_says_share_rate_and_remaining_time_in_80_columns() -> None:
    line = draw(10, 400, "windows", 100)
    for part in ("calibrate: backward", "25%", "10.0 windows/s", "0:00:10", "0:00:30"):
        assert part in line
    assert len(line) <= 80


@pytest.mark.parametrize("unit", [BYTES, "matrices", ""])
def test_the_widest_bar_fits(unit: str) -> None:
    line = draw(28, 10**12, unit, 8.8e11)
    assert "88%" in line
    assert len(line.rstrip()) <= 80
    assert ("/s" in line) == bool(unit)


def test_a_step_of_unknown_length_shows_the_elapsed_time_alone() -> None:
    line = draw(75, None, "", 0)
    assert "0:01:15" in line
    assert "%" not in line


def test_without_a_terminal_only_notes_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    with console_progress() as progress:
        with progress.step("emit", 10, "weights") as step:
            step.advance(10)
        progress.note("note: an expert was never chosen")
    shown = capsys.readouterr()
    assert (shown.out, shown.err) == ("", "note: an expert was never chosen\n")
