"""Place hunks in a file, or say why they do not fit.

A hunk fits where its old block is, if that is the only place; with several places the hunk's own line number decides,
and only if the block is exactly there. So a hunk that needs a judgement is refused. Line ends are not compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from mopeq_edge.llama_cpp.diff import ADDED, CONTEXT, Hunk


class State(Enum):
    """What became of one hunk; the value says it to the user."""

    FITS = "fits"
    DONE = "is there already"
    MISSING = "is nowhere"
    NO_FILE = "belongs into a file that is not there"
    AMBIGUOUS = "is in several places"
    OVERLAPS = "is where another hunk is"
    OTHER_TEXT = "should begin a file that has another text"


@dataclass(frozen=True)
class Placement:
    """A hunk and, if it fits, the line (from 0) where its old block starts."""

    hunk: Hunk
    state: State
    at: int = -1


def split_lines(text: str) -> list[str]:
    """Lines with their ends; only a newline ends a line, as in a diff."""
    parts = text.split("\n")
    return [f"{part}\n" for part in parts[:-1]] + ([parts[-1]] if parts[-1] else [])


def place(hunks: Sequence[Hunk], text: str) -> tuple[Placement, ...]:
    """Where each hunk goes in ``text``. Hunks that fit do not overlap."""
    lines = [_bare(line) for line in split_lines(text)]
    placed = [_place(hunk, lines) for hunk in hunks]
    taken: set[int] = set()
    for number, found in enumerate(placed):
        if found.state is not State.FITS:
            continue
        block = range(found.at, found.at + len(found.hunk.old))
        if not taken.isdisjoint(block):
            placed[number] = Placement(found.hunk, State.OVERLAPS)
        taken.update(block)
    return tuple(placed)


def edit(text: str, placements: Sequence[Placement]) -> str:
    """``text`` with every placed hunk done. All must fit. New lines end as most lines of ``text`` do."""
    lines = split_lines(text)
    crlf = sum(1 for line in lines if line.endswith("\r\n"))
    end = "\r\n" if 2 * crlf > len(lines) else "\n"
    whole = text.endswith("\n") or not lines
    if not whole:
        lines[-1] += end
    for found in sorted(placements, key=lambda found: found.at, reverse=True):
        at = found.at
        block: list[str] = []
        for sign, content in found.hunk.lines:
            if sign == ADDED:
                block.append(content + end)
                continue
            if sign == CONTEXT:
                block.append(lines[at])
            at += 1
        lines[found.at : at] = block
    result = "".join(lines)
    return result if whole else result.removesuffix("\n").removesuffix("\r")


def _place(hunk: Hunk, lines: Sequence[str]) -> Placement:
    old, new = _starts(hunk.old, lines), _starts(hunk.new, lines)
    # An insertion leaves its old block in place, so there only the new block tells.
    if new and (not old or _starts(hunk.old, hunk.new)):
        return Placement(hunk, State.DONE)
    if not old:
        return Placement(hunk, State.MISSING)
    if len(old) == 1:
        return Placement(hunk, State.FITS, old[0])
    if hunk.start - 1 in old:
        return Placement(hunk, State.FITS, hunk.start - 1)
    return Placement(hunk, State.AMBIGUOUS)


def _starts(block: Sequence[str], lines: Sequence[str]) -> list[int]:
    n = len(block)
    wanted = list(block)
    return [at for at in range(len(lines) - n + 1) if lines[at] == wanted[0] and list(lines[at : at + n]) == wanted]


def _bare(line: str) -> str:
    return line.rstrip("\r\n")
