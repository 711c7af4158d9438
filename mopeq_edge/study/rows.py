"""study.csv: one row a finished run. It is whole at any moment, so an interrupted study loses no finished row."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from mopeq_edge.atomic import atomic_write
from mopeq_edge.errors import FormatError


@dataclass(frozen=True)
class Row:
    """One run: sizes in bytes, KLD and ``predicted_fisher`` in nats per token, ``predicted_own`` in its score's unit.

    ``made_from`` hashes source, calibration, evaluation text, windows, llama.cpp and plan. ``expert_bpw`` counts the
    experts' weights without maps and padding. Empty (None) where there is nothing: a preset has no plan, a table
    without gradients no ``fisher``. ``kld_by_window`` [n_windows] are the means of the windows, in nats.
    """

    case: str
    kind: str
    sensitivity: str
    planner: str
    layout: str
    budget_bytes: int | None
    file_bytes: int
    expert_bpw: float
    predicted_fisher: float | None
    predicted_own: float | None
    kld_mean: float
    kld_p99_9: float
    same_top: float
    ppl: float
    file_sha256: str
    plan_sha256: str
    seconds: float
    made_from: str
    kld_by_window: tuple[float, ...]


COLUMNS = tuple(field.name for field in fields(Row))
_INTEGERS = frozenset({"budget_bytes", "file_bytes"})
_FLOATS = frozenset(
    {"expert_bpw", "predicted_fisher", "predicted_own", "kld_mean", "kld_p99_9", "same_top", "ppl", "seconds"}
)
_MAY_LACK = frozenset({"budget_bytes", "predicted_fisher", "predicted_own"})


class RowFile:
    """The rows of a CSV file, by case. Every change rewrites the file as a whole; it is small."""

    def __init__(self, path: Path) -> None:
        """Read what is there. Raises :class:`FormatError` for a file that this class did not write."""
        self.path = path
        self._rows = {row.case: row for row in _read(path)} if path.exists() else {}

    def get(self, case: str, made_from: str) -> Row | None:
        """The finished row of ``case`` if it was made from the same."""
        row = self._rows.get(case)
        return row if row is not None and row.made_from == made_from else None

    @property
    def rows(self) -> tuple[Row, ...]:
        """All rows, in the order in which they were measured."""
        return tuple(self._rows.values())

    def put(self, row: Row) -> None:
        """Add ``row``, or replace the one of the same case."""
        self._rows[row.case] = row
        text = io.StringIO(newline="")
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(COLUMNS)
        for one in self._rows.values():
            writer.writerow([_cell(value) for value in asdict(one).values()])
        with atomic_write(self.path) as file:
            file.write(text.getvalue().encode())


def _cell(value: Any) -> str:
    if isinstance(value, tuple):
        return " ".join(f"{number:.6g}" for number in value)
    if value is None:
        return ""
    return repr(value) if isinstance(value, float) else str(value)


def _read(path: Path) -> list[Row]:
    try:
        with path.open(encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            if tuple(reader.fieldnames or ()) != COLUMNS:
                raise ValueError(f"columns {reader.fieldnames}")
            return [_row(cells) for cells in reader]
    except (OSError, ValueError, TypeError, csv.Error) as error:
        raise FormatError(f"{path}: not rows as mopeq-edge study writes them ({error}); move it away") from None


def _row(cells: Mapping[str, str]) -> Row:
    return Row(**{name: _value(name, cells[name]) for name in COLUMNS})


def _value(name: str, cell: str) -> Any:
    if name == "kld_by_window":
        return tuple(float(number) for number in cell.split())
    if not cell and name in _MAY_LACK:
        return None
    if name in _INTEGERS:
        return int(cell)
    return float(cell) if name in _FLOATS else cell
