"""Odd pictures through the commands that take them, ``run --image``, ``calibrate --images`` and ``serve``: what comes
out is what the plain picture gives, red, green, blue and upright in a PNG, or one line refuses.
"""

from __future__ import annotations

import base64
import io
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from mopeq_edge.cli import cli, main
from mopeq_edge.pipeline_context import open_context
from mopeq_edge.pipeline_pictures import PicturesRequest, open_eyes, see_pictures
from mopeq_edge.progress import SilentProgress
from mopeq_edge.serving.app import Limits
from mopeq_edge.serving.engine import Files
from mopeq_edge.vision.answer import Question, see
from tools.vision_language_configs import TINY

from ..builders import EXAMPLE_TEXT
from ..serving.server import Served, serving
from .pictures import picture
from .test_device_path import make
from .test_image_file import png_16, png_of, turned

pytestmark = pytest.mark.runtime

Colours = np.ndarray[Any, Any]
Made = tuple[bytes, Colours]
"""A file, and what a person sees of it: [height, width, 3]."""

QUESTION = "What is this?"
CHAT = "/v1/chat/completions"
SEEN = picture(130, 50, seed=3)
OTHER = picture(130, 50, seed=4)


def saved(image: Image.Image, ending: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, ending, **options)
    return file.getvalue()


def turned_png(orientation: int) -> Made:
    return turned(SEEN, orientation, "PNG"), np.asarray(SEEN)


def turned_jpeg() -> Made:
    """On its right side, as a phone stores it; what JPEG makes of it, turned back by hand."""
    lying = Image.fromarray(np.ascontiguousarray(np.rot90(np.asarray(SEEN), 1)))
    with Image.open(io.BytesIO(saved(lying, "JPEG"))) as stored:
        return turned(SEEN, 6, "JPEG"), np.rot90(np.asarray(stored), -1)


def cmyk(**options: Any) -> Made:
    """Ink as Adobe's programs store it, upside down; each colour is what its ink and black leave of the light."""
    ink = np.asarray(SEEN.convert("CMYK")).copy()
    ink[..., 3] = np.asarray(OTHER.convert("L")) // 4
    content = saved(Image.fromarray(ink, "CMYK"), "JPEG", quality=100, subsampling=0, **options)
    assert b"Adobe" in content
    with Image.open(io.BytesIO(content)) as stored:
        assert stored.mode == "CMYK"
        light = 255 - np.asarray(stored).astype(np.float64)
        assert np.abs(light - (255.0 - ink)).mean() < 2
        seen = np.asarray(stored.convert("RGB"))
    assert np.abs(light[..., :3] * light[..., 3:] / 255 - seen).max() <= 1
    return content, seen


def palette() -> Made:
    """Four colours, one of which is transparent."""
    index = np.asarray(SEEN.convert("L")) // 64
    colours = np.array([[255, 0, 0], [0, 128, 0], [9, 9, 9], [0, 0, 200]], np.uint8)
    image = Image.fromarray(index)
    image.putpalette(colours.tobytes())
    colours[2] = 255
    return saved(image, "PNG", transparency=2), colours[index]


def transparent() -> Made:
    """The left half as it is, the right half of nothing but another picture's colours: white."""
    values = np.concatenate([np.asarray(SEEN), np.full((50, 130, 1), 255, np.uint8)], axis=2)
    values[:, 65:, :3] = np.asarray(OTHER)[:, 65:]
    values[:, 65:, 3] = 0
    seen = np.asarray(SEEN).copy()
    seen[:, 65:] = 255
    return saved(Image.fromarray(values), "PNG"), seen


def grey(mode: str) -> Made:
    values = np.asarray(SEEN.convert("L"))
    image = Image.fromarray(values)
    if mode == "1":
        image = Image.fromarray(values > 128)
        values = np.where(values > 128, 255, 0).astype(np.uint8)
    content = png_16(values.astype(np.uint16) * 257) if mode == "I;16" else saved(image, "PNG")
    with Image.open(io.BytesIO(content)) as stored:
        assert stored.mode == mode
    return content, np.repeat(values[..., None], 3, axis=2)


def animated(ending: str, **options: Any) -> Made:
    frames = [SEEN.quantize(250), OTHER.quantize(250)] if ending == "GIF" else [SEEN, OTHER]
    content = saved(frames[0], ending, save_all=True, append_images=frames[1:], duration=50, loop=0, **options)
    with Image.open(io.BytesIO(content)) as stored:
        assert stored.n_frames == 2
    return content, np.asarray(frames[0].convert("RGB"))


