"""Pictures of coloured things, and questions about them: what the tiny-sight model was trained on and is asked.

A picture has one to four shapes or digits on a grey ground: square, wide or tall, of any size, things of any place,
size, tilt and shade. Everything follows from the seed. :data:`HELD_OUT` pairs of colour and thing are for questions
only: training never draws them (``fresh`` pictures have one at least).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from PIL import Image, ImageDraw, ImageFont

from mopeq_edge.vision.tiles import best_candidate

SIDE = 30
"""Pixels of a tile's side."""
GRIDS = ((1, 1), (1, 2), (1, 3), (2, 1), (2, 2), (3, 1))
"""Columns and rows of tiles that a picture may be cut into."""
CANDIDATES = tuple((columns * SIDE, rows * SIDE) for columns, rows in GRIDS)

COLOURS = {
    "red": (214, 32, 32),
    "orange": (245, 140, 20),
    "yellow": (240, 225, 40),
    "green": (30, 160, 50),
    "blue": (35, 70, 215),
    "purple": (150, 40, 180),
}
SHAPES = ("circle", "square", "triangle", "star", "cross")
THINGS = (*SHAPES, "0", "2", "4", "7")
COUNTS = ("one", "two", "three", "four")
PAIRS = tuple((colour, thing) for colour in COLOURS for thing in THINGS)
HELD_OUT = frozenset(Random(7).sample(PAIRS, 9))
"""One pair in six."""

COLOUR, THING, COUNT, ACROSS, DOWN, EXISTS, CAPTION = KINDS = (
    *("colour", "thing", "count", "across", "down", "exists"),
    "caption",
)
"""Kinds of questions."""

_CANVAS = 4
"""Things are drawn at so many pixels for each that the model sees."""
_LEAST = 0.65
"""Least side of a thing, in parts of its cell."""
_CLEAR = 0.17
"""Of the picture's side: things nearer to its middle are on neither side."""


@dataclass(frozen=True)
class Thing:
    """One thing: its centre in parts of the picture's width and height, its side in parts of the width."""

    colour: str
    kind: str
    x: float
    y: float
    side: float


@dataclass(frozen=True)
class Scene:
    """A picture and what is in it, from left to right."""

    image: Image.Image
    things: tuple[Thing, ...]


@dataclass(frozen=True)
class Asked:
    """A question, its right answer and its kind, of :data:`KINDS`."""

    kind: str
    question: str
    answer: str


def draw_scene(seed: int, grid: tuple[int, int], *, fresh: bool = False) -> Scene:
    """A picture that is cut into ``grid`` (columns, rows). ``fresh``: some of its pairs are held-out ones."""
    random = Random(f"{seed} {grid} {fresh}")
    (seen_w, seen_h), size = _sizes(random, grid)
    boxes = _places(random, grid, seen_w, seen_h)
    pairs = _pairs(random, len(boxes), fresh)
    ground = random.randint(195, 240)
    canvas = Image.new("RGB", (round(seen_w * _CANVAS), round(seen_h * _CANVAS)), _grey(random, ground))
    _shade(random, canvas, ground)
    things = []
    for (x, y, side), (colour, kind) in zip(boxes, pairs, strict=True):
        _paste(random, canvas, (x, y, side), colour, kind)
        things.append(Thing(colour, kind, x / seen_w, y / seen_h, side / seen_w))
    image = canvas.resize(size, Image.Resampling.LANCZOS)
    return Scene(image, tuple(sorted(things, key=lambda thing: thing.x)))


def ask(seed: int, things: Sequence[Thing], kinds: Sequence[str] = KINDS) -> list[Asked]:
    """One question of each of ``kinds`` that has a clear answer; ``things`` from left to right."""
    random = Random(f"questions {seed}")
    found = (_question(random, kind, things) for kind in kinds)
    return [asked for asked in found if asked is not None]


def _question(random: Random, kind: str, things: Sequence[Thing]) -> Asked | None:
    if kind == COUNT:
        return Asked(kind, "How many things are there?", COUNTS[len(things) - 1])
    if kind == CAPTION:
        if any(b.x - a.x < _CLEAR for a, b in itertools.pairwise(things)):
            return None
        return Asked(kind, "Describe this image.", ", ".join(f"{thing.colour} {thing.kind}" for thing in things))
    if kind == EXISTS:
        return _exists(random, things)
    if kind == COLOUR:
        only = _only([thing.kind for thing in things], things)
        return Asked(kind, f"What colour is the {(one := random.choice(only)).kind}?", one.colour) if only else None
    only = _only([thing.colour for thing in things], things)
    if kind == THING:
        return Asked(kind, f"What is {(one := random.choice(only)).colour}?", one.kind) if only else None
    across = kind == ACROSS
    only = [one for one in only if abs((one.x if across else one.y) - 0.5) > _CLEAR]
    if not only:
        return None
    one = random.choice(only)
    if across:
        return Asked(kind, f"Is the {one.colour} thing on the left or the right?", "left" if one.x < 0.5 else "right")
    return Asked(kind, f"Is the {one.colour} thing at the top or the bottom?", "top" if one.y < 0.5 else "bottom")


