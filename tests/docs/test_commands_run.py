"""The ```sh blocks of the pages are run, in order, in a folder that has examples/: what a reader types works."""

from __future__ import annotations

import os
import shlex
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from .pages import ROOT, Line, lines

PAGES = ("quick-start.md", "choosing-a-budget.md", "jetson.md", "how-it-works.md")

SHORTER = {
    "convert": "--chunks 2 --sample-rows 8",
    "calibrate": "--chunks 2",
    "sensitivity": "--sample-rows 8",
    "evaluate": "--chunks 2",
    "study": "--windows 2 --chunks 2",
}
"""What the test adds to a command, so that it takes seconds: fewer windows, fewer rows."""
MEASURED = ("quick-start.md", "0.0085")
"""The one conversion that also evaluates; the others leave it out."""


def shortened(line: Line) -> str:
    command = line.words[1]
    more = [SHORTER[command]] if line.words[0] == "mopeq-edge" and command in SHORTER else []
    if more and command == "convert" and not (line.page == MEASURED[0] and MEASURED[1] in line.words):
        more.append("--no-evaluate")
    return " ".join([line.text, *more])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """With the bundled model, and mopeq-edge on the PATH however this Python got it."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    program = tmp_path / "bin" / "mopeq-edge"
    program.parent.mkdir()
    code = "import sys; sys.argv[0] = 'mopeq-edge'; from mopeq_edge.cli import main; main()"
    program.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -c "{code}" "$@"\n')
    program.chmod(0o755)
    return tmp_path


def environment(folder: Path) -> dict[str, str]:
    path = os.pathsep.join([str(folder / "bin"), os.environ.get("PATH", os.defpath)])
    found = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PATH": path, "PYTHONPATH": os.pathsep.join(found), "OMP_NUM_THREADS": "1"}


def run(text: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "-c", text],
        cwd=folder,
        env=environment(folder),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=600,
        check=False,
    )


@contextmanager
def server(text: str, folder: Path, port: int) -> Iterator[None]:
    """The command in the background, from when it answers."""
    with subprocess.Popen(
        ["bash", "-c", f"exec {text}"],
        cwd=folder,
        env=environment(folder),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as process:
        try:
            until = time.monotonic() + 120
            while True:
                assert process.poll() is None, text
                try:
                    with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                        break
                except (urllib.error.URLError, OSError):
                    assert time.monotonic() < until, text
                    time.sleep(0.2)
            yield
        finally:
            process.terminate()


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


@pytest.mark.runtime
@pytest.mark.parametrize("page", PAGES)
def test_the_page_s_commands_work(page: str, folder: Path) -> None:
    commands = [line for line in lines(ROOT / "docs" / page) if line.language == "sh"]
    assert commands
    assert all(line.text.startswith(("mopeq-edge ", "curl ")) for line in commands)
    port = free_port()
    served: str | None = None
    for line in commands:
        text = shortened(line).replace("8080", str(port))
        if text.startswith("mopeq-edge serve "):
            served = text
            continue
        if text.startswith("curl "):
            assert served is not None, "nothing serves"
            with server(served, folder, port):
                done = run(text, folder)
            assert '"choices"' in done.stdout, done.stdout
        else:
            done = run(text, folder)
        assert done.returncode == 0, f"{line}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
        assert "Traceback" not in done.stderr


def test_blocks_that_are_not_run_are_of_the_board_or_the_installation() -> None:
    """``console`` is for what a test cannot do: packages, other machines, the whole suite."""
    not_ours = {"git", "python3", "pip", "sudo", "export", "tegrastats", "CMAKE_ARGS=-DLLAMA_BUILD=OFF", "make"}
    needs_a_board = ("runtime install", "-ngl 99")
    for page in PAGES:
        for line in lines(ROOT / "docs" / page):
            if line.language == "console" and line.words[0] == "mopeq-edge" and line.text != "mopeq-edge runtime info":
                assert any(words in line.text for words in needs_a_board), line
            elif line.language == "console" and line.words[0] not in ("mopeq-edge", "pytest"):
                assert line.words[0] in not_ours, line
