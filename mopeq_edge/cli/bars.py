"""What a progress bar shows beside itself: share, rate with its unit, elapsed and remaining time, in 80 columns."""

from __future__ import annotations

from rich.progress import (
    BarColumn,
    ProgressColumn,
    Task,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Column
from rich.text import Text

from mopeq_edge.progress import BYTES

TITLE_WIDTH, BAR_WIDTH, RATE_WIDTH = 22, 14, 18


class RateColumn(ProgressColumn):
    """Units a second, averaged by rich over the last half minute; of a finished step over all of it."""

    def render(self, task: Task) -> Text:
        """Empty before there is a rate, and for a step that counts nothing."""
        speed, unit = task.finished_speed or task.speed, task.fields.get("unit", "")
        return Text(rate(speed, unit) if speed and unit else "", style="progress.data.speed")


def rate(speed: float, unit: str) -> str:
    """``speed`` units a second in three digits, e.g. ``812 MB/s``, ``1.20M weights/s``, ``0.31 windows/s``."""
    scaled, prefix = speed, ""
    for prefix in ("", "k", "M", "G"):
        if scaled < 999.5 or prefix == "G":
            break
        scaled /= 1000
    digits = f"{scaled:.0f}" if scaled >= 99.5 else f"{scaled:.1f}" if scaled >= 9.95 else f"{scaled:.2f}"
    return f"{digits} {prefix}B/s" if unit == BYTES else f"{digits}{prefix} {unit}/s"


def columns() -> tuple[ProgressColumn, ...]:
    """The columns of every bar, from left to right."""
    title = Column(width=TITLE_WIDTH, no_wrap=True, overflow="ellipsis")
    return (
        TextColumn("{task.description}", table_column=title, markup=False),
        BarColumn(bar_width=BAR_WIDTH),
        TaskProgressColumn(),
        RateColumn(Column(width=RATE_WIDTH, no_wrap=True, justify="right")),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
