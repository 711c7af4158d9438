"""Files that are either whole or not there: write beside the target, fsync, rename.

A temporary file, ``.NAME.PID.tmp``, is locked as long as its process works on it. One that nobody has locked is what a
killed process left, and the next that writes NAME removes it.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import IO, BinaryIO

from mopeq_edge.errors import OutputError
from mopeq_edge.file_lock import is_at, try_lock


@contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """Open a temporary file in ``path``'s folder; on success it becomes ``path``, on error it goes away.

    Raises :class:`OutputError` when the file system refuses (full, read-only, size limit).
    """
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        yield file


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """The same for code that wants a path: yields an empty file in ``path``'s folder, to be written in place."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(path.parent, re.escape(path.name))
        temporary, lock = _new_temporary(path)
        with lock:
            try:
                yield temporary
                os.fsync(lock.fileno())
                _let_go(lock)
                os.replace(temporary, path)
            except BaseException:
                _let_go(lock)
                with suppress(OSError):
                    temporary.unlink()
                raise
        _sync_directory(path.parent)
    except OSError as error:
        if error.filename is None or _concerns(Path(error.filename), path):
            raise OutputError(
                f"{path}: cannot be written ({error.strerror or error}); nothing was left under that name; "
                "free space or choose another place"
            ) from error
        raise


@contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """Yields an empty directory beside ``path``, which must not exist; on success it becomes ``path``, else it goes."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
        try:
            yield temporary
            os.rename(temporary, path)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        _sync_directory(path.parent)
    except OSError as error:
        if error.filename is None or _concerns(Path(error.filename), path):
            raise OutputError(f"{path}: cannot be written ({error.strerror or error}); choose another place") from error
        raise


def _concerns(found: Path, path: Path) -> bool:
    """Whether an error of ``found`` is one of writing ``path``: itself, its temporary file or its folder."""
    return found in (path, path.parent) or (found.parent == path.parent and found.name.startswith(f".{path.name}."))


def _let_go(lock: IO[bytes]) -> None:
    """Windows renames and removes no open file; elsewhere the lock is held until the name is gone."""
    if os.name != "posix":
        lock.close()


def remove_leftovers(folder: Path, name: str) -> None:
    """Remove temporary files of names like the pattern ``name`` in ``folder`` that no process holds."""
    pattern = re.compile(rf"\.(?:{name})\.\d+(?:-\d+)?\.tmp")
    for found in [entry for entry in os.listdir(folder) if pattern.fullmatch(entry)]:
        # not ours to read, gone meanwhile, or on a file system without locks: then it stays
        with suppress(OSError), (folder / found).open("r+b") as file:
            if try_lock(file):
                (folder / found).unlink()


def _new_temporary(path: Path) -> tuple[Path, IO[bytes]]:
    """A new empty file beside ``path``, locked until it is closed."""
    for number in count():
        suffix = f"-{number}" if number else ""
        temporary = path.with_name(f".{path.name}.{os.getpid()}{suffix}.tmp")
        try:
            file = temporary.open("xb")
        except FileExistsError:
            continue
        # between the two calls another process may take it for a leftover
        with suppress(OSError):
            try_lock(file)
        if is_at(file, temporary):
            return temporary, file
        file.close()
    raise AssertionError("count() does not end")


def _sync_directory(folder: Path) -> None:
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def check_output(path: Path, inputs: Iterable[Path], *, force: bool) -> None:
    """Refuse to write ``path`` over an input (also through a link), over anything without ``force``, or nowhere."""
    if path.is_dir():
        raise OutputError(f"{path}: is a directory; give the name of the file to write")
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise OutputError(f"{path}: {folder} is no directory that can be written to; choose another place")
    for source in inputs:
        if path.exists() and source.exists() and os.path.samefile(path, source):
            raise OutputError(f"{path}: is the input {source} (the same file); choose another name for the output")
    if path.exists() and not force:
        raise OutputError(f"{path}: exists already; choose another name or give --force to replace it")


def free_bytes(folder: Path) -> int:
    """Free space where ``folder`` is or will be."""
    there = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    return shutil.disk_usage(there).free
