"""Read a stretch of a file, whole or not at all."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

from mopeq_edge.errors import FormatError
from mopeq_edge.regular_file import regular_size
from mopeq_edge.source.remote import RemoteFile

File = Path | RemoteFile
"""Where weights are."""


def read_bytes(path: File, offset: int, count: int) -> npt.NDArray[np.uint8]:
    """``count`` bytes of ``path`` from ``offset``. Safe from several threads at once.

    Reads, does not map: a mapped file that shrinks kills the process, and mapped pages count as its memory.
    Raises :class:`FormatError` if the file cannot be read or ends too early.
    """
    if isinstance(path, RemoteFile):
        return path.read(offset, count)
    out = np.empty(count, dtype=np.uint8)
    view = out.data
    done = 0
    try:
        with path.open("rb", buffering=0) as file:
            file.seek(offset)
            while done < count:
                got = file.readinto(view[done:])
                if not got:
                    raise FormatError(
                        f"{path}: ends at byte {offset + done}, expected at least {offset + count}; "
                        "it changed while it was read, try again"
                    )
                done += got
    except OSError as error:
        raise FormatError(f"{path}: cannot be read ({error.strerror})") from None
    return out


def file_size(path: File) -> int:
    """Bytes of ``path``. Raises :class:`OSError` for what is no regular file."""
    return path.size if isinstance(path, RemoteFile) else regular_size(path)
