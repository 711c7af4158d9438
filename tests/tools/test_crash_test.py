"""The crash test on one stage, in short; and that it sees a file that is neither old nor new."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tools.crash_points import FULL, KILL, TORN, Points, counted, in_child

pytestmark = pytest.mark.skipif(os.name != "posix", reason="forks")


def write_twice(folder: Path) -> None:
    """A writer that is not safe."""
    with (folder / "out").open("wb") as file:
        file.write(b"first")
        file.flush()
        file.write(b"second")


@pytest.mark.parametrize(
    ("action", "at", "code", "left"),
    [(KILL, 1, -9, b""), (TORN, 1, -9, b"fi"), (TORN, 2, -9, b"firstsec"), (FULL, 2, 1, b"first"), (KILL, 3, 0, None)],
)
def test_points(tmp_path: Path, action: str, at: int, code: int, left: bytes | None) -> None:
    def work() -> None:
        with counted(Points(tmp_path, action, at)):
            write_twice(tmp_path)

    assert in_child(work, tmp_path.parent / "stderr") == code
    assert (tmp_path / "out").read_bytes() == (b"firstsecond" if left is None else left)


def test_other_folders_do_not_count(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    with counted(Points(tmp_path / "here")) as points:
        write_twice(tmp_path / "elsewhere")
    assert points.count == 0


@pytest.mark.runtime
def test_convert_in_short(tmp_path: Path) -> None:
    """Calibrates, measures, plans, writes and evaluates, killed and out of disk at one of its writes each."""
    figures = tmp_path / "figures.json"
    command = [sys.executable, "-m", "tools.crash_test", "--stages", "convert", "--kills", "0", "--points", "1"]
    command += ["--interrupts", "0", "--work-dir", str(tmp_path / "crash"), "--json", str(figures)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(figures.read_text())[0]
    assert found["points"] > 60
    assert found["runs"] == {KILL: 1, TORN: 1, FULL: 1}
    assert found["failures"] == []
