"""Files that are either whole or not there: write beside the target, fsync, rename.

A temporary file or folder, ``.NAME.PID.tmp``, is locked as long as its process works on it. One that nobody has locked
is what a killed process left, and the next that writes NAME removes it.
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
from mopeq_edge.file_lock import is_at, lock_folder, try_lock


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
    with scratch_directory(path) as temporary:
        yield temporary
        os.rename(temporary, path)


@contextmanager
def scratch_directory(path: Path) -> Iterator[Path]:
    """Yields an empty directory beside ``path``, which goes away: for what is to be moved from there when it is whole.

    Raises :class:`OutputError` as :func:`atomic_write`.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(path.parent, re.escape(path.name))
        temporary.mkdir()
        with _held(temporary):
            try:
                yield temporary
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
        _sync_directory(path.parent)
    except OSError as error:
        if error.filename is None or _concerns(Path(error.filename), path):
            raise OutputError(
                f"{path}: cannot be written ({error.strerror or error}); nothing was left under that name; "
                "free space or choose another place"
            ) from error
        raise


@contextmanager
def _held(folder: Path) -> Iterator[None]:
    """Locks ``folder`` where folders can be locked."""
    handle = None
    with suppress(OSError):
        handle = lock_folder(folder)
    try:
        yield
    finally:
        if handle is not None:
            os.close(handle)


def _concerns(found: Path, path: Path) -> bool:
    """Whether an error of ``found`` is one of writing ``path``: itself, its folder, or what it is written in before."""
    return found in (path, path.parent) or any(
        place.parent == path.parent and place.name.startswith(f".{path.name}.") for place in (found, *found.parents)
    )


def _let_go(lock: IO[bytes]) -> None:
    """Windows renames and removes no open file; elsewhere the lock is held until the name is gone."""
    if os.name != "posix":
        lock.close()


def remove_leftovers(folder: Path, name: str) -> None:
    """Remove temporary files and folders of names like the pattern ``name`` in ``folder`` that no process holds."""
    pattern = re.compile(rf"\.(?:{name})\.\d+(?:-\d+)?\.tmp")
    for found in [folder / entry for entry in os.listdir(folder) if pattern.fullmatch(entry)]:
        # not ours to read, gone meanwhile, or on a file system without locks: then it stays
        with suppress(OSError):
            if found.is_dir() and not found.is_symlink():
                _remove_folder(found)
                continue
            with found.open("r+b") as file:
                if try_lock(file):
                    found.unlink()


def _remove_folder(folder: Path) -> None:
    handle = lock_folder(folder)
    if handle is not None:
        try:
            shutil.rmtree(folder, ignore_errors=True)
        finally:
            os.close(handle)


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
