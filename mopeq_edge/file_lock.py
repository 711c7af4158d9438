"""Locks on open files: they end with the process that holds them, however it ends."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from mopeq_edge.errors import BusyError

if sys.platform == "win32":
    import msvcrt

    _FAR = 2**40
    """Locks of Windows keep others from reading the locked bytes; this one lies behind everything that is read."""

    def try_lock(file: IO[bytes]) -> bool:
        """Lock ``file`` until it is closed; False if another has it. Raises OSError where nothing can be locked."""
        at = file.tell()
        file.seek(_FAR)
        try:
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        except PermissionError:
            return False
        finally:
            file.seek(at)
        return True

    def lock_folder(folder: Path) -> int | None:
        """No folder can be opened here."""
        raise OSError(errno.ENOTSUP, "folders cannot be locked")

else:
    import fcntl

    def try_lock(file: IO[bytes]) -> bool:
        """Lock ``file`` until it is closed; False if another has it. Raises OSError where nothing can be locked."""
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def lock_folder(folder: Path) -> int | None:
        """A handle of ``folder``, locked until it is closed; None if another has it. Raises OSError as above."""
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(handle)
            if isinstance(error, BlockingIOError):
                return None
            raise
        return handle


def is_at(file: IO[bytes], path: Path) -> bool:
    """Whether ``path`` is still the open ``file``: another process may have removed the name before the lock."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except OSError:
        return False


@contextmanager
def held_alone(lock: Path, what: str) -> Iterator[None]:
    """Hold the lock file ``lock`` while the block runs; it is gone afterwards, and a killed process leaves none locked.

    Raises :class:`BusyError`, which names ``what`` and the process, if another run has it. Where no file can be made or
    locked the block runs without: what it then cannot write it says itself.
    """
    new_folders = [folder for folder in lock.parents if not folder.exists()]
    file = _acquire(lock, what)
    try:
        yield
    finally:
        if file is not None:
            # the name goes while the lock is held, so that nobody's lock is taken away; Windows removes no open file
            if os.name != "posix":
                file.close()
            with suppress(OSError):
                lock.unlink()
            file.close()
        for folder in new_folders:
            # only if nothing came to be in it
            with suppress(OSError):
                folder.rmdir()


def _acquire(lock: Path, what: str) -> IO[bytes] | None:
    while True:
        try:
            lock.parent.mkdir(parents=True, exist_ok=True)
            file = lock.open("a+b")
        except OSError:
            return None
        try:
            free = try_lock(file)
        except OSError:
            return file
        if not free:
            holder = _holder(file)
            file.close()
            raise BusyError(
                f"{what}: another mopeq-edge ({holder}) works there; wait until it ends or stop it, "
                "or choose another place"
            )
        if is_at(file, lock):
            with suppress(OSError):
                file.truncate(0)
                file.write(f"{os.getpid()}\n".encode())
                file.flush()
            return file
        file.close()


def _holder(file: IO[bytes]) -> str:
    with suppress(OSError, ValueError):
        file.seek(0)
        return f"pid {int(file.read(32))}"
    return "its pid is not known"
