"""What a vision file says of itself, so that the device needs nothing else: JSON in the metadata of the ONNX file.

The key is :data:`KEY`; docs/vision.md describes every field. Version :data:`VERSION` is the one that is known here.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mopeq_edge.errors import FormatError, shown
from mopeq_edge.json_file import is_count, is_number, parse_json
from mopeq_edge.split import whole_name

KEY, FORMAT, VERSION = "mopeq.vision", "mopeq-edge vision", 1
ENDING, WEIGHTS_ENDING = ".vision.onnx", ".data"

STAMP = 64
"""Bytes at the end of the file with the weights that say what it was made from."""

MAX_SIDE, MAX_WIDTH = 2**12, 2**16
"""Pixels of a tile's side, numbers of an embedding."""
MAX_TILES, MAX_PIXELS = 64, 2**24
"""Tiles of a picture, the whole among them, and pixels of all of them: released models have 13 and 1.5 million."""
MAX_CANDIDATES = 2**10
MAX_TEXT = 2**16
"""Characters of a prompt's part."""
TILES, CROPS = "tiles", "crops"
TYPES = ("F32", "F16", "INT8")

Colour = tuple[float, float, float]


@dataclass(frozen=True)
class Tiles:
    """DeepSeek-VL2: the whole picture in one tile, then the picture in the tiles of the candidate that fits best."""

    side: int
    """Pixels of a tile's side."""
    rows: int
    """Tokens of a tile's side."""
    candidates: tuple[tuple[int, int], ...]
    """Width and height in pixels that a picture may be cut into, of equal ones the first."""
    most_tiled: int
    """With more pictures than this each is one tile."""
    whole_first: bool
    mean: Colour
    std: Colour


@dataclass(frozen=True)
class Crops:
    """Molmo: the whole picture in one crop, then crops of it that overlap."""

    side: int
    """Pixels of a crop's side."""
    patch: int
    """Pixels of a patch's side."""
    most: int
    """Crops of a picture, without the whole."""
    margins: tuple[int, int]
    """Patches on the left (top) and on the right (bottom) of a crop that its neighbour has too."""
    mean: Colour
    std: Colour


@dataclass(frozen=True)
class Prompt:
    """How a question becomes what the model was trained to read."""

    before: str
    after: str
    """Text before and behind the question."""
    mark: str
    """Text that stands for a picture in a question; empty: pictures come before everything but the first token."""
    own: str
    """Put before the question for each picture if the question has no ``mark``."""


@dataclass(frozen=True)
class Description:
    """One vision file."""

    kind: str
    """:data:`TILES` or :data:`CROPS`."""
    n_embd: int
    """Width of an embedding: the text model's."""
    layout: Tiles | Crops
    prompt: Prompt
    weights_type: str
    weights_bytes: int
    """Bytes of the file beside the graph."""
    relative_error: float
    """‖e − e₃₂‖ / ‖e₃₂‖ of the embeddings of a fixed picture; 0 for F32."""
    made_from: str
    """Hash of the checkpoint and the options; the last 64 bytes of the file beside the graph are this too."""

    def text(self) -> str:
        """As JSON; the same description gives the same text."""
        return json.dumps({"format": FORMAT, "version": VERSION, **asdict(self)}, sort_keys=True)


def vision_beside(gguf: Path) -> Path:
    """Where ``convert`` puts the vision file of ``gguf``; of a split one the name before it was split."""
    return gguf.with_name(whole_name(gguf).removesuffix(".gguf") + ENDING)


def weights_file(path: Path) -> Path:
    """The file with the weights of the graph ``path``; the graph knows it by this name."""
    return path.with_name(path.name + WEIGHTS_ENDING)


