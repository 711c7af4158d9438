"""Ctrl-C and SIGTERM: an orderly end if it comes soon, else the end.

Whatever is written under a final name is whole, and a killed run's leftovers are removed by the next one, so the
process may end at any moment. The signal raises :class:`Interrupted` in the main thread, whose blocks then clean up.
Python does that only between two of its own instructions, and a call into torch, libggml or llama.cpp can take minutes:
a thread, woken by the signal itself, ends the process when :data:`GRACE_SECONDS` have passed.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from contextlib import suppress
from typing import NoReturn

GRACE_SECONDS = 1.2
"""For cleaning up; after them nothing is waited for."""

MESSAGE = "mopeq-edge: interrupted; run the same command again to go on\n"
_SHOW_CURSOR = b"\x1b[?25h"
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(BaseException):
    """The user, or the system, wants the process to end. ``number`` is the signal's."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number

    @property
    def exit_code(self) -> int:
        """130 for Ctrl-C, 143 for SIGTERM, as shells count."""
        return 128 + self.number


def install() -> None:
    """Make the two signals end this process within two seconds. Call it in the main thread, once."""
    for number in _SIGNALS:
        # what was ignored (nohup, a background job of a script) stays so
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _raise)
    sys.unraisablehook = _unraisable
    woken, wakes = socket.socketpair()
    wakes.setblocking(False)
    signal.set_wakeup_fd(wakes.fileno(), warn_on_full_buffer=False)
    threading.Thread(target=_watch, args=(woken, wakes), name="interrupts", daemon=True).start()


def uninstall() -> None:
    """Give the signals back to Python: for a program of its own that decides itself."""
    signal.set_wakeup_fd(-1)
    sys.unraisablehook = sys.__unraisablehook__
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def end(number: int) -> NoReturn:
    """Say so and end the process at once, without waiting for any thread."""
    message = MESSAGE.encode()
    if sys.stderr is not None and sys.stderr.isatty():
        # a progress bar hid it
        message = _SHOW_CURSOR + b"\r" + message
    with suppress(OSError):
        os.write(2, message)
    os._exit(128 + number)


def _raise(number: int, _frame: object) -> None:
    # a second signal during the cleaning up changes nothing: the watcher has its eye on the clock
    for own in _SIGNALS:
        signal.signal(own, signal.SIG_IGN)
    raise Interrupted(number)


def _unraisable(found: sys.UnraisableHookArgs) -> None:
    """A signal that came in a callback of C (llama.cpp's log), from where nothing can be raised: Python would go on."""
    if isinstance(found.exc_value, Interrupted):
        end(found.exc_value.number)
    sys.__unraisablehook__(found)


def _watch(woken: socket.socket, wakes: socket.socket) -> None:
    """Sleep until one of the signals comes, and end the process if nothing else does; ``wakes`` must stay open."""
    with woken, wakes:
        while True:
            received = [number for number in woken.recv(64) if number in _SIGNALS]
            if received:
                time.sleep(GRACE_SECONDS)
                end(received[0])
