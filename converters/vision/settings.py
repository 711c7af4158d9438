"""Settings of a vision side, checked."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mopeq_edge.errors import SourceError
from mopeq_edge.source.checkpoint import read_json_object
from mopeq_edge.vision.description import Colour


def check(found: Mapping[str, Any], only: Mapping[str, Any], where: str = "") -> None:
    """Raise :class:`SourceError` for a setting that is not the one that is computed here."""
    for key, value in only.items():
        if found.get(key) != value:
            inside = f" in {where}" if where else ""
            raise SourceError(
                f"config.json has {key} {found.get(key)!r}{inside}, expected {value!r}: no vision side like that is "
                "known here; give --text-only for the GGUF alone"
            )


def part(config: Mapping[str, Any], key: str, assumed: Mapping[str, Any]) -> dict[str, Any]:
    """The object under ``key``, with what is assumed where it says nothing."""
    found = config.get(key)
    if not isinstance(found, Mapping):
        raise SourceError(f"config.json has {key} {found!r}, expected an object; use the config.json of these weights")
    return {**assumed, **found}


def processor_settings(directory: Path, names: Sequence[str]) -> dict[str, Any]:
    """What the first of the files ``names`` that is there says; nothing if there is none."""
    for name in names:
        if (directory / name).is_file():
            return read_json_object(directory / name)
    return {}


def colour(found: Mapping[str, Any], key: str) -> Colour:
    """Three numbers, of red, green and blue."""
    values = found.get(key)
    if (
        not isinstance(values, list)
        or len(values) != 3
        or not all(isinstance(x, (int, float)) and math.isfinite(x) for x in values)
        or (key == "image_std" and not all(values))
    ):
        raise SourceError(
            f"the processor's settings have {key} {values!r}, expected three numbers; download them again"
        )
    return (float(values[0]), float(values[1]), float(values[2]))