def read_description(text: str | None, where: str) -> Description:
    """The description in ``text``. Raises :class:`FormatError`, which names ``where`` it was found."""
    if text is None:
        raise FormatError(
            f"{where}: has no '{KEY}' in its metadata; expected a vision file that mopeq-edge convert wrote"
        )
    try:
        found = parse_json(text.encode("utf-8", "surrogatepass"))
    except ValueError as error:
        raise FormatError(f"{where}: '{KEY}' is not JSON ({error}); convert the checkpoint again") from None
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise FormatError(f"{where}: '{KEY}' is no '{FORMAT}'; convert the checkpoint again")
    if found.get("version") != VERSION:
        raise FormatError(
            f"{where}: '{KEY}' has version {shown(found.get('version'))}, expected {VERSION}; use the mopeq-edge that "
            "wrote it"
        )
    read = _Reader(found, where)
    kind = read.get("kind", lambda x: x in (TILES, CROPS))
    layout, prompt = read.inner("layout"), read.inner("prompt")
    described: Tiles | Crops
    if kind == TILES:
        described = Tiles(
            side=layout.get("side", _is_side),
            rows=layout.get("rows", _is_side),
            candidates=layout.pairs("candidates"),
            most_tiled=layout.get("most_tiled", is_count),
            whole_first=layout.get("whole_first", lambda x: isinstance(x, bool)),
            mean=layout.colour("mean"),
            std=layout.colour("std"),
        )
        if any(size % described.side for pair in described.candidates for size in pair):
            raise layout.wrong("candidates")
        n_tiles = 1 + max(width * height for width, height in described.candidates) // described.side**2
    else:
        margins = layout.get("margins", lambda x: _is_list(x, is_count, 2))
        described = Crops(
            side=layout.get("side", _is_side),
            patch=layout.get("patch", _is_side),
            most=layout.get("most", lambda x: is_count(x, MAX_TILES) and x > 0),
            margins=(margins[0], margins[1]),
            mean=layout.colour("mean"),
            std=layout.colour("std"),
        )
        if described.side % described.patch:
            raise layout.wrong("patch")
        n_side, left = described.side // described.patch, described.margins[0]
        # four patches are one token
        if n_side <= sum(described.margins) or left % 2 or n_side % 2:
            raise layout.wrong("margins")
        n_tiles = 1 + described.most
    if n_tiles > MAX_TILES or n_tiles * described.side**2 > MAX_PIXELS:
        raise FormatError(
            f"{where}: '{KEY}' makes {n_tiles} pictures of {described.side} × {described.side} pixels of one, at most "
            f"{MAX_TILES} with {MAX_PIXELS} together are made; convert the checkpoint again"
        )
    return Description(
        kind=kind,
        n_embd=read.get("n_embd", lambda x: is_count(x, MAX_WIDTH) and x > 0),
        layout=described,
        prompt=Prompt(*(prompt.get(name, _is_text) for name in ("before", "after", "mark", "own"))),
        weights_type=read.get("weights_type", lambda x: x in TYPES),
        weights_bytes=read.get("weights_bytes", lambda x: is_count(x) and x >= STAMP),
        relative_error=read.get("relative_error", lambda x: is_number(x) and 0 <= x <= 1e9),
        made_from=read.get("made_from", lambda x: isinstance(x, str) and len(x) == STAMP and set(x) <= _HEX),
    )


class _Reader:
    """Values of one JSON object, checked."""

    def __init__(self, found: Mapping[str, Any], where: str, path: str = "") -> None:
        self._found, self._where, self._path = found, where, path

    def wrong(self, key: str) -> FormatError:
        said = json.dumps(self._found.get(key))
        said = said if len(said) < 60 else f"{said[:57]}..."
        return FormatError(f"{self._where}: '{KEY}' has {self._path}{key} {said}; convert the checkpoint again")

    def get(self, key: str, holds: Callable[[Any], bool]) -> Any:
        if not holds(self._found.get(key)):
            raise self.wrong(key)
        return self._found[key]

    def inner(self, key: str) -> _Reader:
        return _Reader(self.get(key, lambda x: isinstance(x, dict)), self._where, f"{key}.")

    def colour(self, key: str) -> Colour:
        # what pixels are divided by must not be near 0
        values = self.get(key, lambda x: _is_list(x, _is_colour, 3) and (key == "mean" or all(map(_divides, x))))
        return (float(values[0]), float(values[1]), float(values[2]))

    def pairs(self, key: str) -> tuple[tuple[int, int], ...]:
        values = self.get(
            key,
            lambda x: isinstance(x, list) and 0 < len(x) <= MAX_CANDIDATES and all(_is_list(y, _is_size, 2) for y in x),
        )
        return tuple((width, height) for width, height in values)


_HEX = frozenset("0123456789abcdef")


def _is_text(value: Any) -> bool:
    # what is no character cannot be given to a tokenizer
    return isinstance(value, str) and len(value) <= MAX_TEXT and not any("\ud800" <= c <= "\udfff" for c in value)


def _is_side(value: Any) -> bool:
    return is_count(value, MAX_SIDE) and value > 0


def _is_size(value: Any) -> bool:
    return is_count(value, MAX_SIDE * MAX_TILES) and value > 0


def _is_colour(value: Any) -> bool:
    return is_number(value) and abs(value) <= 1e3


def _divides(value: float) -> bool:
    return abs(value) >= 1e-3


def _is_list(value: Any, each: Callable[[Any], bool], length: int) -> bool:
    return isinstance(value, list) and len(value) == length and all(each(x) for x in value)
