"""Which tiles DeepSeek-VL2 sees of a picture, and in which order their embeddings follow: by hand, by brute force."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from PIL import Image

from mopeq_edge.errors import FormatError
from mopeq_edge.vision.description import Tiles
from mopeq_edge.vision.tiles import Cut, arrange, best_candidate, cut

from .pictures import picture

SHAPES = [(w, h) for w in range(1, 10) for h in range(1, 10) if w * h <= 9]
RELEASED = Tiles(
    side=384,
    rows=14,
    candidates=tuple((384 * w, 384 * h) for w, h in SHAPES),
    most_tiled=2,
    whole_first=True,
    mean=(0.5, 0.5, 0.5),
    std=(0.5, 0.5, 0.5),
)
SMALL = Tiles(8, 2, tuple((8 * w, 8 * h) for w, h in SHAPES), 2, True, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        # (columns, rows), worked out by hand
        *(((384, 384), (1, 1)), ((300, 200), (1, 1)), ((1000, 1000), (3, 3)), ((768, 768), (2, 2))),
        *(((800, 400), (3, 2)), ((768, 384), (2, 1)), ((384, 768), (1, 2)), ((3000, 384), (8, 1))),
        *(((640, 480), (2, 2)), ((1920, 1080), (4, 2)), ((1080, 1920), (2, 4)), ((100, 2000), (1, 6))),
    ],
)
def test_the_candidate_of_a_size(size: tuple[int, int], expected: tuple[int, int]) -> None:
    found = best_candidate(*size, RELEASED.candidates)
    assert (found[0] // 384, found[1] // 384) == expected


def test_no_candidate_keeps_more() -> None:
    """In exact fractions: the chosen one keeps most pixels, and of those is the smallest."""
    random = np.random.default_rng(1)
    for width, height in random.integers(20, 4000, (200, 2)).tolist():
        chosen = best_candidate(width, height, RELEASED.candidates)

        def kept(box: tuple[int, int], width: int = width, height: int = height) -> int:
            scale = min(Fraction(box[0], width), Fraction(box[1], height))
            return min(int(width * scale) * int(height * scale), width * height)

        best = max(kept(box) for box in RELEASED.candidates)
        # a product in float64 may fall just below the whole number that it is
        assert kept(chosen) >= best - 4000
        if kept(chosen) == width * height:
            fitting = [box for box in RELEASED.candidates if kept(box) == width * height]
            assert chosen[0] * chosen[1] == min(w * h for w, h in fitting)


@pytest.mark.parametrize(("size", "shape"), [((16, 16), (2, 2)), ((40, 9), (5, 1)), ((9, 40), (1, 5))])
def test_pixels_of_the_tiles(size: tuple[int, int], shape: tuple[int, int]) -> None:
    """Square, wide and tall: each tile against the fitted picture at its own place; what is left over is mid-grey."""
    columns, rows = shape
    layout = Tiles(8, 2, ((8, 8), (8 * columns, 8 * rows)), 2, True, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    image = picture(*size)
    place = cut(image, layout, 1)
    assert (place.columns, place.rows) == shape
    assert place.pixels.shape == (1 + columns * rows, 3, 8, 8)
    for which, box in ((0, (8, 8)), (1, (8 * columns, 8 * rows))):
        scale = min(box[0] / size[0], box[1] / size[1])
        inner = (round(size[0] * scale), round(size[1] * scale))
        fitted = np.asarray(image.resize(inner, Image.Resampling.BICUBIC), dtype=np.float64)
        expected = np.full((box[1], box[0], 3), 127.0)
        x, y = round((box[0] - inner[0]) / 2), round((box[1] - inner[1]) / 2)
        expected[y : y + inner[1], x : x + inner[0]] = fitted
        expected = expected / 255 * 2 - 1
        tiles = [(0, 0)] if which == 0 else [(r, c) for r in range(rows) for c in range(columns)]
        for i, (r, c) in enumerate(tiles):
            here = expected[8 * r : 8 * r + 8, 8 * c : 8 * c + 8].transpose(2, 0, 1)
            np.testing.assert_allclose(place.pixels[which + i], here, atol=1e-6)


def test_more_than_two_pictures_are_not_tiled() -> None:
    image = picture(50, 20)
    found = [cut(image, SMALL, n) for n in (1, 2, 3)]
    assert [(place.columns, place.rows) for place in found] == [(4, 2), (4, 2), (1, 1)]
    # the whole picture is then there twice, as in the released processor
    np.testing.assert_array_equal(found[2].pixels[0], found[2].pixels[1])


@pytest.mark.parametrize(
    ("shape", "written"),
    [
        ((1, 1), "abN cdN | efN ghN"),
        ((2, 1), "abN cdN | efijN ghklN"),
        ((1, 2), "abN cdN | efN ghN ijN klN"),
        ((2, 2), "abN cdN | efijN ghklN mnqrN opstN"),
    ],
)
def test_order_and_newlines(shape: tuple[int, int], written: str) -> None:
    """Tiles abcd (the whole), efgh, ijkl, mnop, qrst of 2 × 2 tokens; N ends a row, | parts the views."""
    columns, rows = shape
    count = 1 + columns * rows
    letters = np.array([ord("a") + i for i in range(4 * count)], dtype=np.float32).reshape(count, 4, 1)
    place = Cut(np.zeros((count, 3, 8, 8), np.float32), columns, rows)
    newline, separator = (np.array([ord(c)], np.float32) for c in "N|")
    found = "".join(chr(int(x)) for x in arrange(letters, place, SMALL, newline, separator)[:, 0])
    assert found == written.replace(" ", "")
    last = Tiles(**{**SMALL.__dict__, "whole_first": False})
    turned = "".join(chr(int(x)) for x in arrange(letters, place, last, newline, separator)[:, 0])
    assert turned == "|".join(reversed(written.replace(" ", "").split("|")))


def test_tokens_of_a_released_picture() -> None:
    """14 · 15 of the whole, one between, 28 rows of 42 and a newline for 3 × 2 tiles: 1415."""
    place = Cut(np.zeros((7, 3, 1, 1), np.float32), 3, 2)
    found = arrange(np.zeros((7, 196, 4), np.float32), place, RELEASED, np.zeros(4, np.float32), np.ones(4, np.float32))
    assert found.shape == (14 * 15 + 1 + 28 * 43, 4)
    assert np.flatnonzero(found[:, 0]).tolist() == [210]


def test_too_thin() -> None:
    with pytest.raises(FormatError, match=r"^line.png: is 1 × 5000 pixels, too thin to be seen; cut out a part of it$"):
        cut(Image.new("RGB", (1, 5000)), RELEASED, 1, "line.png")
    assert cut(Image.new("RGB", (1, 300)), RELEASED, 1).pixels.shape == (2, 3, 384, 384)
