"""DeepSeek-VL2's view of a picture: the whole in one tile, then in those of the candidate that keeps most of it.

From DeepSeek's ``processing_deepseek_vl_v2.py`` (which pictures become which tiles) and ``modeling_deepseek_vl_v2.py``
(in which order their embeddings follow, and where the vectors between them stand).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

from mopeq_edge.errors import PictureError
from mopeq_edge.vision.description import Tiles

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Cut:
    """A picture in tiles."""

    pixels: Floats
    """[1 + columns · rows, 3, side, side], normalized: the whole, then its tiles row by row."""
    columns: int
    rows: int


def best_candidate(width: int, height: int, candidates: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The candidate in which most of the picture's own pixels survive; of those the one with the fewest to spare.

    All are (width, height) in pixels; of equal ones it is the first.
    """

    def rank(candidate: tuple[int, int]) -> tuple[int, int]:
        scale = min(candidate[0] / width, candidate[1] / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        return -kept, candidate[0] * candidate[1] - kept

    return min(candidates, key=rank)


def cut(image: Image.Image, layout: Tiles, n_images: int, name: str = "picture") -> Cut:
    """``image`` (RGB) in tiles; of more than ``most_tiled`` pictures each is one tile and the whole once more.

    Raises :class:`PictureError` for one that is too thin to leave a pixel.
    """
    side = layout.side
    size = best_candidate(*image.size, layout.candidates) if n_images <= layout.most_tiled else (side, side)
    filling = tuple(int(255 * mean) for mean in layout.mean)
    whole, large = (_fitted(image, box, filling, name) for box in ((side, side), size))
    boxes = [(x, y, x + side, y + side) for y in range(0, size[1], side) for x in range(0, size[0], side)]
    views = [whole, *(large.crop(box) for box in boxes)]
    mean, std = (np.array(colour, dtype=np.float32) for colour in (layout.mean, layout.std))
    seen = np.stack([np.asarray(view, dtype=np.float32) for view in views]) / np.float32(255)
    pixels: Floats = np.ascontiguousarray(((seen - mean) / std).transpose(0, 3, 1, 2))
    return Cut(pixels, size[0] // side, size[1] // side)


def _fitted(image: Image.Image, size: tuple[int, int], filling: tuple[int, ...], name: str) -> Image.Image:
    """As large as ``size`` allows, in its middle."""
    width, height = image.size
    if round(min(size[0], size[1] * width / height)) < 1 or round(min(size[1], size[0] * height / width)) < 1:
        raise PictureError(f"{name}: is {width} × {height} pixels, too thin to be seen; cut out a part of it")
    return ImageOps.pad(image, size, color=filling)


def arrange(embeddings: Floats, place: Cut, layout: Tiles, newline: Floats, separator: Floats) -> Floats:
    """[n_tokens, n_embd] of a picture, from the embeddings [1 + columns · rows, tile rows², n_embd] of its tiles.

    Each row of the whole ends with ``newline``, as does each row across all tiles side by side; between the two views
    is ``separator``.
    """
    n, width = layout.rows, embeddings.shape[-1]
    whole = embeddings[0].reshape(n, n, width)
    grid = embeddings[1:].reshape(place.rows, place.columns, n, n, width).transpose(0, 2, 1, 3, 4)
    parts = grid.reshape(place.rows * n, place.columns * n, width)
    views = [_with_newlines(view, newline) for view in (whole, parts)]
    first, second = views if layout.whole_first else views[::-1]
    return np.concatenate([first, separator[None], second])


def _with_newlines(view: Floats, newline: Floats) -> Floats:
    ends = np.broadcast_to(newline, (len(view), 1, len(newline)))
    return np.concatenate([view, ends], axis=1).reshape(-1, len(newline))
