"""Files of pictures: every kind comes out as a person sees it, or is refused in one line."""

from __future__ import annotations

import io
import os
import struct
import tempfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mopeq_edge.errors import FormatError
from mopeq_edge.vision import image_file
from mopeq_edge.vision.image_file import open_image

from .pictures import picture


def colours(path: Path) -> np.ndarray[Any, Any]:
    image = open_image(path)
    assert image.mode == "RGB"
    return np.asarray(image)


def quarters(mode: str, *values: Any) -> Image.Image:
    """8 × 4 pixels: the left half of one value, the right half of another."""
    image = Image.new(mode, (8, 4), values[0])
    image.paste(values[1], (4, 0, 8, 4))
    return image


EXACT, LOSSLESS = {"quality": 100, "subsampling": 0}, {"lossless": True}
UNDO: Mapping[int, Callable[[Any], Any]] = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, 1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: np.rot90(a, -1),
}
"""What is stored of a picture, by its EXIF's orientation."""


def turned(image: Image.Image, orientation: int, ending: str, **options: Any) -> bytes:
    """The file of a camera that was held so."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.fromarray(np.ascontiguousarray(UNDO[orientation](np.asarray(image))))
    file = io.BytesIO()
    stored.save(file, ending, exif=exif, **options)
    return file.getvalue()


@pytest.mark.parametrize(("ending", "options"), [("PNG", {}), ("TIFF", {}), ("WEBP", LOSSLESS), ("JPEG", EXACT)])
@pytest.mark.parametrize("orientation", UNDO)
def test_exif_says_how_it_is_turned(orientation: int, ending: str, options: dict[str, Any], tmp_path: Path) -> None:
    """Each orientation, undone by hand on the array."""
    path = tmp_path / f"x.{ending.lower()}"
    # of one colour in every block of 8 x 8, which JPEG keeps to a digit
    seen = picture(3, 2).resize((24, 16), Image.Resampling.NEAREST)
    path.write_bytes(turned(seen, orientation, ending, **options))
    np.testing.assert_allclose(colours(path).astype(int), np.asarray(seen), atol=3 if ending == "JPEG" else 0)


@pytest.mark.parametrize("exif", [b"Exif\0\0neither of the two", b"Exif\0\0MM\0*\xff\xff\xff\xff"])
def test_damaged_metadata_are_not_used(exif: bytes, tmp_path: Path) -> None:
    picture(24, 16).save(tmp_path / "x.png", exif=exif)
    np.testing.assert_array_equal(colours(tmp_path / "x.png"), np.asarray(picture(24, 16)))


@pytest.mark.parametrize(
    ("image", "left", "right"),
    [
        (quarters("RGB", (10, 20, 30), (200, 100, 50)), (10, 20, 30), (200, 100, 50)),
        (quarters("L", 7, 250), (7, 7, 7), (250, 250, 250)),
        (quarters("1", 0, 1), (0, 0, 0), (255, 255, 255)),
        # half of the colour and half of the white ground; all of the ground
        (quarters("RGBA", (100, 0, 0, 128), (9, 9, 9, 0)), (177, 127, 127), (255, 255, 255)),
        (quarters("LA", (100, 255), (100, 0)), (100, 100, 100), (255, 255, 255)),
        # 16 bit: 65535 is 255, 257 a step
        (Image.fromarray(np.array([[257, 257, 51400, 65535]] * 4, np.uint16)), (1, 1, 1), (255, 255, 255)),
    ],
    ids=["RGB", "L", "1", "RGBA", "LA", "I;16"],
)
def test_modes_of_png(image: Image.Image, left: tuple[int, ...], right: tuple[int, ...], tmp_path: Path) -> None:
    image.save(tmp_path / "x.png")
    found = colours(tmp_path / "x.png")
    np.testing.assert_allclose(found[0, 0], left, atol=1)
    np.testing.assert_allclose(found[-1, -1], right, atol=1)


def test_palette_with_a_transparent_colour(tmp_path: Path) -> None:
    image = Image.new("P", (8, 4), 1)
    image.putpalette([0, 0, 255, 255, 0, 0] + [0] * 762)
    image.paste(0, (4, 0, 8, 4))
    image.save(tmp_path / "x.png", transparency=0)
    found = colours(tmp_path / "x.png")
    assert found[0, 0].tolist() == [255, 0, 0]
    assert found[0, -1].tolist() == [255, 255, 255]


def test_cmyk(tmp_path: Path) -> None:
    """Full cyan leaves no red; no ink is white."""
    quarters("CMYK", (255, 0, 0, 0), (0, 0, 0, 0)).resize((64, 32)).save(tmp_path / "x.jpg", quality=95)
    found = colours(tmp_path / "x.jpg").astype(int)
    assert np.abs(found[4, 4] - (0, 255, 255)).max() < 6
    assert np.abs(found[4, -4] - (255, 255, 255)).max() < 6


@pytest.mark.parametrize("ending", ["gif", "webp", "png", "tiff"])
def test_of_several_frames_the_first(ending: str, tmp_path: Path) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ((250, 0, 0), (0, 250, 0))]
    options = {} if ending in ("gif", "tiff") else {"lossless": True} if ending == "webp" else {}
    frames[0].save(tmp_path / f"x.{ending}", save_all=True, append_images=frames[1:], **options)
    found = colours(tmp_path / f"x.{ending}")
    assert found.shape == (8, 8, 3)
    assert np.abs(found[0, 0].astype(int) - (250, 0, 0)).max() < 6


def encoded(ending: str) -> bytes:
    buffer = io.BytesIO()
    picture(64, 48).save(buffer, ending)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.png", b"", "is empty, expected a picture in one of the formats .*; get it again"),
        ("text.jpg", b"hello, this is no picture", "not a picture in one of the formats BMP, GIF, JPEG, PNG, PPM,"),
        ("photo.heic", b"\0\0\0\x18ftypheic\0\0\0\0mif1", "is HEIC, not a picture in one of .*; convert it to one"),
        ("page.png", b"<!DOCTYPE html><html>", "is a web page, not a picture in one of the formats"),
        ("cut.jpg", encoded("JPEG")[:700], r"cannot be decoded \(.*\); the picture is damaged, get it again"),
        ("cut.png", encoded("PNG")[:2000], r"cannot be decoded \(.*\); the picture is damaged"),
        ("cut.webp", encoded("WEBP")[:300], "damaged|not a picture"),
        ("bits.png", encoded("PNG")[:60] + b"\xff" * 40 + encoded("PNG")[100:], r"cannot be decoded"),
        ("x.eps", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not a picture in one of the formats"),
    ],
)
def test_what_is_no_picture(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(FormatError, match=message) as caught:
        open_image(tmp_path / name)
    assert str(caught.value).startswith(str(tmp_path / name))
    assert "\n" not in str(caught.value)


def png_of(width: int, height: int, rows: bytes = b"\0" * 99, head: bytes = b"\x08\x02", clear: bytes = b"") -> bytes:
    """A PNG by hand: ``head`` is bits a colour and kind of colours, ``clear`` the transparent one."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    parts = [(b"IHDR", struct.pack(">II", width, height) + head + b"\0\0\0")]
    parts += [(b"tRNS", clear)] if clear else []
    parts += [(b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(kind, data) for kind, data in parts)


def png_16(values: np.ndarray[Any, Any], clear: bytes = b"") -> bytes:
    """Of 16 bit, which Pillow reads and mostly does not write: [height, width] or [height, width, 3 or 4]."""
    kind = {2: b"\0", 3: b"\x02", 4: b"\x06"}[values.ndim if values.ndim == 2 else values.shape[2]]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    return png_of(values.shape[1], values.shape[0], rows, b"\x10" + kind, clear)


def tiff_16(values: np.ndarray[Any, Any], photometric: int, kind: int = 1) -> bytes:
    """[height, width] in a TIFF: 0 is white (``photometric`` 0) or black (1); ``kind`` 1 without, 2 with sign."""
    height, width = values.shape
    bits = values.itemsize * 8
    data = values.astype(values.dtype.newbyteorder("<")).tobytes()
    tags = [(256, width), (257, height), (258, bits), (259, 1), (262, photometric), (273, 8), (277, 1), (278, height)]
    tags += [(279, len(data)), (339, kind)]
    entries = b"".join(struct.pack("<HHII", tag, 4 if tag == 279 else 3, 1, value) for tag, value in tags)
    at = 8 + len(data)
    return struct.pack("<2sHI", b"II", 42, at) + data + struct.pack("<H", len(tags)) + entries + bytes(4)


def test_colours_of_16_bit(tmp_path: Path) -> None:
    """Each of 8 bit times 257 is that of 8 bit again."""
    seen = np.asarray(picture(24, 16))
    (tmp_path / "x.png").write_bytes(png_16(seen.astype(np.uint16) * 257))
    np.testing.assert_array_equal(colours(tmp_path / "x.png"), seen)
    half = np.concatenate([seen.astype(np.uint16) * 257, np.full((16, 24, 1), 0x8080, np.uint16)], axis=2)
    (tmp_path / "y.png").write_bytes(png_16(half))
    np.testing.assert_allclose(colours(tmp_path / "y.png"), (seen * 128.0 + 255 * 127) / 255, atol=1)


def test_grey_of_16_bit(tmp_path: Path) -> None:
    """Where white is 0, and where one grey is transparent; more rows than are converted at once."""
    grey = np.asarray(picture(24, 16).convert("L"))
    wide = grey.astype(np.uint16) * 257
    clear = int(wide[3, 4])
    expected = {
        "a.png": (png_16(wide), grey),
        "b.tiff": (tiff_16(wide, 1), grey),
        "c.tiff": (tiff_16(wide, 0), 255 - grey),
        "d.png": (png_16(wide, struct.pack(">H", clear)), np.where(wide == clear, 255, grey)),
        "e.pgm": (b"P5 24 16 65535\n" + wide.astype(">u2").tobytes(), grey),
    }
    for strip in (1 << 20, 100):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(image_file, "_STRIP", strip)
            for name, (content, seen) in expected.items():
                (tmp_path / name).write_bytes(content)
                np.testing.assert_array_equal(colours(tmp_path / name), np.repeat(seen[..., None], 3, axis=2), name)


def test_of_two_pictures_of_a_phone_the_first(tmp_path: Path) -> None:
    """MPO is JPEG with others behind."""
    first, second = (Image.new("RGB", (16, 16), colour) for colour in ("red", "blue"))
    first.save(tmp_path / "x.jpg", "MPO", save_all=True, append_images=[second])
    assert np.abs(colours(tmp_path / "x.jpg").astype(int) - (254, 0, 0)).max() < 3


@pytest.mark.parametrize("size", [(12000, 11000), (60000, 60000)])
def test_bombs_are_refused_before_they_are_decoded(size: tuple[int, int], tmp_path: Path) -> None:
    path = tmp_path / "bomb.png"
    path.write_bytes(png_of(*size))
    with pytest.raises(FormatError, match=r"bomb.png: has .* pixels, expected at most 128,000,000; make it smaller"):
        open_image(path)


def test_a_large_picture_is_not_a_bomb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow's own limits do not count, ours does."""
    picture(40, 30).save(tmp_path / "x.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    assert open_image(tmp_path / "x.png").size == (40, 30)
    monkeypatch.setattr(image_file, "MOST_PIXELS", 1199)
    with pytest.raises(FormatError, match="40 × 30 pixels"):
        open_image(tmp_path / "x.png")


def test_no_file(tmp_path: Path) -> None:
    """None of them is waited for."""
    (tmp_path / "folder.png").mkdir()
    os.mkfifo(tmp_path / "pipe.png")
    cases = {
        str(tmp_path / "none.png"): "does not exist",
        str(tmp_path / "folder.png"): "is a directory",
        str(tmp_path / "pipe.png"): "is no regular file",
        "/dev/zero": "is no regular file",
        "https:/e.org/a.png": "is no file, and nothing is fetched from addresses",
        "data:image/png;base64,AAAA": "is no file, and nothing is fetched from addresses",
        "x" * 400: "cannot be read (File name too long)",
    }
    for name, what in cases.items():
        with pytest.raises(FormatError) as caught:
            open_image(Path(name))
        assert str(caught.value) == f"{name}: {what}; give the file of a picture"


def test_a_file_of_somebody_else() -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.png"
        picture(8, 8).save(path)
        path.chmod(0)
        Path(folder).chmod(0o755)
        root = os.geteuid() == 0
        try:
            if root:
                os.seteuid(65534)
            with pytest.raises(FormatError, match=r"x.png: cannot be read \(Permission denied\); give the file"):
                open_image(path)
        finally:
            if root:
                os.seteuid(0)


def test_floats_and_32_bit(tmp_path: Path) -> None:
    Image.fromarray(np.ones((4, 4), np.float32)).save(tmp_path / "x.tiff")
    with pytest.raises(FormatError, match="has floating-point pixels, expected 8 or 16 bit"):
        open_image(tmp_path / "x.tiff")
    for values, sign in ((np.full((4, 4), 300, np.uint32), 1), (np.full((4, 4), 300, np.int16), 2)):
        (tmp_path / "x.tiff").write_bytes(tiff_16(values, 1, sign))
        with pytest.raises(FormatError, match="has pixels of 32 bit or with a sign, expected 8 or 16 bit; convert it"):
            open_image(tmp_path / "x.tiff")


def test_one_that_does_not_fit_into_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    picture(8, 8).save(tmp_path / "x.png")

    def no_room(*_: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(Image.Image, "convert", no_room)
    with pytest.raises(FormatError, match=r"x.png: does not fit into memory; make it smaller$"):
        open_image(tmp_path / "x.png")
