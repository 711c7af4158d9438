"""Files of pictures: every kind comes out as a person sees it, or is refused in one line."""

from __future__ import annotations

import io
import struct
import zlib
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


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_says_how_it_is_turned(orientation: int, tmp_path: Path) -> None:
    """Each orientation, undone by hand on the array."""
    seen = np.asarray(picture(24, 16))
    undo = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.swapaxes(0, 1),
        6: lambda a: np.rot90(a, 1),
        7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
        8: lambda a: np.rot90(a, -1),
    }
    stored = Image.fromarray(np.ascontiguousarray(undo[orientation](seen)))
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "x.png", exif=exif)
    np.testing.assert_array_equal(colours(tmp_path / "x.png"), seen)


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
        ("empty.png", b"", "not a picture in one of the formats BMP, GIF, JPEG, PNG, PPM, TIFF, WEBP; convert it"),
        ("text.jpg", b"hello, this is no picture", "not a picture in one of the formats"),
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


def png_of(width: int, height: int) -> bytes:
    """A PNG that claims a size, of almost no bytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0" * 99)) + chunk(b"IEND", b"")


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


def test_no_file_and_a_directory(tmp_path: Path) -> None:
    for path, what in ((tmp_path / "none.png", "does not exist"), (tmp_path, "is a directory")):
        with pytest.raises(FormatError, match=f"^{path}: {what}; give the file of a picture$"):
            open_image(path)


def test_floats(tmp_path: Path) -> None:
    Image.fromarray(np.ones((4, 4), np.float32)).save(tmp_path / "x.tiff")
    with pytest.raises(FormatError, match="has floating-point pixels, expected 8 or 16 bit"):
        open_image(tmp_path / "x.tiff")
