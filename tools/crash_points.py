"""Stop a process, or fill its disk, at a chosen write: every system call that changes a file is a numbered point.

Python's own files, ``os.replace``, ``os.fsync``, ``os.unlink``, ``os.rename`` and ``os.mkdir`` are counted. What C code
writes past Python (the child of a stage, a mapped file) is not: for that there are kills at random times.
"""

from __future__ import annotations

import errno
import io
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

KILL, TORN, FULL = "kill", "torn", "full"
ACTIONS = (KILL, TORN, FULL)
"""Kill before the point; after the first half of the data that it writes; the disk is full from there on."""

_CALLS = ("replace", "fsync", "unlink", "rename", "mkdir")


class Points:
    """Counts points below the folder ``root``, and does ``action`` at the ``at``-th (from 1)."""

    def __init__(self, root: Path, action: str = "", at: int = 0) -> None:
        self.root, self.action, self.at = os.fspath(root), action, at
        self.count = 0

    def concerns(self, path: Any) -> bool:
        return isinstance(path, str | os.PathLike) and os.path.abspath(os.fspath(path)).startswith(self.root)

    def reach(self, write: Callable[[], object] | None = None) -> None:
        """One point; ``write`` writes the first half of what is to be written, where there is such a thing."""
        self.count += 1
        if self.action == FULL and self.count >= self.at > 0 and write is not None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if self.count != self.at or self.action == FULL:
            return
        if self.action == TORN and write is not None:
            write()
        os.kill(os.getpid(), signal.SIGKILL)


class _CountedFile(io.FileIO):
    points: Points

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        self.points.reach(lambda: super(_CountedFile, self).write(view[: len(view) // 2]))
        return super().write(data)


@contextmanager
def counted(points: Points) -> Iterator[Points]:
    """Let every write of this process below the folder of ``points`` go by it."""
    own_open, own_calls = io.open, {name: getattr(os, name) for name in _CALLS}

    def counted_open(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        writes = set(mode) & set("wxa+")
        if "b" not in mode or not writes or not points.concerns(file) or mode == "r+b":
            return own_open(file, mode, *args, **kwargs)
        raw = _CountedFile(file, mode.replace("b", ""))
        raw.points = points
        return io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)

    def counted_call(name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if isinstance(args[0], int) or points.concerns(args[0]):
                points.reach()
            return own_calls[name](*args, **kwargs)

        return call

    io.open = counted_open  # type: ignore[assignment]
    for name in _CALLS:
        setattr(os, name, counted_call(name))
    try:
        yield points
    finally:
        io.open = own_open
        for name, call in own_calls.items():
            setattr(os, name, call)


def in_child(work: Callable[[], object], stderr: Path | None = None) -> int:
    """Run ``work`` in a fork of this process: its exit code, negative for a signal; an exception is 1."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            if stderr is not None:
                handle = os.open(stderr, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
                os.dup2(handle, 2)
            work()
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        except BaseException as error:
            os.write(2, f"{type(error).__name__}: {error}\n".encode())
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
