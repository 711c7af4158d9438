"""JSON artifacts: a format name, a version, sorted keys and no timestamps, so equal input gives equal bytes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mopeq_edge.atomic import atomic_write
from mopeq_edge.errors import FormatError, shown
from mopeq_edge.json_file import load_json


def digest(value: Any) -> str:
    """SHA-256 in hex of ``value`` as canonical JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def file_digest(path: Path, on_bytes: Callable[[float], None] = lambda _: None) -> str:
    """SHA-256 in hex of a file's bytes; ``on_bytes`` hears how many were read."""
    hasher = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(2**22):
            hasher.update(chunk)
            on_bytes(len(chunk))
    return hasher.hexdigest()


def write_json(path: Path, format_name: str, version: int, body: Mapping[str, Any], table: str | None = None) -> None:
    """Write ``body`` under its format and version; each item of the list called ``table`` is on a line.

    With a line for every number a long list takes ten times as long.
    """
    document = {"format": format_name, "version": version, **body}
    rows = document[table] if table is not None else []
    text = json.dumps({**document, **({table: []} if rows else {})}, sort_keys=True, indent=1)
    if rows:
        lines = ",\n".join("  " + json.dumps(row, sort_keys=True) for row in rows)
        # no text has a line break in it, and only keys of the document itself are indented by one
        text = text.replace(f'\n "{table}": []', f'\n "{table}": [\n{lines}\n ]')
    with atomic_write(path) as file:
        file.write((text + "\n").encode())


def read_json(path: Path, format_name: str, version: int) -> dict[str, Any]:
    """Read what :func:`write_json` wrote. Raises :class:`FormatError` for another format or version."""
    try:
        document = load_json(path)
    except (OSError, ValueError) as error:
        raise FormatError(f"{path}: cannot be read as JSON ({error}); make it again") from None
    found = (document.get("format"), document.get("version")) if isinstance(document, dict) else None
    if found != (format_name, version):
        raise FormatError(f"{path}: expected '{format_name}' version {version}, found {shown(found)}; make it again")
    return dict(document)
