"""The corpus of bad files: each is refused in one line, without memory; the tool tells what readers do."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import pytest

from tools import bad_files

# reads every file with a tenth of a gigabyte to spare and says what it got
CHILD = """
import resource, sys
from pathlib import Path
from mopeq_edge.errors import MopeqError
from mopeq_edge.source.gguf import GGUFSource
from mopeq_edge.summary import summarise
pages = int(Path("/proc/self/statm").read_text().split()[0])
limit = pages * resource.getpagesize() + 100 * 2**20
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
for path in sorted(Path(sys.argv[1]).iterdir()):
    try:
        summarise(path)
        print(path.stem, "accepted")
    except MopeqError as error:
        print(path.stem, str(error))
    try:
        GGUFSource(path)
    except MopeqError:
        pass
print(resource.getrusage(resource.RUSAGE_SELF).ru_utime)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bad")
    for name, build in bad_files.FILES.items():
        (path / f"{name}.gguf").write_bytes(build())
    return path


def test_small_and_always_the_same(folder: Path) -> None:
    sizes = [path.stat().st_size for path in folder.iterdir()]
    assert max(sizes) < 150_000
    assert all((folder / f"{name}.gguf").read_bytes() == build() for name, build in bad_files.FILES.items())


def test_all_are_refused_in_one_line_with_little_memory(folder: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(folder)],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    *lines, seconds = done.stdout.splitlines()
    said = dict(line.split(" ", 1) for line in lines)
    assert said.keys() == bad_files.FILES.keys()
    assert [name for name, text in said.items() if text == "accepted"] == ["nothing_wrong"]
    for name, text in said.items():
        if name != "nothing_wrong":
            assert text.startswith(f"{folder / name}.gguf: ")
            assert text.isprintable()
    # of processor time for all of them, the start of Python included
    assert float(seconds) < 1.0 * len(said)


@pytest.mark.parametrize(
    ("code", "verdict", "how"),
    [
        ("pass", "accepts", ""),
        ("raise SystemExit('error: no')", "refuses", ""),
        ("raise ValueError('no')", "refuses", "ValueError"),
        ("[][0]", "stumbles", "IndexError"),
        ("import os; os.abort()", "crashes", "SIGABRT"),
        ("bytes(8 << 30)", "stumbles", "MemoryError"),
        ("while True: pass", "hangs", "stopped after 1 s"),
    ],
)
def test_verdicts(monkeypatch: pytest.MonkeyPatch, code: str, verdict: str, how: str) -> None:
    monkeypatch.setattr(bad_files, "SECONDS", 1 if verdict == "hangs" else 60)
    found = bad_files.read([sys.executable, "-c", code])
    assert (found.verdict, found.how) == (verdict, how)
    assert resource.getrlimit(resource.RLIMIT_AS) == (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
