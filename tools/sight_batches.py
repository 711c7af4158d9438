"""Batches of pictures with questions for the tiny-sight model, as its processor and its text model see them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from mopeq_edge.vision.tiles import cut
from tools.sight_model import LAYOUT, SIZES
from tools.sight_pictures import COLOURS, KINDS, SIDE, THINGS, Scene, ask, draw_scene
from tools.sight_text import END, Encoded, encode

_COLOURS = tuple(COLOURS)
NOT_ASKED = -100
"""Of tokens that are not to be predicted."""


@dataclass(frozen=True)
class Batch:
    """``n`` pictures that are cut alike, each with several questions one behind the other.

    All questions about a picture stand at the places behind it; none sees another. So a picture is seen once.
    """

    grid: tuple[int, int]
    pixels: Tensor
    """[n, 1 + tiles, 3, side, side]"""
    tokens: Tensor
    """[n, length] of the questions and answers."""
    places: Tensor
    """[n, length]: place of each in the sequence, counted from the end of the picture."""
    owners: Tensor
    """[n, length]: number of the question, −1 behind the last."""
    labels: Tensor
    """[n, length]: the token that follows, or :data:`NOT_ASKED`."""
    covered: Tensor
    """[n, 1 + tiles, rows², 2]: colour and kind of what the middle of each token shows, 0 for the ground."""
    asked: tuple[tuple[Encoded, ...], ...]


def make_batch(
    tokenizer: Tokenizer, grid: tuple[int, int], seeds: Sequence[int], *, fresh: bool = False, most: int = len(KINDS)
) -> Batch:
    """Pictures of ``seeds``, each with ``most`` kinds of questions; ``fresh`` ones have held-out pairs."""
    scenes = [draw_scene(seed, grid, fresh=fresh) for seed in seeds]
    asked = tuple(
        tuple(encode(tokenizer, one) for one in ask(seed, scene.things, Random(f"kinds {seed}").sample(KINDS, most)))
        for seed, scene in zip(seeds, scenes, strict=True)
    )
    length = max(sum(len(one.tokens) for one in own) for own in asked)
    rows = np.full((4, len(scenes), length), -1, np.int64)
    rows[0], rows[3] = END, NOT_ASKED
    for i, own in enumerate(asked):
        at = 0
        for number, one in enumerate(own):
            end = at + len(one.tokens)
            rows[0, i, at:end], rows[1, i, at:end], rows[2, i, at:end] = one.tokens, range(end - at), number
            rows[3, i, end - 1 - one.n_answer : end - 1] = one.tokens[-one.n_answer :]
            at = end
    pixels = np.stack([cut(scene.image, LAYOUT, 1).pixels for scene in scenes])
    covered = np.stack([_covered(scene, grid) for scene in scenes])
    tokens, places, owners, labels = (torch.from_numpy(row) for row in rows)
    shown = torch.from_numpy(pixels), tokens, places.clamp_min(0), owners, labels, torch.from_numpy(covered)
    return Batch(grid, *shown, asked)


def _covered(scene: Scene, grid: tuple[int, int]) -> np.ndarray[tuple[int, ...], np.dtype[np.int64]]:
    whole = _view(scene, (SIDE, SIDE))
    if grid != (1, 1):
        # too small there to be told, and a guess would be found in the place of what a tile shows
        whole[..., 1] = 0
    found = [whole]
    large = _view(scene, (grid[0] * SIDE, grid[1] * SIDE))
    for y in range(0, len(large), SIDE):
        found += [large[y : y + SIDE, x : x + SIDE] for x in range(0, large.shape[1], SIDE)]
    middles = np.minimum(2 * SIZES.patch * np.arange(SIZES.rows) + SIZES.patch, SIDE - 1)
    return np.stack([view[middles][:, middles].reshape(-1, 2) for view in found])


def _view(scene: Scene, box: tuple[int, int]) -> np.ndarray[tuple[int, ...], np.dtype[np.int64]]:
    """[height, width, 2]: what each pixel of the fitted picture shows, by the squares around things."""
    width, height = scene.image.size
    scale = min(box[0] / width, box[1] / height)
    left, top = (box[0] - scale * width) / 2, (box[1] - scale * height) / 2
    view = np.zeros((box[1], box[0], 2), np.int64)
    for thing in scene.things:
        half = thing.side * scale * width / 2
        x, y = left + thing.x * width * scale, top + thing.y * height * scale
        own = np.s_[max(0, round(y - half)) : round(y + half), max(0, round(x - half)) : round(x + half)]
        view[own] = (1 + _COLOURS.index(thing.colour), 1 + THINGS.index(thing.kind))
    return view
