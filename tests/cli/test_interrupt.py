"""Ctrl-C and SIGTERM: one line, the code that shells expect, within two seconds, whatever the process is doing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mopeq_edge import interrupts

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")

WORK = {
    "python": "while True: time.sleep(0.01)",
    "threads": "with ThreadPoolExecutor(2) as pool: list(pool.map(time.sleep, [60, 60]))",
    "ctypes": "while True: ctypes.CDLL(None).pause()",
    # a call that Python cannot break off, as into libggml, torch or llama.cpp
    "native": "np.linalg.svd(np.random.default_rng(0).random((4000, 4000)))",
    "child": "run_lines(['sh', '-c', 'echo $$ > child.pid; sleep 60'], lambda line: None)",
    "file": "with atomic_write(Path('out')) as file:\n    file.write(b'half'); file.flush(); time.sleep(60)",
}

PROGRAM = """
import ctypes, sys, time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
import click
import numpy as np
import mopeq_edge.cli as cli
from mopeq_edge.atomic import atomic_write
from mopeq_edge.runtime.process import run_lines

@click.command()
def work():
    print("ready", flush=True)
{body}

cli.cli = work
cli.main()
"""


def start(folder: Path, body: str) -> subprocess.Popen[bytes]:
    program = PROGRAM.format(body="\n".join(f"    {line}" for line in body.splitlines()))
    command = [sys.executable, "-c", program]
    path = os.pathsep.join([os.getcwd(), *filter(None, [os.environ.get("PYTHONPATH")])])
    child = subprocess.Popen(
        command,
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": path},
        # ignored where the tests run in a script's background
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert child.stdout is not None
    assert child.stdout.readline() == b"ready\n"
    time.sleep(0.4)
    return child


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "SIGTERM"])
@pytest.mark.parametrize("work", list(WORK))
def test_it_ends(tmp_path: Path, work: str, number: signal.Signals) -> None:
    child = start(tmp_path, WORK[work])
    assert child.poll() is None
    sent = time.monotonic()
    child.send_signal(number)
    child.send_signal(number)
    _, said = child.communicate(timeout=30)
    assert time.monotonic() - sent < 2 * interrupts.GRACE_SECONDS
    assert said.decode() == interrupts.MESSAGE
    assert child.returncode == 128 + number
    if work == "child":
        with pytest.raises(ProcessLookupError):
            os.kill(int((tmp_path / "child.pid").read_text()), 0)
    if work == "file":
        assert list(tmp_path.iterdir()) == []


def test_what_was_ignored_stays_so(tmp_path: Path) -> None:
    """As under nohup, or in a script's background."""
    program = PROGRAM.format(body="    time.sleep(1)\n    print('done')")
    command = ["sh", "-c", 'trap "" INT; exec "$0" -c "$1"', sys.executable, program]
    path = {**os.environ, "PYTHONPATH": os.getcwd()}
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, env=path) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"ready\n"
        child.send_signal(signal.SIGINT)
        assert child.stdout.read() == b"done\n"
    assert child.returncode == 0


CALLBACK = """
import os, signal
compare_type = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)
def compare(a, b):
    os.kill(os.getpid(), signal.SIGINT)
    return 0
numbers = (ctypes.c_int * 2)(2, 1)
ctypes.CDLL(None).qsort(numbers, 2, 4, compare_type(compare))
print("went on", flush=True)
"""
"""What is raised in a function that C calls goes nowhere: Python prints it and returns to C."""


def test_a_signal_in_a_callback_of_c_is_not_lost(tmp_path: Path) -> None:
    child = start(tmp_path, CALLBACK)
    out, err = child.communicate(timeout=60)
    assert (child.returncode, out) == (130, b"")
    assert err.decode() == interrupts.MESSAGE
