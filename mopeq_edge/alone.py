"""One run at a time in a work directory, and one for each output."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from mopeq_edge.atomic import remove_leftovers
from mopeq_edge.file_lock import held_alone
from mopeq_edge.vision.description import ENDING


@contextmanager
def alone(work: Path, output: Path | None = None) -> Iterator[None]:
    """Keep other runs out of ``work``, and off ``output``, while the block runs; remove what killed ones left there.

    Commands that only read need none of it: files change under their names as a whole. Raises
    :class:`~mopeq_edge.errors.BusyError` where another run is at work.
    """
    with ExitStack() as stack:
        stack.enter_context(held_alone(work / ".lock", str(work)))
        _clean(work, ".*")
        if output is not None:
            stack.enter_context(held_alone(output.with_name(f".{output.name}.lock"), str(output)))
            stem = re.escape(output.name.removesuffix(".gguf"))
            _clean(output.parent, rf"{stem}(?:-\d{{5}}-of-\d{{5}})?(?:\.gguf|{re.escape(ENDING)})?")
        yield


def _clean(folder: Path, name: str) -> None:
    if folder.is_dir():
        remove_leftovers(folder, name)