def _exists(random: Random, things: Sequence[Thing]) -> Asked:
    """A kind or a colour; half of them yes."""
    by_kind, there = random.random() < 0.5, random.random() < 0.5
    every = THINGS if by_kind else tuple(COLOURS)
    shown = {thing.kind if by_kind else thing.colour for thing in things}
    word = random.choice([word for word in every if (word in shown) == there])
    about = f"a {word}" if by_kind else f"anything {word}"
    return Asked(EXISTS, f"Is there {about}?", "yes" if there else "no")


def _only(keys: Sequence[str], things: Sequence[Thing]) -> list[Thing]:
    """Things whose key no other one has."""
    return [thing for key, thing in zip(keys, things, strict=True) if keys.count(key) == 1]


def _sizes(random: Random, grid: tuple[int, int]) -> tuple[tuple[float, float], tuple[int, int]]:
    """Width and height of a picture that is cut into ``grid``, in pixels that the model sees and in its own.

    One or two tiles are for thumbnails: of larger pictures the processor keeps what it can.
    """
    box = (SIDE * grid[0], SIDE * grid[1])
    while True:
        width, height = (length * random.uniform(0.75, 1.0) for length in box)
        scale = min(box[0] / width, box[1] / height)
        seen = (width * scale, height * scale)
        zoom = random.uniform(0.75, 1.0) if grid[0] * grid[1] < 3 else random.uniform(1.0, _CANVAS)
        size = (round(seen[0] * zoom), round(seen[1] * zoom))
        if best_candidate(*size, CANDIDATES) == box:
            return seen, size


def _places(random: Random, grid: tuple[int, int], width: float, height: float) -> list[tuple[float, float, float]]:
    """Centres and sides of things, each anywhere within a cell of its own, of which there are as many as tiles."""
    columns, rows = grid
    cells = [(column, row) for row in range(rows) for column in range(columns)]
    found = []
    for column, row in random.sample(cells, random.randint(1, len(cells))):
        across, down = width / columns, height / rows
        side = random.uniform(_LEAST, 1.0) * (min(across, down) - 2)
        x, y = (random.uniform(side / 2, length - side / 2) for length in (across, down))
        found.append((column * across + x, row * down + y, side))
    return found


def _pairs(random: Random, count: int, fresh: bool) -> list[tuple[str, str]]:
    """Colours and things; two of a picture are never the same in both."""
    known = [pair for pair in PAIRS if pair not in HELD_OUT]
    if not fresh:
        return random.sample(known, count)
    first = random.choice(sorted(HELD_OUT))
    rest = random.sample([pair for pair in PAIRS if pair != first], count - 1)
    found = [first, *rest]
    random.shuffle(found)
    return found


def _grey(random: Random, level: int) -> tuple[int, int, int]:
    red, green, blue = (min(255, max(0, level + random.randint(-6, 6))) for _ in range(3))
    return red, green, blue


def _shade(random: Random, canvas: Image.Image, ground: int) -> None:
    """The ground becomes lighter or darker across the picture, and is not smooth."""
    draw = ImageDraw.Draw(canvas)
    width, height = canvas.size
    for _ in range(6):
        x, y = random.uniform(0, width), random.uniform(0, height)
        radius = random.uniform(10, 60)
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=_grey(random, ground))


def _paste(random: Random, canvas: Image.Image, box: tuple[float, float, float], colour: str, kind: str) -> None:
    x, y, side = (_CANVAS * value for value in box)
    size = max(8, round(side))
    mask = Image.new("L", (size, size), 0)
    draw = ImageDraw.Draw(mask)
    if kind in SHAPES:
        _shape(draw, kind, size)
    else:
        font = ImageFont.load_default(round(size * 1.05))
        draw.text((size / 2, size / 2), kind, fill=255, font=font, anchor="mm", stroke_width=size // 24)
    tilted = mask.rotate(random.uniform(-8, 8), Image.Resampling.BILINEAR)
    shade = tuple(min(255, max(0, value + random.randint(-14, 14))) for value in COLOURS[colour])
    canvas.paste(shade, (round(x - size / 2), round(y - size / 2)), tilted)


def _shape(draw: ImageDraw.ImageDraw, kind: str, size: int) -> None:
    """In a square of ``size``, with a little room to tilt."""
    low, high, middle = 0.08 * size, 0.92 * size, size / 2
    if kind == "circle":
        draw.ellipse((low, low, high, high), fill=255)
    elif kind == "square":
        draw.rectangle((0.14 * size, 0.14 * size, 0.86 * size, 0.86 * size), fill=255)
    elif kind == "triangle":
        draw.polygon([(middle, low), (high, high), (low, high)], fill=255)
    elif kind == "cross":
        arm = 0.13 * size
        draw.rectangle((low, middle - arm, high, middle + arm), fill=255)
        draw.rectangle((middle - arm, low, middle + arm, high), fill=255)
    else:
        points = []
        for corner in range(10):
            radius = (0.46 if corner % 2 == 0 else 0.19) * size
            angle = math.pi * corner / 5 - math.pi / 2
            points.append((middle + radius * math.cos(angle), middle + radius * math.sin(angle)))
        draw.polygon(points, fill=255)
