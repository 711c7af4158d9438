"""Molmo's crops: which tiling, which pixels, which masks, and where each token comes to stand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional

from mopeq_edge.errors import FormatError
from mopeq_edge.vision.crops import COLUMN, END, PATCH, START, Cropped, best_tiling, crop, stitch
from mopeq_edge.vision.description import Crops

from .pictures import picture

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
RELEASED = Crops(336, 14, 12, (4, 4), MEAN, STD)
SMALL = Crops(24, 2, 12, (4, 4), MEAN, STD)


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        # (height, width) to (rows, columns): windows of 224 after 112 pixels of margin, worked out by hand
        *(((336, 336), (1, 1)), ((337, 336), (2, 1)), ((560, 560), (2, 2)), ((560, 1008), (2, 4))),
        *(((480, 640), (2, 3)), ((300, 2000), (1, 9)), ((3000, 3000), (3, 3)), ((2000, 3000), (3, 4))),
        # smaller than the margins
        *(((100, 100), (1, 1)), ((50, 300), (1, 1))),
    ],
)
def test_the_tiling_of_a_size(size: tuple[int, int], expected: tuple[int, int]) -> None:
    assert best_tiling(size[0] - 112, size[1] - 112, 224, 12) == expected


def reference(image: Image.Image, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """torch's antialiased bilinear, in the middle of black; and where it is."""
    values = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)[None].float() / 255
    scale = min(size[0] / image.height, size[1] / image.width)
    inner = (int(image.height * scale), int(image.width * scale))
    small = functional.interpolate(values, inner, mode="bilinear", antialias=True, align_corners=False)
    found, mask = np.zeros((3, *size)), np.zeros(size)
    top, left = (size[0] - inner[0]) // 2, (size[1] - inner[1]) // 2
    found[:, top : top + inner[0], left : left + inner[1]] = small.clamp(0, 1)[0].numpy()
    mask[top : top + inner[0], left : left + inner[1]] = 1
    return (found - np.array(MEAN)[:, None, None]) / np.array(STD)[:, None, None], mask


@pytest.mark.parametrize("size", [(20, 20), (70, 30), (30, 70), (9, 9), (41, 40)])
def test_pixels_and_masks(size: tuple[int, int]) -> None:
    image = picture(*size)
    place = crop(image, SMALL)
    n = place.rows * place.columns
    assert place.pixels.shape == (1 + n, 3, 24, 24)
    np.testing.assert_allclose(place.pixels[0], reference(image, (24, 24))[0], atol=1e-4)
    # a window is 4 patches of 2 pixels, between margins of 8 pixels
    large, mask = reference(image, (8 * place.rows + 16, 8 * place.columns + 16))
    for i in range(n):
        y, x = 8 * (i // place.columns), 8 * (i % place.columns)
        np.testing.assert_allclose(place.pixels[1 + i], large[:, y : y + 24, x : x + 24], atol=1e-4)
        # the mask of a crop stands with the crop before it, and none with the last
        for patch in range(144):
            at = y + 2 * (patch // 12), x + 2 * (patch % 12)
            share = mask[at[0] : at[0] + 2, at[1] : at[1] + 2].mean()
            assert place.masks[i, patch] == pytest.approx(share)
    assert (place.masks[-1] == -1).all()


def test_padding_in_whole_and_in_part_is_there() -> None:
    """So that the masks above are not all one."""
    found = {float(x) for size in ((70, 30), (41, 40)) for x in np.unique(crop(picture(*size), SMALL).masks)}
    assert {0.0, 1.0, -1.0} < found


@pytest.mark.parametrize(
    "layout", [SMALL, RELEASED, Crops(24, 2, 12, (2, 4), MEAN, STD), Crops(24, 2, 12, (0, 0), MEAN, STD)]
)
@pytest.mark.parametrize("shape", [(1, 1), (1, 2), (2, 1), (3, 4)])
def test_every_token_stands_at_its_own_place(shape: tuple[int, int], layout: Crops) -> None:
    """Embeddings that say where in the whole grid they are come out in the order of reading, none twice."""
    rows, columns = shape
    n, step = layout.side // layout.patch // 2, (layout.side // layout.patch - sum(layout.margins)) // 2
    at = np.arange(n)
    crops = [
        np.stack(np.meshgrid(r * step + at, c * step + at, indexing="ij"), -1).reshape(n * n, 2)
        for r in range(rows)
        for c in range(columns)
    ]
    whole = np.stack(np.meshgrid(at, at, indexing="ij"), -1).reshape(n * n, 2)
    place = Cropped(np.zeros(0, np.float32), np.zeros(0, np.float32), columns, rows)
    tokens = np.array([[-1, -1], [-2, -2], [1000, 1000], [-3, -3]], np.float32)
    assert (START, END, PATCH, COLUMN) == (0, 1, 2, 3)
    found = stitch(np.array([whole, *crops], np.float32), place, layout, tokens).tolist()
    expected: list[list[float]] = []
    for height, width in ((n, n), (rows * step + sum(layout.margins) // 2, columns * step + sum(layout.margins) // 2)):
        expected.append([-1, -1])
        for y in range(height):
            expected += [[1000 + y, 1000 + x] for x in range(width)] + [[-3, -3]]
        expected.append([-2, -2])
    assert found == expected


def test_tokens_of_a_released_picture() -> None:
    """12 rows of 12 and a column token between two; then, for 2 × 3 crops, 20 rows of 28 and one."""
    place = Cropped(np.zeros(0, np.float32), np.zeros(0, np.float32), 3, 2)
    found = stitch(np.zeros((7, 144, 4), np.float32), place, RELEASED, np.zeros((4, 4), np.float32))
    assert len(found) == 2 + 12 * 13 + 2 + 20 * 29


def test_too_thin() -> None:
    with pytest.raises(FormatError, match=r"^x.png: is 5000 × 1 pixels, too thin to be seen; cut out a part of it$"):
        crop(Image.new("RGB", (5000, 1)), RELEASED, "x.png")
