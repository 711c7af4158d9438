"""A hard limit on the memory of a process, file cache included: a control group of Linux, which root can make."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")


@contextmanager
def memory_group(nbytes: int) -> Iterator[Path | None]:
    """The file to which a process writes its number to be held to ``nbytes``; None where no group can be made.

    The kernel drops pages of files first, and kills a process that allocates more.
    """
    first = (ROOT / "memory").is_dir()
    group = (ROOT / "memory" if first else ROOT) / f"mopeq-edge-{os.getpid()}"
    try:
        group.mkdir()
        (group / ("memory.limit_in_bytes" if first else "memory.max")).write_text(str(nbytes))
    except OSError:
        with suppress(OSError):
            group.rmdir()
        yield None
        return
    try:
        yield group / "cgroup.procs"
    finally:
        group.rmdir()
