"""Killed, or out of disk, at every single write of the writer: whole files or none, and a second run makes them."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from mopeq_edge.alone import alone
from mopeq_edge.errors import OutputError
from mopeq_edge.progress import SilentProgress
from mopeq_edge.verify import verify
from tools.crash_points import ACTIONS, FULL, Points, counted, in_child

from .test_verify import GROUPED, STOCK, write

pytestmark = pytest.mark.skipif(os.name != "posix", reason="forks")


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.mark.parametrize(
    ("types", "split_bytes", "old"),
    [(STOCK, None, False), (GROUPED, None, True), (STOCK, 1300, True)],
    ids=["stock", "per-expert over an old file", "split over old files"],
)
@pytest.mark.parametrize("action", ACTIONS)
def test_emit_at_every_write(tmp_path: Path, types: object, split_bytes: int | None, old: bool, action: str) -> None:
    folder = tmp_path / "out"

    def emit_alone() -> None:
        with alone(folder / "work", folder / "out.gguf"):
            write(folder / "out.gguf", types, split_bytes)  # type: ignore[arg-type]

    def reset() -> dict[str, bytes]:
        if folder.exists():
            for path in sorted(folder.rglob("*"), reverse=True):
                path.rmdir() if path.is_dir() else path.unlink()
        else:
            folder.mkdir()
        if old:
            for name in final:
                (folder / name).write_bytes(b"old")
        return content(folder)

    final: dict[str, bytes] = {}
    reset()
    emit_alone()
    final = content(folder)
    assert all(name.endswith(".gguf") for name in final)
    points = _count(emit_alone, folder)
    assert points > 5
    for at in range(1, points + 1):
        before = reset()

        def disturbed(at: int = at) -> None:
            with counted(Points(folder, action, at)):
                try:
                    emit_alone()
                except OutputError:
                    raise SystemExit(1) from None

        code = in_child(disturbed)
        after = content(folder)
        assert code == (1 if action == FULL else -9) or after == final, at
        for name, raw in after.items():
            if not name.startswith("."):
                assert raw in (before.get(name), final[name]), (at, name)
        if action == FULL and after != final:
            # all that is there is the old: no temporary file stays on the full disk
            assert after.items() <= before.items(), at
        first = min(final)
        if split_bytes is not None and after.get(first) == final[first]:
            # the first part, which a reader opens, comes last
            assert {n: raw for n, raw in after.items() if n in final} == final, at
        if split_bytes is not None and after.get(first) == before.get(first, b""):
            # and an old one goes before a part beside it is new
            assert {n: raw for n, raw in after.items() if n in final} == before, at
        emit_alone()
        assert content(folder) == final, at
        assert verify(folder / first, SilentProgress()).whole


def _count(work: Callable[[], None], folder: Path) -> int:
    with counted(Points(folder)) as points:
        work()
    return points.count
