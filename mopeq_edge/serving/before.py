"""llama-server behind a front of ours: it listens on a socket file that nobody else reaches, and ends with us."""

from __future__ import annotations

import ctypes
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import uvicorn

from mopeq_edge import interrupts
from mopeq_edge.serving.front import make_front
from mopeq_edge.serving.listen import address, bind, server_of

END_SECONDS = 1.0
"""For llama-server to end in order."""
_SET_PARENT_DEATH_SIGNAL = 1
"""Linux's prctl."""


def stand_before(command: Sequence[str], host: str, port: int, ready: Callable[[str], None]) -> int:
    """Start the llama-server ``command`` and answer at ``host`` and ``port`` in its place, until it or the user ends.

    ``ready`` is told the address; the result is the exit code. Raises :class:`MopeqError` for an address that cannot be
    had, :class:`OSError` for a program that does not start.
    """
    with bind(host, port) as bound, tempfile.TemporaryDirectory(prefix="mopeq-edge-") as folder:
        socket = Path(folder) / "llama.sock"
        # from here on the signals are uvicorn's, which ends in order and raises them again
        interrupts.uninstall()
        signal.signal(signal.SIGTERM, _terminated)
        child = subprocess.Popen([*command, "--host", str(socket)], preexec_fn=_ends_with_parent)
        try:
            server = server_of(make_front(socket))
            threading.Thread(target=_end_with, args=(child, server), daemon=True).start()
            ready(address(bound))
            server.run(sockets=[bound])
            # else it was the user who ended it, and the signal is raised again
            return child.wait()
        except KeyboardInterrupt:
            return 128 + signal.SIGINT
        finally:
            _stop(child)


def _terminated(number: int, _: object) -> None:
    raise SystemExit(128 + number)


def _end_with(child: subprocess.Popen[bytes], server: uvicorn.Server) -> None:
    child.wait()
    server.should_exit = True


def _stop(child: subprocess.Popen[bytes]) -> None:
    child.terminate()
    try:
        child.wait(END_SECONDS)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()


def _ends_with_parent() -> None:
    """Also where that is killed and can do nothing any more; elsewhere than on Linux it cannot be had."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGKILL)
