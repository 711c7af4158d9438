"""What benchmarks say of a run: its memory by parts, its time, and ratios round by round."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tools.bench import measure
from tools.bench.measure import Ratio, Run, Spread, compared, in_turn, markdown, run

MAP = """
import mmap, sys, time
own = bytearray({own} * 2**20)
with open(sys.argv[1], "rb") as file:
    mapped = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
    total = sum(mapped[::4096])
time.sleep(0.1)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="memory by parts is read from /proc")
def test_memory_is_that_of_the_program_with_and_without_mapped_files(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"x" * (48 * 2**20))
    nothing, much = (run([sys.executable, "-c", MAP.format(own=own), str(path)]) for own in (0, 64))
    assert 60 < much.anonymous_mib - nothing.anonymous_mib < 70
    assert 60 < much.peak_mib - nothing.peak_mib < 70
    assert 46 < nothing.peak_mib - nothing.anonymous_mib < 70
    assert 0.1 < much.seconds < 60
    assert much.cpu_seconds > 0


def test_a_program_that_fails_ends_the_benchmark_with_what_it_said() -> None:
    with pytest.raises(SystemExit, match=r"failed with status .*: no such luck"):
        run([sys.executable, "-c", "import sys; sys.exit('no such luck')"])


def test_runs_are_in_turn_there_and_back_and_prepared_each(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    monkeypatch.setattr(measure, "run", lambda command: done.append(command[0]) or Run(1, 1, 1, 1))
    found = in_turn({"a": ["A"], "b": ["B"]}, 3, lambda name: done.append(f"before {name}"))
    assert [what for what in done if "before" not in what] == ["A", "B", "B", "A", "A", "B"]
    assert done[:4] == ["before a", "A", "before b", "B"]
    assert {name: len(runs) for name, runs in found.items()} == {"a": 3, "b": 3}


def test_ratios_are_of_the_same_round() -> None:
    ours = [Run(2, 0, 10, 0), Run(4, 0, 10, 0), Run(3, 0, 10, 0)]
    theirs = [Run(4, 0, 40, 0), Run(4, 0, 50, 0), Run(12, 0, 20, 0)]
    speed = compared("bench", "speed", ours, theirs, "seconds", speed=True, target="≥ 1")
    assert speed == Ratio("bench", "speed", Spread(1, 2, 4), Spread(2, 3, 4), Spread(4, 4, 12), "s", "≥ 1")
    memory = compared("bench", "memory", ours, theirs, "peak_mib", target="")
    assert memory.ratio == Spread(0.2, 0.25, 0.5)
    assert markdown([speed, memory]).splitlines()[2:] == [
        "| bench | speed | 2.00 (1.00 to 4.00) | ≥ 1 | 3.0 (2.0 to 4.0) s | 4.0 (4.0 to 12.0) s |",
        "| bench | memory | 0.25 (0.20 to 0.50) | – | 10 (10 to 10) MiB | 40 (20 to 50) MiB |",
    ]
