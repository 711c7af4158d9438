"""Run a program and hand over its output while it runs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from mopeq_edge.errors import RuntimeMissingError


def run_lines(
    command: Sequence[str | Path],
    on_line: Callable[[str], None],
    *,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
) -> int:
    """Run ``command`` to its end and return its exit code, negative for a signal.

    stdout and stderr come together, line by line without the line end, to ``on_line``; a carriage
    return ends a line too. stdin is empty. If ``on_line`` raises, or the user interrupts, the
    program and its children are ended first. Raises RuntimeMissingError if it cannot start.
    """
    try:
        process = subprocess.Popen(
            [os.fspath(part) for part in command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            errors="replace",
            cwd=cwd,
            env=env,
            # A group of its own, so that a compiler below ninja below cmake can be ended with them.
            start_new_session=sys.platform != "win32",
        )
    except OSError as error:
        raise RuntimeMissingError(
            f"{Path(command[0]).name} could not start: {error.filename}: {error.strerror}"
        ) from error
    assert process.stdout is not None
    with process.stdout:
        try:
            for line in process.stdout:
                on_line(line.rstrip("\n"))
            return process.wait()
        except BaseException:
            _end(process)
            raise


def version_output(program: Path, seconds: float) -> str | None:
    """What ``program --version`` prints; None if it cannot start or takes longer than ``seconds``."""
    try:
        done = subprocess.run(
            [program, "--version"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            errors="replace",
            timeout=seconds,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout


def describe_exit(code: int) -> str:
    """An exit code of `run_lines` in words, to follow a program's name."""
    if code >= 0:
        return f"failed with exit code {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    hint = " (out of memory?)" if name == "SIGKILL" else ""
    return f"was ended by {name}{hint}"


def last_words(lines: Sequence[str], limit: int = 300) -> str:
    """The last of ``lines`` that says something, at most ``limit`` characters."""
    spoken = [line.strip() for line in lines if line.strip()]
    return spoken[-1][:limit] if spoken else "no output"


def _end(process: subprocess.Popen[str]) -> None:
    try:
        if sys.platform == "win32":
            process.kill()
        else:
            os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()
