"""The commands in the documentation: where they stand, and what this repository has of what they name."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]

_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Line:
    """One command line of a block of code; ``language`` is the block's, empty where it has none."""

    page: str
    language: str
    text: str

    @property
    def words(self) -> list[str]:
        """The words of its first command, without a comment."""
        first = re.split(r" (?:&&|\|\||\||;|>|2>) ", self.text)[0]
        return shlex.split(first, comments=True)

    def __str__(self) -> str:
        return f"{self.page}: {self.text}"


def pages() -> list[Path]:
    """Every page that is written by hand: README and docs/."""
    return [ROOT / "README.md", *sorted(p for p in (ROOT / "docs").glob("*.md") if p.name != "cli.md")]


def lines(page: Path) -> Iterator[Line]:
    """The command lines of ``page``, those that go on behind a backslash as one."""
    for language, body in _BLOCK.findall(page.read_text(encoding="utf-8")):
        for text in body.replace("\\\n", " ").splitlines():
            if text.strip() and not text.lstrip().startswith("#"):
                yield Line(page.name, language, re.sub(r"\s{2,}", " ", text.strip()))
