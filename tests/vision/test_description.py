"""The metadata of a vision file: a round trip, and one line for whatever is wrong with it or with the file beside
it.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mopeq_edge.errors import FormatError
from mopeq_edge.vision.description import (
    CROPS,
    KEY,
    TILES,
    Crops,
    Description,
    Prompt,
    Tiles,
    read_description,
    weights_file,
)
from mopeq_edge.vision.session import VisionSession
from tools.fuzz import seeds

TILED = Description(
    kind=TILES,
    n_embd=8,
    layout=Tiles(44, 2, ((44, 44), (88, 44)), 2, True, (0.5, 0.5, 0.5), (0.5, 0.25, 1.0)),
    prompt=Prompt("<|User|>: ", "\n\n<|Assistant|>:", "<image>", "<image>\n"),
    weights_type="F16",
    weights_bytes=100,
    relative_error=0.0003,
    made_from="a" * 64,
)
CROPPED = replace(
    TILED,
    kind=CROPS,
    layout=Crops(24, 2, 12, (4, 4), (0.1, 0.2, 0.3), (0.5, 0.5, 0.5)),
    prompt=Prompt("a", "b", "", ""),
)

GOLDEN = (
    '{"format": "mopeq-edge vision", "kind": "tiles", "layout": {"candidates": [[44, 44], [88, 44]], '
    '"mean": [0.5, 0.5, 0.5], "most_tiled": 2, "rows": 2, "side": 44, "std": [0.5, 0.25, 1.0], "whole_first": true}, '
    f'"made_from": "{"a" * 64}", "n_embd": 8, "prompt": {{"after": "\\n\\n<|Assistant|>:", "before": "<|User|>: ", '
    '"mark": "<image>", "own": "<image>\\n"}, "relative_error": 0.0003, "version": 1, "weights_bytes": 100, '
    '"weights_type": "F16"}'
)


def test_version_one_to_the_letter() -> None:
    assert TILED.text() == GOLDEN


@pytest.mark.parametrize("described", [TILED, CROPPED])
def test_what_is_written_is_read(described: Description) -> None:
    assert read_description(described.text(), "x") == described


BROKEN: list[tuple[tuple[str, ...], Any, str]] = [
    (("version",), 2, "has version 2, expected 1; use the mopeq-edge that wrote it"),
    (("format",), "x", "is no 'mopeq-edge vision'"),
    (("kind",), "stripes", 'has kind "stripes"; convert the checkpoint again'),
    (("n_embd",), 0, "has n_embd 0; convert"),
    (("n_embd",), True, "has n_embd true; convert"),
    (("layout",), [], r"has layout \[\]"),
    (("layout", "side"), "44", r'has layout.side "44"'),
    (("layout", "candidates"), [], r"has layout.candidates \[\]"),
    (("layout", "candidates"), [[44, 45]], r"has layout.candidates \[\[44, 45\]\]"),
    (("layout", "std"), [0.5, 0, 0.5], r"has layout.std \[0.5, 0, 0.5\]"),
    (("layout", "mean"), [0.5], r"has layout.mean \[0.5\]"),
    (("prompt", "mark"), None, "has prompt.mark null"),
    (("weights_type",), "Q4_K", 'has weights_type "Q4_K"'),
    (("relative_error",), "small", 'has relative_error "small"'),
    (("relative_error",), -0.5, "has relative_error -0.5"),
    (("relative_error",), 10**400, "has relative_error 1000"),
    (("weights_bytes",), 63, "has weights_bytes 63"),
    (("made_from",), "A" * 64, 'has made_from "AAA'),
    (("made_from",), "a", 'has made_from "a"'),
    (("n_embd",), 2**16 + 1, "has n_embd 65537"),
    (("layout", "side"), 2**12 + 1, "has layout.side 4097"),
    (("layout", "most_tiled"), -1, "has layout.most_tiled -1"),
    (("layout", "candidates"), [[44, 44]] * 1025, "has layout.candidates "),
    (("layout", "candidates"), [[44 * 8, 44 * 8]], "makes 65 pictures of 44 × 44 pixels of one, at most 64"),
    (("layout", "std"), [0.5, 1e-9, 0.5], r"has layout.std \[0.5, 1e-09, 0.5\]"),
    (("layout", "mean"), [1e4, 0, 0], "has layout.mean"),
    (("prompt", "before"), "x" * (2**16 + 1), 'has prompt.before "xxx'),
    (("prompt", "own"), "\ud800", "has prompt.own"),
]


@pytest.mark.parametrize(("path", "value", "message"), BROKEN)
def test_what_is_broken_is_named(path: tuple[str, ...], value: Any, message: str) -> None:
    found = json.loads(TILED.text())
    inner = found
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    with pytest.raises(FormatError, match=f"^out.vision.onnx: '{KEY}' {message}") as caught:
        read_description(json.dumps(found), "out.vision.onnx")
    assert "\n" not in str(caught.value)


def test_crops_of_parts_of_patches() -> None:
    """Found by fuzzing: cropping then cut a window into patches that do not fill it."""
    found = json.loads(CROPPED.text())
    found["layout"]["side"] += 1
    with pytest.raises(FormatError, match=r"^x: 'mopeq.vision' has layout\.patch"):
        read_description(json.dumps(found), "x")


def test_crops_without_end() -> None:
    found = json.loads(CROPPED.text())
    found["layout"]["most"] = 64
    with pytest.raises(FormatError, match="makes 65 pictures"):
        read_description(json.dumps(found), "x")
    found["layout"]["most"] = 2**40
    with pytest.raises(FormatError, match=r"has layout\.most 1099511627776"):
        read_description(json.dumps(found), "x")
    found["layout"].update(most=63, side=4096)
    with pytest.raises(FormatError, match="makes 64 pictures of 4096 × 4096 pixels of one, at most 64 with"):
        read_description(json.dumps(found), "x")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "has no 'mopeq.vision'"),
        ("{", "is not JSON"),
        ('{"a": 1, "a": 1}', "is not JSON"),
        ("[" * 10**6, "is not JSON"),
        ("[]", "is no 'mopeq-edge vision'"),
    ],
)
def test_no_description(text: str | None, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        read_description(text, "x")


def test_files_that_do_not_belong_together(tmp_path: Path) -> None:
    path = seeds.write_vision_files(tmp_path / "out.vision.onnx")
    beside = weights_file(path)
    assert VisionSession(path, 1).describe() == seeds.vision_description()
    whole = beside.read_bytes()
    beside.write_bytes(whole[:-1])
    with pytest.raises(
        FormatError, match=f"^{beside}: has 4543 bytes, expected 4544; copy it and out.vision.onnx again$"
    ):
        VisionSession(path, 1).describe()
    beside.write_bytes(whole[:-1] + b"b")
    with pytest.raises(FormatError, match=f"^{beside}: belongs to another out.vision.onnx; copy both files again$"):
        VisionSession(path, 1).describe()
    beside.unlink()
    with pytest.raises(FormatError, match=r"its weights, out.vision.onnx.data, are not beside it; move or copy both"):
        VisionSession(path, 1)
    path.write_bytes(b"nothing")
    beside.write_bytes(whole)
    with pytest.raises(FormatError, match=f"^{path}: is no ONNX file; copy it again, or convert the checkpoint again"):
        VisionSession(path, 1)
    path.unlink()
    with pytest.raises(FormatError, match="does not exist; expected the vision file that mopeq-edge convert wrote"):
        VisionSession(path, 1)
