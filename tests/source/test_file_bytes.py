"""Reading a stretch of a file: what is read, and what the kernel is told of the next one."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from mopeq_edge.errors import FormatError
from mopeq_edge.source import file_bytes
from mopeq_edge.source.file_bytes import read_bytes


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="this system has no posix_fadvise")
def test_large_pieces_in_order_are_asked_for_before_they_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "posix_fadvise", lambda fd, start, n, advice: asked.append((start, n)))
    monkeypatch.setattr(file_bytes, "AHEAD", 64)
    path, content = tmp_path / "file", np.random.default_rng(0).bytes(300)
    path.write_bytes(content)
    got = b"".join(read_bytes(path, start, 100).tobytes() for start in (0, 100, 200))
    assert got == content
    assert asked == [(100, 100), (200, 100), (300, 100)]
    # some rows of a matrix say nothing of what comes
    read_bytes(path, 0, 63)
    assert len(asked) == 3


def test_a_file_that_ends_too_early_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x" * 10)
    with pytest.raises(FormatError, match="file: ends at byte 10, expected at least 14"):
        read_bytes(tmp_path / "file", 4, 10)
