"""Killed, or out of disk, at the writes of a vision file: a pair of files that belong together, or nothing to open."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from converters.vision import find_family, write_vision
from mopeq_edge.errors import OutputError
from mopeq_edge.source.checkpoint import Checkpoint
from tools.crash_points import FULL, KILL, Points, counted, in_child
from tools.vision_language_configs import TINY

from ..vision_language import VISION_LANGUAGE

pytestmark = pytest.mark.skipif(os.name != "posix", reason="forks")

Pair = tuple[bytes | None, bytes | None]


def test_at_every_rename_and_the_first_writes(tmp_path: Path) -> None:
    directory = VISION_LANGUAGE[TINY][0](tmp_path / "model", "float32")
    config = json.loads((directory / "config.json").read_text())
    family = find_family(config)
    assert family is not None
    folder = tmp_path / "out"
    out = folder / "out.vision.onnx"

    def write(mark: str = "b") -> None:
        options = {"kind": "F32", "made_from": mark * 64, "threads": 1}
        write_vision(Checkpoint(directory), family, directory, config, out, **options)

    def pair() -> Pair:
        beside = out.with_name(f"{out.name}.data")
        return tuple(p.read_bytes() if p.exists() else None for p in (out, beside))

    # in children only: a fork of a process in which onnxruntime has run may hang
    assert in_child(write) == 0
    new = pair()
    n_points = int(_reported(lambda: _count(write, folder), tmp_path))
    seen = set()
    for action in (KILL, FULL):
        for at in (1, n_points // 2, *range(n_points - 3, n_points + 1)):
            assert in_child(lambda: write("a")) == 0
            old = pair()
            code = in_child(lambda action=action, at=at: _disturbed(write, Points(folder, action, at)))
            left = pair()
            assert left in (old, new) or left[0] is None, (action, at)
            assert {path.name for path in folder.iterdir() if not path.name.startswith(".")} <= {
                out.name,
                f"{out.name}.data",
            }
            if action == FULL:
                assert code in (0, 1)
                assert not list(folder.glob(".*")), at
            seen.add("old" if left == old else "new" if left == new else "none")
            assert in_child(write) == 0
            assert pair() == new
            assert not list(folder.glob(".*")), (action, at)
    assert seen == {"old", "new", "none"}


def _disturbed(write: object, points: Points) -> None:
    with counted(points):
        try:
            write()
        except OutputError:
            raise SystemExit(1) from None


def _count(write: object, folder: Path) -> str:
    with counted(Points(folder)) as points:
        write()
    return str(points.count)


def _reported(work: object, folder: Path) -> str:
    path = folder / "report"
    assert in_child(lambda: path.write_text(work())) == 0
    return path.read_text()
