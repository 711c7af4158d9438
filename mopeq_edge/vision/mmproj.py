"""llama.cpp's own file of what sees pictures: ``mmproj-out.gguf`` beside ``out.gguf``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from mopeq_edge.errors import FormatError
from mopeq_edge.gguf_file import GGUFHeader, read_header
from mopeq_edge.split import whole_name

PREFIX = "mmproj-"
"""What tools look for: LM Studio and llama.cpp's downloads know the file by it."""
ARCHITECTURE, FILE_KIND = "clip", "mmproj"
MADE_FROM_KEY = "mopeq.made_from"
"""Hash of the checkpoint and the options."""

TYPES: Mapping[str, str] = {"F16": "f16", "F32": "f32", "BF16": "bf16", "Q8_0": "q8_0"}
"""Types of the matrices, and llama.cpp's names of them as an option of its script."""


def mmproj_beside(gguf: Path) -> Path:
    """Where ``convert`` puts the mmproj of ``gguf``; of a split one by the name before it was split."""
    return gguf.with_name(PREFIX + whole_name(gguf))


def is_mmproj(header: GGUFHeader) -> bool:
    """Whether this is no model but what sees (or hears) for one."""
    kind: object = header.get("general.type")
    architecture: object = header.get("general.architecture")
    return kind == FILE_KIND or architecture == ARCHITECTURE


def mmproj_made_from(path: Path) -> str | None:
    """What the mmproj ``path`` was made from; None for one of another tool, or what is none."""
    try:
        header = read_header(path)
    except FormatError:
        return None
    found = header.get(MADE_FROM_KEY)
    return found if is_mmproj(header) and isinstance(found, str) else None