def thin(width: int, height: int) -> Made:
    image = picture(width, height)
    return saved(image, "BMP"), np.asarray(image)


ODD: Mapping[str, Callable[[], Made]] = {
    **{f"turned-{orientation}.png": lambda o=orientation: turned_png(o) for orientation in range(1, 9)},
    "turned.jpg": turned_jpeg,
    "cmyk.jpg": cmyk,
    "cmyk-profile.jpg": lambda: cmyk(icc_profile=b"of a press" * 20),
    "16-bit.png": lambda: (png_16(np.asarray(SEEN).astype(np.uint16) * 257), np.asarray(SEEN)),
    "grey.png": lambda: grey("L"),
    "grey-16-bit.png": lambda: grey("I;16"),
    "black-and-white.png": lambda: grey("1"),
    "palette.png": palette,
    "transparent.png": transparent,
    "moves.gif": lambda: animated("GIF"),
    "moves.png": lambda: animated("PNG"),
    "moves.webp": lambda: animated("WEBP", lossless=True),
    "row.bmp": lambda: thin(40, 1),
    "column.bmp": lambda: thin(1, 40),
}

NO_PICTURE = "not a picture in one of the formats BMP, GIF, JPEG, PNG, PPM, TIFF, WEBP; convert it to one of them"
DAMAGED = "; the picture is damaged, get it again"
REFUSED: Mapping[str, tuple[bytes, str]] = {
    "cut.jpg": (saved(SEEN, "JPEG")[:900], DAMAGED),
    "cut.png": (saved(SEEN, "PNG")[:-200], DAMAGED),
    "cut.gif": (saved(SEEN, "GIF")[:2000], DAMAGED),
    "cut.tiff": (saved(SEEN, "TIFF")[:-500], DAMAGED),
    "cut.webp": (saved(SEEN, "WEBP")[:900], DAMAGED),
    "bits.png": (saved(SEEN, "PNG")[:60] + b"\xff" * 40 + saved(SEEN, "PNG")[100:], DAMAGED),
    "text.jpg": (b"no picture", NO_PICTURE),
    "drawing.png": (b'<svg xmlns="http://www.w3.org/2000/svg"/>', f"is SVG, {NO_PICTURE}"),
    "empty.webp": (b"", "is empty, expected a picture in one of the formats"),
    "bomb.png": (png_of(60000, 60000), "pixels, expected at most"),
    "thin.png": (saved(Image.new("RGB", (9000, 2)), "PNG"), "is 9000 × 2 pixels, too thin to be seen; cut out a part"),
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    return make(TINY, tmp_path_factory.mktemp("vl2"))


@pytest.fixture(scope="module")
def server(tiny: tuple[Path, Path, Path]) -> Iterator[Served]:
    with serving(Files(tiny[1], tiny[2], n_ctx=512), Limits()) as found:
        yield found


def files_of(name: str, folder: Path) -> tuple[Path, Path]:
    """The odd one, and the plain one that looks the same."""
    content, seen = ODD[name]()
    plain, odd = folder / "plain.png", folder / name
    Image.fromarray(np.ascontiguousarray(seen)).save(plain)
    odd.write_bytes(content)
    assert plain.read_bytes() != content
    return odd, plain


def ask(gguf: Path, image: Path) -> str:
    done = CliRunner().invoke(cli, ["run", str(gguf), "--image", str(image), "-p", QUESTION, "-n", "8", "-t", "1"])
    assert done.exit_code == 0, done.exception
    return done.stdout


def in_chat(content: bytes, url: str = "data:image/png;base64,{}") -> dict[str, Any]:
    address = url.format(base64.b64encode(content).decode())
    parts = [{"type": "image_url", "image_url": {"url": address}}, {"type": "text", "text": QUESTION}]
    return {"messages": [{"role": "user", "content": parts}], "temperature": 0, "max_tokens": 8}


@pytest.mark.parametrize("name", ODD)
def test_it_is_seen_as_a_person_sees_it(
    name: str, tiny: tuple[Path, Path, Path], server: Served, tmp_path: Path
) -> None:
    _, gguf, vision = tiny
    odd, plain = files_of(name, tmp_path)
    found, expected = (see(Question(gguf, vision, (path,), QUESTION))[1][0] for path in (odd, plain))
    np.testing.assert_array_equal(found, expected)
    said = ask(gguf, plain)
    assert ask(gguf, odd) == said
    status, answer = server.post(CHAT, **in_chat(odd.read_bytes()))
    assert status == 200
    assert answer["choices"][0]["message"]["content"] == said.strip()


def test_answers_depend_on_the_picture(tiny: tuple[Path, Path, Path], tmp_path: Path) -> None:
    """Without this the test above would say little."""
    said = []
    for i, image in enumerate((SEEN, OTHER, SEEN.transpose(Image.Transpose.ROTATE_180), Image.new("RGB", (130, 50)))):
        image.save(tmp_path / f"{i}.png")
        said.append(ask(tiny[1], tmp_path / f"{i}.png"))
    assert len(set(said)) > 1


def test_calibration_sees_the_same(tiny: tuple[Path, Path, Path], tmp_path: Path) -> None:
    kept: dict[str, list[Any]] = {"odd": [], "plain": []}
    for kind in kept:
        (tmp_path / kind).mkdir()
    for name in ODD:
        odd, plain = files_of(name, tmp_path)
        odd.rename(tmp_path / "odd" / name)
        plain.rename(tmp_path / "plain" / f"{name}.png")
    for kind, found in kept.items():
        context = open_context(tiny[0], tmp_path / f"{kind}.work", pre="gpt-2", threads=1, progress=SilentProgress())
        eyes = open_eyes(context, PicturesRequest(tmp_path / kind))
        assert len(eyes.pictures) == len(ODD)
        found += [window.embeddings() for window in see_pictures(context, eyes, 64) if window.embeddings is not None]
    assert len(kept["odd"]) == len(ODD)
    for found, expected in zip(kept["odd"], kept["plain"], strict=True):
        np.testing.assert_array_equal(found, expected)


def fails_in_one_line(
    path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *args: object
) -> str:
    """What follows the name of ``path`` in it."""
    monkeypatch.setattr(sys, "argv", ["mopeq-edge", *map(str, args)])
    with pytest.raises(SystemExit) as ended:
        main()
    shown = capsys.readouterr()
    assert ended.value.code == 1
    assert shown.out == ""
    *notes, line = shown.err.splitlines()
    assert all(note.startswith("note: ") for note in notes)
    assert line.startswith(f"mopeq-edge: error: {path}: ")
    return line.removeprefix(f"mopeq-edge: error: {path}: ")


@pytest.mark.parametrize("name", REFUSED)
def test_it_is_refused_in_one_line(
    name: str,
    tiny: tuple[Path, Path, Path],
    server: Served,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    content, message = REFUSED[name]
    folder = tmp_path / "photos"
    folder.mkdir()
    path = folder / name
    path.write_bytes(content)
    model, gguf, _ = tiny
    assert message in fails_in_one_line(path, monkeypatch, capsys, "run", gguf, "--image", path, "-p", QUESTION)
    work = ("--text", EXAMPLE_TEXT, "--chunks", 2, "--window", 64, "--threads", 1, "--work-dir", tmp_path / "work")
    assert message in fails_in_one_line(path, monkeypatch, capsys, "calibrate", model, "--images", folder, *work)
    assert [file.name for file in folder.iterdir()] == [name]
    status, answer = server.post(CHAT, **in_chat(content))
    assert status == 400
    assert message in answer["error"]["message"]
    assert answer["error"]["message"].startswith("messages[0].content[0].image_url: ")
    assert answer["error"]["param"] == "messages[0].content[0].image_url"


def test_what_is_no_file(
    tiny: tuple[Path, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    cases = {
        tmp_path: "is a directory",
        tmp_path / "pipe.png": "is no regular file",
        tmp_path / "none.png": "does not exist",
        Path("http://localhost:1/a.png"): "is no file, and nothing is fetched from addresses",
    }
    for path, message in cases.items():
        said = fails_in_one_line(path, monkeypatch, capsys, "run", tiny[1], "--image", path, "-p", QUESTION)
        assert said == f"{message}; give the file of a picture"


@pytest.mark.parametrize("url", ["http://localhost:1/a.png", "https://e.org/a.png", "file:///etc/passwd", "a.png", ""])
def test_the_server_fetches_nothing(url: str, server: Served) -> None:
    status, answer = server.post(CHAT, **in_chat(b"", url))
    assert status == 400
    assert "this server fetches nothing, send the picture itself as data:image/" in answer["error"]["message"]
