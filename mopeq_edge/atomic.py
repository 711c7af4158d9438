"""Files that are either whole or not there: write beside the target, fsync, rename."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from mopeq_edge.errors import OutputError


@contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """Open a temporary file in ``path``'s folder; on success it becomes ``path``, on error it goes away.

    Raises :class:`OutputError` when the file system refuses (full, read-only, size limit).
    """
    with atomic_path(path) as temporary, temporary.open("xb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """The same for code that wants a path: yields a free name in ``path``'s folder."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        os.replace(temporary, path)
        _sync_directory(path.parent)
    except OSError as error:
        if error.filename is None or Path(error.filename) in (temporary, path, path.parent):
            raise OutputError(
                f"{path}: cannot be written ({error.strerror or error}); nothing was left under that name; "
                "free space or choose another place"
            ) from error
        raise
    finally:
        with suppress(OSError):
            temporary.unlink()


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
