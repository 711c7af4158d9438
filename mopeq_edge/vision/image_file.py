"""A picture's file as red, green and blue, as a person sees it: turned by its EXIF, on white where it is
transparent.
"""

from __future__ import annotations

import errno
import os
import re
import warnings
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from mopeq_edge.errors import PictureError
from mopeq_edge.regular_file import regular_size

FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
MOST_PIXELS = 128_000_000
"""Larger pictures are refused before they are decoded."""

_SIXTEEN_BIT = ("I", "I;16", "I;16B", "I;16L", "I;16N")
_WHITE = 65535
_STRIP = 1 << 20
"""Pixels that are converted at once: what a large picture needs beside itself and what it becomes."""

_OTHERS = (
    *(("HEIC", rb"....ftyp(hei[cxms]|hev[cx]|mif1|msf1)"), ("AVIF", rb"....ftypavi[fs]"), ("PDF", rb"%PDF")),
    *(("JPEG XL", rb"\xff\x0a|....JXL "), ("JPEG 2000", rb"....jP  |\xff\x4f\xff\x51"), ("SVG", rb"\s*<(\?xml|svg)")),
    ("a web page", rb"\s*<(!doctype html|html)"),
)
"""What people take for pictures that are read here: name, and how it begins."""

_PHOTOMETRIC, _WHITE_IS_ZERO = 262, 0
"""A tag of TIFF: what a number means."""


def open_image(path: Path) -> Image.Image:
    """The picture in ``path``, of several the first, in mode RGB.

    Raises :class:`PictureError`, in one line, for what is no picture, is damaged, or is too large.
    """
    try:
        regular_size(path)
        file = path.open("rb")
    except OSError as error:
        raise PictureError(f"{path}: {_why(path, error)}; give the file of a picture") from None
    with file:
        return _decoded(file, str(path), MOST_PIXELS)


def decode_image(data: bytes, name: str, most_pixels: int = MOST_PIXELS) -> Image.Image:
    """The same of the bytes of a file; ``name`` is for errors."""
    return _decoded(BytesIO(data), name, most_pixels)


def encode_png(image: Image.Image) -> bytes:
    """Its file, at the least cost, for a reader who has it at once."""
    file = BytesIO()
    image.save(file, "PNG", compress_level=1)
    return file.getvalue()


def _why(path: Path, error: OSError) -> str:
    if error.errno == errno.EISDIR:
        return "is a directory"
    if error.errno == errno.EINVAL:
        return "is no regular file"
    # a letter alone is a drive
    if re.match(r"data:|[a-zA-Z][\w.+-]+:/", str(path)):
        return "is no file, and nothing is fetched from addresses"
    return "does not exist" if error.errno == errno.ENOENT else f"cannot be read ({os.strerror(error.errno or 0)})"


def _decoded(file: BinaryIO, name: str, most_pixels: int) -> Image.Image:
    with warnings.catch_warnings():
        # the limit here takes the place of Pillow's, and what it warns of in damaged metadata is not used
        warnings.simplefilter("ignore")
        try:
            with Image.open(file, formats=FORMATS) as image:
                return _as_rgb(name, image, most_pixels)
        except UnidentifiedImageError:
            raise PictureError(f"{name}: {_what_else(file)}") from None
        except Image.DecompressionBombError:
            raise _too_large(name, "more", most_pixels) from None
        except PictureError:
            raise
        except MemoryError:
            raise PictureError(f"{name}: does not fit into memory; make it smaller") from None
        # Pillow's decoders raise nearly anything for damaged files
        except Exception as error:
            reason = " ".join(str(error).split())[:120] or type(error).__name__
            raise PictureError(f"{name}: cannot be decoded ({reason}); the picture is damaged, get it again") from None


def _what_else(file: BinaryIO) -> str:
    """Of a file that is no picture."""
    file.seek(0)
    head = file.read(64)
    formats = f"one of the formats {', '.join(FORMATS)}"
    if not head:
        return f"is empty, expected a picture in {formats}; get it again"
    kind = next((name for name, begins in _OTHERS if re.match(begins, head, re.DOTALL | re.IGNORECASE)), None)
    found = "not a picture" if kind is None else f"is {kind}, not a picture"
    return f"{found} in {formats}; convert it to one of them"


def _as_rgb(name: str, image: Image.Image, most_pixels: int) -> Image.Image:
    width, height = image.size
    if width * height > most_pixels:
        raise _too_large(name, f"{width} × {height}", most_pixels)
    image.seek(0)
    image.load()
    # where white is 0, Pillow turns 8 bit around and 16 bit not; it forgets what there was with the tags of the first
    inverted = image.mode in _SIXTEEN_BIT and getattr(image, "tag_v2", {}).get(_PHOTOMETRIC) == _WHITE_IS_ZERO
    _turn(image)
    if image.mode == "F":
        raise PictureError(f"{name}: has floating-point pixels, expected 8 or 16 bit; convert it to PNG or JPEG")
    if image.mode == "I" and image.format == "TIFF":
        raise PictureError(f"{name}: has pixels of 32 bit or with a sign, expected 8 or 16 bit; convert it to PNG")
    if image.mode in _SIXTEEN_BIT:
        return _from_16_bit(image, inverted=inverted)
    if "A" in image.getbands() or "a" in image.getbands() or "transparency" in image.info:
        return _on_white(image)
    return image.convert("RGB")


def _turn(image: Image.Image) -> None:
    try:
        ImageOps.exif_transpose(image, in_place=True)
    # metadata that cannot be read: the pixels are sound all the same
    except Exception:
        return


def _strips(image: Image.Image) -> Iterator[tuple[int, Image.Image]]:
    """Row of its upper edge, and strip."""
    rows = max(1, _STRIP // image.width)
    for top in range(0, image.height, rows):
        yield top, image.crop((0, top, image.width, min(top + rows, image.height)))


def _on_white(image: Image.Image) -> Image.Image:
    found = Image.new("RGB", image.size, "white")
    for top, strip in _strips(image):
        seen = strip.convert("RGBA")
        found.paste(seen, (0, top), seen)
    return found


def _from_16_bit(image: Image.Image, *, inverted: bool) -> Image.Image:
    """Grey of 16 bit: Pillow's own conversion would cut at 255."""
    found = Image.new("L", image.size)
    clear = image.info.get("transparency")
    for top, strip in _strips(image):
        values = np.asarray(strip).astype(np.uint32)
        if inverted:
            values = _WHITE - values
        if isinstance(clear, int):
            values[values == clear] = _WHITE
        found.paste(Image.fromarray(((values + 128) // 257).astype(np.uint8)), (0, top))
    return found.convert("RGB")


def _too_large(name: str, size: str, most: int) -> PictureError:
    return PictureError(f"{name}: has {size} pixels, expected at most {most:,}; make it smaller")
