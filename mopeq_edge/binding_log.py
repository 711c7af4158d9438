"""llama.cpp's log, kept silent while a model is open: its last errors become the message when a call fails."""

from __future__ import annotations

import ctypes
import re
import threading
from collections import deque
from functools import cache
from types import ModuleType

_LEVEL_ERROR = 4
_LEVEL_CONTINUED = 5
_PREFIX = re.compile(r"^(?:[\w:~]+: |error loading model: )+")


class LogTail:
    """The last error lines of llama.cpp, of each thread, while a model is open."""

    def __init__(self, c: ModuleType) -> None:
        self._c = c
        self._lock = threading.Lock()
        self._users = 0
        self._thread = threading.local()
        self._callback = c.llama_log_callback(self._receive)
        self._before = (c.llama_log_callback(), ctypes.c_void_p())

    def acquire(self) -> None:
        with self._lock:
            if not self._users:
                callback, data = self._before
                self._c.llama_log_get(ctypes.byref(callback), ctypes.byref(data))
                self._c.llama_log_set(self._callback, None)
            self._users += 1

    def release(self) -> None:
        with self._lock:
            self._users -= 1
            if not self._users:
                self._c.llama_log_set(*self._before)

    def clear(self) -> None:
        self._thread.lines = deque(maxlen=8)
        self._thread.level = 0

    def reason(self) -> str:
        """The first error since :meth:`clear`: the later ones only say that the load failed."""
        text = "".join(getattr(self._thread, "lines", ())).strip()
        if not text:
            return "it gave no reason"
        return _PREFIX.sub("", text.splitlines()[0]).strip()

    def _receive(self, level: int, text: bytes, _data: object) -> None:
        if level != _LEVEL_CONTINUED:
            self._thread.level = level
        if getattr(self._thread, "level", 0) == _LEVEL_ERROR:
            if not hasattr(self._thread, "lines"):
                self.clear()
                self._thread.level = _LEVEL_ERROR
            self._thread.lines.append(text.decode(errors="replace"))


@cache
def log_tail(c: ModuleType) -> LogTail:
    """The one listener of this binding."""
    # llama.cpp has one log callback for the whole process, so there can only be one listener.
    return LogTail(c)
