"""One installer at a time."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from mopeq_edge.file_lock import try_lock

_POLL_SECONDS = 0.5


@contextmanager
def exclusive_lock(path: Path, on_wait: Callable[[], None]) -> Iterator[None]:
    """Hold the lock file ``path``; ``on_wait`` is called once if another holder must end first.

    The lock ends with the block or with the process, so a crash leaves nothing locked. The file
    stays. Raises OSError if it cannot be opened or locked.
    """
    with path.open("ab") as file:
        if not try_lock(file):
            on_wait()
            while not try_lock(file):
                time.sleep(_POLL_SECONDS)
        yield
