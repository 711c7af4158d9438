"""docs/vision.md names every field of the description, and no other."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from .test_description import CROPPED, TILED

DOCUMENT = Path(__file__).parents[2] / "docs" / "vision.md"


def fields(found: dict[str, Any], path: str = "") -> set[str]:
    names: set[str] = set()
    for key, value in found.items():
        names |= fields(value, f"{path}{key}.") if isinstance(value, dict) else {path + key}
    return names


def test_every_field_is_described() -> None:
    table = DOCUMENT.read_text(encoding="utf-8").partition("## The description")[2].partition("\nThe graph takes")[0]
    named = {name for row in re.findall(r"^\| (`.*?) \|", table, re.M) for name in re.findall(r"`([^`]+)`", row)}
    assert named == fields(json.loads(TILED.text())) | fields(json.loads(CROPPED.text()))
