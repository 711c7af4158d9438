"""Molmo's view of a picture: the whole in one crop, then crops that overlap, of which each keeps its own part.

From Ai2's ``image_preprocessing_molmo.py``. The mask of a crop, which says what of it is padding, is that of the crop
behind it: so the released code pairs them, and so the model was trained. The last crop has a mask of -1, which counts
as padding in part.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image

from mopeq_edge.errors import PictureError
from mopeq_edge.vision.description import Crops

Floats = npt.NDArray[np.float32]

START, END, PATCH, COLUMN = range(4)
"""Rows of ``picture_tokens``."""


@dataclass(frozen=True)
class Cropped:
    """A picture in crops."""

    pixels: Floats
    """[1 + columns · rows, 3, side, side], normalized: the whole, then its crops row by row."""
    masks: Floats
    """[1 + columns · rows, patches]: the share of each patch that is picture."""
    columns: int
    rows: int


def best_tiling(height: int, width: int, window: int, most: int) -> tuple[int, int]:
    """Rows and columns of at most ``most`` windows: the least enlargement, or, if all would shrink, the least of that.

    Sizes without margins may be 0 or less for small pictures; what the float32 of the released code makes of that
    holds.
    """
    tilings = [(i, j) for i in range(1, most + 1) for j in range(1, most + 1) if i * j <= most]
    tilings.sort(key=lambda tiling: (tiling[0] * tiling[1], tiling[0]))
    with np.errstate(divide="ignore", invalid="ignore"):
        sizes = np.array(tilings, dtype=np.float32) * np.float32(window)
        scales = (sizes / np.array([height, width], dtype=np.float32)).min(axis=1)
    if (scales < 1).all():
        return tilings[int(scales.argmax())]
    return tilings[int(np.where(scales < 1, np.float32(1e10), scales).argmin())]


def crop(image: Image.Image, layout: Crops, name: str = "picture") -> Cropped:
    """``image`` (RGB) in crops. Raises :class:`PictureError` for one that is too thin to leave a pixel."""
    side, patch = layout.side, layout.patch
    margin = patch * sum(layout.margins)
    step = side - margin
    width, height = image.size
    rows, columns = best_tiling(height - margin, width - margin, step, layout.most)
    large, mask = _fitted(image, (rows * step + margin, columns * step + margin), layout, name)
    whole, _ = _fitted(image, (side, side), layout, name)
    corners = [(row * step, column * step) for row in range(rows) for column in range(columns)]
    crops = [large[y : y + side, x : x + side] for y, x in corners]
    pixels = np.ascontiguousarray(np.stack([whole, *crops]).transpose(0, 3, 1, 2))
    n = side // patch
    windows = [mask[y : y + side, x : x + side] for y, x in corners]
    shares = [window.reshape(n, patch, n, patch).mean(axis=(1, 3)).ravel() for window in windows]
    masks = np.stack([*shares, np.full(n * n, -1.0)]).astype(np.float32)
    return Cropped(pixels, masks, columns, rows)


def _fitted(image: Image.Image, size: tuple[int, int], layout: Crops, name: str) -> tuple[Floats, Floats]:
    """[height, width, 3] of ``size``, normalized, the picture in the middle of black; [height, width]: 1 there."""
    sides = np.array([image.height, image.width], dtype=np.float32)
    scale = (np.array(size, dtype=np.float32) / sides).min()
    height, width = (int(x) for x in sides * scale)
    if not height or not width:
        size_of = f"{image.width} × {image.height}"
        raise PictureError(f"{name}: is {size_of} pixels, too thin to be seen; cut out a part of it")
    resized = [_channel(image, c).resize((width, height), Image.Resampling.BILINEAR) for c in range(3)]
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    pixels = np.zeros((*size, 3), dtype=np.float32)
    pixels[top : top + height, left : left + width] = np.clip(np.stack([np.asarray(x) for x in resized], axis=-1), 0, 1)
    mask = np.zeros(size, dtype=np.float32)
    mask[top : top + height, left : left + width] = 1
    pixels -= np.array(layout.mean, dtype=np.float32)
    pixels /= np.array(layout.std, dtype=np.float32)
    return pixels, mask


def _channel(image: Image.Image, c: int) -> Image.Image:
    """One colour in 0 to 1: of a large picture all three together would be 12 bytes a pixel."""
    values = np.array(image.getchannel(c), dtype=np.float32)
    values /= np.float32(255)
    return Image.fromarray(values)


def stitch(embeddings: Floats, place: Cropped, layout: Crops, tokens: Floats) -> Floats:
    """[n_tokens, n_embd] of a picture, from the embeddings [1 + columns · rows, tokens², n_embd] of its crops.

    Each view stands between a start and an end token; each of its rows ends with a column token. What a crop sees is
    added to a patch token. ``tokens`` [4, n_embd] has these in the order of :data:`START`.
    """
    n = layout.side // layout.patch // 2
    views = embeddings.reshape(1 + place.rows * place.columns, n, n, -1)
    down = [_own(i, place.rows, layout) for i in range(place.rows)]
    across = [_own(i, place.columns, layout) for i in range(place.columns)]
    crops = iter(views[1:])
    parts = np.concatenate([np.concatenate([next(crops)[y, x] for x in across], axis=1) for y in down])
    return np.concatenate([_between_tokens(view, tokens) for view in (views[0], parts)])


def _own(i: int, count: int, layout: Crops) -> slice:
    """Tokens of crop ``i`` of ``count`` in a row that are not its neighbours'."""
    left, right = layout.margins
    patches = layout.side // layout.patch - left - right
    first = 0 if i == 0 else left // 2
    patches += (left if i == 0 else 0) + (right if i == count - 1 else 0)
    return slice(first, first + (patches + 1) // 2)


def _between_tokens(view: Floats, tokens: Floats) -> Floats:
    ends = np.broadcast_to(tokens[COLUMN], (len(view), 1, tokens.shape[1]))
    rows = np.concatenate([view + tokens[PATCH], ends], axis=1).reshape(-1, tokens.shape[1])
    return np.concatenate([tokens[START : START + 1], rows, tokens[END : END + 1]])
