"""Files that end: what a stranger's folder calls a file may be a pipe, which never does."""

from __future__ import annotations

import errno
import stat
from pathlib import Path

from mopeq_edge.errors import FormatError


def regular_size(path: Path) -> int:
    """Bytes of the file ``path``, links followed. Raises :class:`OSError` for what is no regular file.

    Opening a pipe waits for somebody to write, and a device has no size to check a count against.
    """
    found = path.stat()
    if stat.S_ISDIR(found.st_mode):
        raise OSError(errno.EISDIR, "it is a directory")
    if not stat.S_ISREG(found.st_mode):
        raise OSError(errno.EINVAL, "it is no regular file")
    return found.st_size


def read_whole(path: Path, most: int) -> bytes:
    """All bytes of ``path``. Raises :class:`OSError` as :func:`regular_size`, :class:`FormatError` for more than
    ``most`` bytes."""
    size = regular_size(path)
    if size > most:
        raise FormatError(f"{path}: has {size} bytes, expected at most {most}; download it again")
    with path.open("rb") as file:
        # not ``most``: Python allocates what it is asked for first
        return file.read(size)
