"""A picture's file as red, green and blue, as a person sees it: turned by its EXIF, on white where it is
transparent.
"""

from __future__ import annotations

import warnings
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from mopeq_edge.errors import FormatError

FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
MOST_PIXELS = 128_000_000
"""Larger pictures are refused before they are decoded."""

_SIXTEEN_BIT = ("I", "I;16", "I;16B", "I;16L", "I;16N")


def open_image(path: Path) -> Image.Image:
    """The picture in ``path``, of several the first, in mode RGB.

    Raises :class:`FormatError`, in one line, for what is no picture, is damaged, or is too large.
    """
    if not path.is_file():
        what = "is a directory" if path.is_dir() else "does not exist"
        raise FormatError(f"{path}: {what}; give the file of a picture")
    return _decoded(path, str(path), MOST_PIXELS)


def decode_image(data: bytes, name: str, most_pixels: int = MOST_PIXELS) -> Image.Image:
    """The same of the bytes of a file; ``name`` is for errors."""
    return _decoded(BytesIO(data), name, most_pixels)


def _decoded(file: Path | BytesIO, name: str, most_pixels: int) -> Image.Image:
    with warnings.catch_warnings():
        # the limit here takes the place of Pillow's, and what it warns of in damaged metadata is not used
        warnings.simplefilter("ignore")
        try:
            with Image.open(file, formats=FORMATS) as image:
                return _as_rgb(name, image, most_pixels)
        except UnidentifiedImageError:
            raise FormatError(
                f"{name}: not a picture in one of the formats {', '.join(FORMATS)}; convert it to one of them"
            ) from None
        except Image.DecompressionBombError:
            raise _too_large(name, "more", most_pixels) from None
        except FormatError:
            raise
        # Pillow's decoders raise nearly anything for damaged files
        except Exception as error:
            reason = " ".join(str(error).split())[:120] or type(error).__name__
            raise FormatError(f"{name}: cannot be decoded ({reason}); the picture is damaged, get it again") from None


def _as_rgb(name: str, image: Image.Image, most_pixels: int) -> Image.Image:
    width, height = image.size
    if width * height > most_pixels:
        raise _too_large(name, f"{width} × {height}", most_pixels)
    image.seek(0)
    image.load()
    turned = ImageOps.exif_transpose(image)
    if turned.mode in _SIXTEEN_BIT:
        return _from_16_bit(name, turned)
    if turned.mode == "F":
        raise FormatError(f"{name}: has floating-point pixels, expected 8 or 16 bit; convert it to PNG or JPEG")
    if "A" in turned.getbands() or "a" in turned.getbands() or "transparency" in turned.info:
        seen = turned.convert("RGBA")
        ground = Image.new("RGBA", seen.size, (255, 255, 255, 255))
        return Image.alpha_composite(ground, seen).convert("RGB")
    return turned.convert("RGB")


def _from_16_bit(name: str, image: Image.Image) -> Image.Image:
    """Grey of 16 bit: Pillow's own conversion would cut at 255."""
    values = np.asarray(image).astype(np.int64)
    if values.size and not 0 <= int(values.min()) <= int(values.max()) <= 65535:
        raise FormatError(f"{name}: has pixels of more than 16 bit; convert it to PNG or JPEG of 8 bit")
    return Image.fromarray(((values + 128) // 257).astype(np.uint8)).convert("RGB")


def _too_large(name: str, size: str, most: int) -> FormatError:
    return FormatError(f"{name}: has {size} pixels, expected at most {most:,}; make it smaller")
