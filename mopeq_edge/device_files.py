"""Files that a device loads beside the GGUF: what sees pictures. Their bytes come out of the same budget."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from mopeq_edge.errors import SourceError
from mopeq_edge.gguf_file import MAGIC
from mopeq_edge.split import read_parts
from mopeq_edge.vision.description import ENDING, WEIGHTS_ENDING


@dataclass(frozen=True)
class DeviceFile:
    """One file by its name, and its bytes: found, or predicted to the byte."""

    name: str
    nbytes: int


def total_bytes(files: Iterable[DeviceFile]) -> int:
    """Of all ``files``."""
    return sum(file.nbytes for file in files)


def device_files(path: Path) -> tuple[DeviceFile, ...]:
    """``path`` with the files that belong to it: weights of a vision file, further parts of a split GGUF.

    Raises :class:`MopeqError` if one is missing.
    """
    if not path.is_file():
        raise SourceError(f"{path}: expected a file that the device loads beside the GGUF, found none; check --beside")
    with path.open("rb") as file:
        if file.read(len(MAGIC)) == MAGIC:
            return tuple(DeviceFile(header.path.name, header.file_size) for header in read_parts(path))
    paths = [path]
    if path.name.endswith(ENDING):
        paths.append(path.with_name(path.name + WEIGHTS_ENDING))
        if not paths[1].is_file():
            raise SourceError(f"{path}: its weights, {paths[1].name}, are not beside it; move or copy both together")
    return tuple(DeviceFile(found.name, found.stat().st_size) for found in paths)
