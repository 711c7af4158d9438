"""The CSV file: round trip, replacement, and what is not ours."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from mopeq_edge.errors import FormatError
from mopeq_edge.study.presets import nearest_below
from mopeq_edge.study.rows import COLUMNS, Row, RowFile

ROW = Row(
    *('a, "b"', "plan", "fisher", "knapsack", "stock", 100, 96, 2.5, 1 / 3, 2e-300, 0.1, 0.2, 0.75, 21.5),
    *("f" * 64, "e" * 64, 1.25, "d" * 64, (0.125, 3e-05)),
)


def test_rows_come_back_as_they_were(tmp_path: Path) -> None:
    path = tmp_path / "study.csv"
    bare = replace(ROW, case="bare", budget_bytes=None, predicted_fisher=None, predicted_own=None, plan_sha256="")
    file = RowFile(path)
    file.put(ROW)
    file.put(bare)
    again = RowFile(path)
    assert again.get(ROW.case, ROW.made_from) == ROW
    assert again.get("bare", ROW.made_from) == bare
    assert again.get(ROW.case, "other") is None
    assert again.get("other", ROW.made_from) is None
    again.put(replace(ROW, made_from="new"))
    assert RowFile(path).get(ROW.case, "new") is not None
    assert len(path.read_text().splitlines()) == 3


@pytest.mark.parametrize(
    "text", ["", "case,kind\n", ",".join(COLUMNS) + "\na,b\n", ",".join(COLUMNS) + "\n" + "x," * 18 + "1\n"]
)
def test_other_files_are_refused_and_left_alone(tmp_path: Path, text: str) -> None:
    path = tmp_path / "study.csv"
    path.write_text(text)
    with pytest.raises(FormatError, match="not rows as mopeq-edge study writes them"):
        RowFile(path)
    assert path.read_text() == text


def test_the_nearest_presets() -> None:
    sizes = {"a": 10, "b": 20, "c": 30, "d": 31}
    assert nearest_below(sizes, 5, 35) == ["c", "b"]
    assert nearest_below(sizes, 5, 36) == ["d", "c"]
    assert nearest_below(sizes, 5, 15) == ["a"]
    assert nearest_below(sizes, 5, 14) == []
