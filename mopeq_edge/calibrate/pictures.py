"""A folder of pictures and captions as windows: what each picture became is kept on disk until it is read. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from mopeq_edge.array_file import read_arrays, refusing, write_arrays
from mopeq_edge.binding import Floats, LlamaModel
from mopeq_edge.calibrate.windows import PICTURE, Window
from mopeq_edge.errors import CalibrationError
from mopeq_edge.evaluate.chunks import read_text
from mopeq_edge.gguf_file import read_header
from mopeq_edge.vision.crops import crop
from mopeq_edge.vision.description import Crops, Description, Tiles
from mopeq_edge.vision.image_file import open_image
from mopeq_edge.vision.prompt import lay_out
from mopeq_edge.vision.tiles import cut

FORMAT, VERSION = "mopeq-edge picture", "1"

QUESTION = "Describe this image."
"""What is asked about every picture."""

ENDINGS = (
    *(".bmp", ".dib", ".gif", ".jpeg", ".jpg", ".jfif", ".pbm", ".pgm", ".png", ".pnm", ".ppm"),
    *(".tif", ".tiff", ".webp"),
)
"""Of the names of pictures, in small letters."""


@dataclass(frozen=True)
class Picture:
    """One picture; ``caption`` is what a person says of it, empty if nothing does."""

    path: Path
    caption: str


def pictures_of(directory: Path, most: int, layout: Tiles | Crops) -> list[Picture]:
    """The first ``most`` pictures of ``directory`` by name, each with the text of NAME.txt beside it.

    All of them are opened and cut, so that one that cannot be seen is known before hours of work. Raises
    :class:`MopeqError`, in one line, for that, and for a folder without pictures.
    """
    if not directory.is_dir():
        raise CalibrationError(f"{directory}: expected a folder of pictures, found none; give --images DIR")
    files = sorted(path for path in directory.iterdir() if path.is_file())
    paths = [path for path in files if path.suffix.lower() in ENDINGS][:most]
    if not paths:
        raise CalibrationError(
            f"{directory}: expected pictures ({', '.join(ENDINGS)}), found {len(files)} other files; give a folder of "
            "pictures, or leave out --images"
        )
    found = []
    for path in paths:
        _check(path, layout)
        beside = path.with_suffix(".txt")
        found.append(Picture(path, read_text(beside).strip() if beside.is_file() else ""))
    return found


def _check(path: Path, layout: Tiles | Crops) -> None:
    image, name = open_image(path), str(path)
    if isinstance(layout, Tiles):
        cut(image, layout, 1, name)
    else:
        crop(image, layout, name)


def write_picture(embeddings: Floats, path: Path, made_from: str) -> None:
    """Keep ``embeddings`` [n_tokens, n_embd]; ``made_from`` is the hash of picture and tower."""
    write_arrays(path, FORMAT, VERSION, {"made_from": made_from}, {"embeddings": embeddings})


def read_picture(path: Path) -> Floats:
    """Read what :func:`write_picture` wrote. Raises :class:`FormatError` for anything else."""
    again = f"remove {path.parent} and calibrate again"
    _, arrays = read_arrays(path, FORMAT, VERSION, again)
    with refusing(path, FORMAT, again):
        found: Any = arrays["embeddings"]
        if found.ndim != 2 or found.dtype != np.float32:
            raise ValueError(f"embeddings of {found.dtype} in {found.ndim} axes")
    seen: Floats = found
    return seen


def picture_windows(
    model: LlamaModel, description: Description, pictures: Sequence[Picture], kept: Sequence[Path], most_tokens: int
) -> list[Window]:
    """A window for each picture: the prompt as the device lays it out, then the caption and the token that ends a text.

    ``kept`` are the files of :func:`write_picture`; of a caption there are ``most_tokens`` at most.
    """
    end = read_header(model.path).get("tokenizer.ggml.eos_token_id")
    found = []
    for picture, path in zip(pictures, kept, strict=True):
        parts = [
            part if part.ndim == 1 else np.full(len(part), PICTURE, np.int32)
            for part in lay_out(model, description, QUESTION, [read_picture(path)])
        ]
        if picture.caption:
            parts.append(model.tokenize(f" {picture.caption}")[:most_tokens])
            parts += [np.array([end], np.int32)] if isinstance(end, int) else []
        found.append(Window(np.concatenate(parts).astype(np.int32), partial(read_picture, path)))
    return found
