"""Two runs on one work directory, or of one output: the second refuses, with the first one's pid."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from mopeq_edge.cli import cli
from mopeq_edge.errors import BusyError

from ..arrays import ArraySource
from ..builders import TOKENIZER_FROM, write_gguf

MODEL = str(TOKENIZER_FROM)
TEXT = str(TOKENIZER_FROM / "calibration.txt")
COMMANDS = {
    "calibrate": ["calibrate", MODEL],
    "sensitivity": ["sensitivity", MODEL],
    "plan": ["plan", MODEL, "--target-gb", "1"],
    "emit": ["emit", MODEL, "OUT"],
    "evaluate": ["evaluate", "GGUF", "--against", MODEL, "--text", TEXT],
    "convert": ["convert", MODEL, "OUT", "--target-gb", "1"],
    "study": ["study", MODEL, "--budgets", "1"],
}
HOLD = """
import sys
from pathlib import Path
from mopeq_edge.alone import alone
with alone(*map(Path, sys.argv[1:])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[int]:
    """The pid of a process at work in ``work`` on ``out.gguf``."""
    command = [sys.executable, "-c", HOLD, tmp_path / "work", tmp_path / "out.gguf"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"held\n"
        yield child.pid
        child.communicate()


def invoke(folder: Path, name: str, work: str) -> BaseException | None:
    gguf = folder / "tiny.gguf"
    if not gguf.exists():
        write_gguf(ArraySource(), gguf)
    places = {"OUT": str(folder / "out.gguf"), "GGUF": str(gguf)}
    arguments = [places.get(word, word) for word in COMMANDS[name]]
    return CliRunner().invoke(cli, [*arguments, "--work-dir", str(folder / work)]).exception


@pytest.mark.parametrize("name", list(COMMANDS))
def test_one_work_directory(tmp_path: Path, holder: int, name: str) -> None:
    error = invoke(tmp_path, name, "work")
    assert isinstance(error, BusyError)
    assert str(error).startswith(f"{tmp_path / 'work'}: another mopeq-edge (pid {holder}) works there; wait until")


@pytest.mark.parametrize("name", ["emit", "convert"])
def test_one_output(tmp_path: Path, holder: int, name: str) -> None:
    error = invoke(tmp_path, name, "another")
    assert isinstance(error, BusyError)
    assert str(error).startswith(f"{tmp_path / 'out.gguf'}: another mopeq-edge (pid {holder}) works there; wait until")
    assert not (tmp_path / "another").exists()


def test_who_only_reads_need_not_wait(tmp_path: Path, holder: int) -> None:
    write_gguf(ArraySource(), tmp_path / "out.gguf")
    assert CliRunner().invoke(cli, ["inspect", MODEL, "--pre", "gpt-2"]).exit_code == 0
    # random matrices are no model: what matters is that they are looked at
    checked = CliRunner().invoke(cli, ["validate", str(tmp_path / "out.gguf"), "--no-run", "--json"])
    assert json.loads(checked.stdout)["checks"]
    done = CliRunner().invoke(cli, ["verify", str(tmp_path / "out.gguf")])
    assert done.exit_code == 3
