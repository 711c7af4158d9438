"""README.md of a checkpoint, before the ``gguf`` package reads the YAML at its top.

YAML has aliases: ten lines, each of which names the one before nine times, are a list of 9^10 entries, which the
package writes out. Model cards have none, and are short.
"""

from __future__ import annotations

from pathlib import Path

import yaml

from mopeq_edge.errors import FormatError, SourceError
from mopeq_edge.regular_file import read_whole

FILE = "README.md"
MAX_CARD, MAX_FRONT_MATTER = 2**24, 2**18
"""Bytes of the file, and characters of the YAML at its top."""

_INSTEAD = f"download {FILE} again or remove it"


def check_model_card(directory: Path) -> None:
    """Raise :class:`SourceError` for a model card that could become larger than it is when it is read."""
    path = directory / FILE
    if not path.is_file():
        return
    try:
        text = read_whole(path, MAX_CARD).decode("utf-8")
    except (OSError, FormatError, UnicodeDecodeError) as error:
        raise SourceError(f"{path}: cannot be read as a model card ({error}); {_INSTEAD}") from None
    lines = text.splitlines()
    if not lines or lines[0] != "---":
        return
    end = lines.index("---", 1) if "---" in lines[1:] else len(lines)
    top = "\n".join(lines[1:end])
    if len(top) > MAX_FRONT_MATTER:
        raise SourceError(
            f"{path}: its YAML has {len(top)} characters, expected at most {MAX_FRONT_MATTER}; {_INSTEAD}"
        )
    try:
        # only told apart, nothing is built; what is no YAML is for the package to say
        alias = next((token for token in yaml.scan(top) if isinstance(token, yaml.AliasToken)), None)
    except yaml.YAMLError:
        alias = None
    if alias is not None:
        raise SourceError(f"{path}: its YAML has the alias '*{alias.value}', expected plain values; {_INSTEAD}")
