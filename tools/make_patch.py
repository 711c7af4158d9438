"""Write the difference of two llama.cpp trees as a patch with the least context that places it.

Each hunk gets the fewest context
lines, at most three on a side, that make its old block unique in the old file; neighbours become one hunk only where
they need each other's lines. The patch is applied in memory before it is written: it must give NEW_TREE's files.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from difflib import SequenceMatcher
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import click

from mopeq_edge.atomic import atomic_write
from mopeq_edge.errors import MopeqError, PatchError
from mopeq_edge.llama_cpp.diff import ADDED, CONTEXT, REMOVED, Hunk, parse_patch
from mopeq_edge.llama_cpp.fit import Placement, State, edit, place

MOST_CONTEXT = 3
_CLOSERS = ("}", ")", "]", "#endif")
# (before, after), the fewest lines first, both sides alike where there is a choice
_CONTEXTS = sorted(
    ((before, after) for before in range(MOST_CONTEXT + 1) for after in range(MOST_CONTEXT + 1)),
    key=lambda both: (sum(both), abs(both[0] - both[1]), -both[0]),
)


class Edit(NamedTuple):
    """Lines ``i1:i2`` of the old file become lines ``j1:j2`` of the new one."""

    i1: int
    i2: int
    j1: int
    j2: int


@click.command()
@click.argument("old_tree", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("new_tree", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("out", type=click.Path(dir_okay=False, path_type=Path))
@click.argument("paths", nargs=-1, metavar="[PATH]...")
def main(old_tree: Path, new_tree: Path, out: Path, paths: tuple[str, ...]) -> None:
    """Write what turns OLD_TREE into NEW_TREE as the patch OUT.

    PATH is a file or folder below both trees; without any, all that differs is taken.
    """
    try:
        text, doubtful = make_patch(old_tree, new_tree, paths)
        with atomic_write(out) as file:
            file.write(text.encode())
    except MopeqError as error:
        raise click.ClickException(str(error)) from error
    for name in doubtful:
        click.echo(f"{name}: not unique with {MOST_CONTEXT} lines of context, only its line number places it", err=True)


def make_patch(old: Path, new: Path, paths: Sequence[str] = ()) -> tuple[str, list[str]]:
    """The patch, and the names of the hunks that only their line number places.

    Raises PatchError for a file that a patch cannot hold, and if nothing differs.
    """
    parts: list[str] = []
    doubtful: list[str] = []
    for path in sorted(_files(old, new, paths)):
        before, after = _read(old / path), _read(new / path)
        if before == after:
            continue
        if after is None:
            raise PatchError(f"{path}: is only in {old}; a patch that deletes a file is not supported")
        if before is None:
            lines = _text(new / path).split("\n")[:-1]
            hunk = Hunk("", 1, 0, 1, tuple((ADDED, line) for line in lines))
            parts.append(f"--- /dev/null\n+++ b/{path}\n{_shown(hunk)}")
            continue
        hunks, unsure = file_hunks(_text(old / path), _text(new / path))
        doubtful += [f"{path} hunk {number}" for number in unsure]
        parts.append(f"--- a/{path}\n+++ b/{path}\n{''.join(_shown(hunk) for hunk in hunks)}")
    if not parts:
        raise PatchError(f"{new}: does not differ from {old} in what was named; nothing to write")
    text = "".join(parts)
    _check(text, old, new)
    return text, doubtful


def file_hunks(before: str, after: str) -> tuple[list[Hunk], list[int]]:
    """The hunks that turn ``before`` into ``after``, and the numbers of those that are not unique."""
    old, new = before.split("\n")[:-1], after.split("\n")[:-1]
    codes = SequenceMatcher(None, old, new, autojunk=False).get_opcodes()
    groups = [[Edit(*lines)] for tag, *lines in codes if tag != "equal"]
    hunks: list[Hunk] = []
    while len(hunks) < len(groups):
        at = len(hunks)
        above = hunks[-1].start - 1 + len(hunks[-1].old) if hunks else 0
        below = groups[at + 1][0].i1 if at + 1 < len(groups) else len(old)
        wanted = [(group, _room(group, above, below)) for group in _placings(groups[at], above, below, new)]
        choices = (
            _hunk(group, *context, at + 1, old, new)
            for group, room in wanted
            for context in _CONTEXTS
            if context[0] <= room[0] and context[1] <= room[1]
        )
        found = next((hunk for hunk in choices if _places_itself(hunk, before, after)), None)
        best, room = wanted[0]
        if found is None and room[0] < MOST_CONTEXT and hunks:
            hunks.pop()
            groups[at - 1 : at + 1] = [groups[at - 1] + best]
            continue
        if found is None and room[1] < MOST_CONTEXT and at + 1 < len(groups):
            groups[at : at + 2] = [best + groups[at + 1]]
            continue
        hunks.append(found or _hunk(best, *room, at + 1, old, new))
    return hunks, [hunk.number for hunk in hunks if not _places_itself(hunk, before, after)]


def _room(group: Sequence[Edit], above: int, below: int) -> tuple[int, int]:
    return min(MOST_CONTEXT, group[0].i1 - above), min(MOST_CONTEXT, below - group[-1].i2)


def _placings(group: list[Edit], above: int, below: int, new: Sequence[str]) -> list[list[Edit]]:
    """The same insertion wherever it can stand; where it is a whole block, and so reads best, comes first."""
    one = group[0]
    if len(group) > 1 or one.i1 != one.i2:
        return [group]
    places = [one]
    at = one
    while at.i1 > above and new[at.j1 - 1] == new[at.j2 - 1]:
        at = Edit(at.i1 - 1, at.i2 - 1, at.j1 - 1, at.j2 - 1)
        places.append(at)
    at = one
    while at.i1 < below and new[at.j1] == new[at.j2]:
        at = Edit(at.i1 + 1, at.i2 + 1, at.j1 + 1, at.j2 + 1)
        places.append(at)

    def cost(place: Edit) -> tuple[bool, bool, int, int]:
        first = new[place.j1]
        after_blank = place.j1 == 0 or not new[place.j1 - 1].strip()
        begins_badly = not first.strip() or first.strip().startswith(_CLOSERS)
        return begins_badly, not after_blank, len(first) - len(first.lstrip()), place.i1

    return [[place] for place in sorted(places, key=cost)]


def _hunk(group: Sequence[Edit], before: int, after: int, number: int, old: Sequence[str], new: Sequence[str]) -> Hunk:
    start = group[0].i1 - before
    lines: list[tuple[str, str]] = []
    at = start
    for one in group:
        lines += [(CONTEXT, text) for text in old[at : one.i1]]
        lines += [(REMOVED, text) for text in old[one.i1 : one.i2]]
        lines += [(ADDED, text) for text in new[one.j1 : one.j2]]
        at = one.i2
    lines += [(CONTEXT, text) for text in old[at : at + after]]
    return Hunk("", number, start + 1, group[0].j1 - before + 1, tuple(lines))


def _places_itself(hunk: Hunk, before: str, after: str) -> bool:
    """Whether the hunk is found in the old file without its line number, and seen to be done in the new one."""
    if not hunk.old or not hunk.new:
        return False
    without = replace(hunk, start=0, new_start=0)
    return place([without], before)[0].state is State.FITS and place([without], after)[0].state is State.DONE


def _shown(hunk: Hunk) -> str:
    old, new = len(hunk.old), len(hunk.new)
    lines = "".join(f"{sign}{text}\n" for sign, text in hunk.lines)
    return f"@@ -{hunk.start},{old} +{hunk.new_start},{new} @@\n{lines}"


def _check(text: str, old: Path, new: Path) -> None:
    for file in parse_patch("the new patch", text.encode()):
        before = "" if file.creates else _text(old / file.path)
        placed = [Placement(file.hunks[0], State.FITS, 0)] if file.creates else place(file.hunks, before)
        wrong = any(found.state is not State.FITS for found in placed)
        if wrong or edit(before, placed) != _text(new / file.path):
            raise PatchError(
                f"{file.path}: the lines around a change are too alike to place it; put a line there that is unique"
            )


def _files(old: Path, new: Path, paths: Sequence[str]) -> set[PurePosixPath]:
    found: set[PurePosixPath] = set()
    for name in paths or [""]:
        here: set[PurePosixPath] = set()
        for root in (old, new):
            at = root / name
            files = at.rglob("*") if at.is_dir() else [at]
            here |= {PurePosixPath(path.relative_to(root).as_posix()) for path in files if path.is_file()}
        if not here:
            raise PatchError(f"{name}: is neither in {old} nor in {new}; give paths below the trees")
        found |= {path for path in here if ".git" not in path.parts}
    return found


def _read(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None


def _text(path: Path) -> str:
    try:
        text = path.read_bytes().decode()
    except UnicodeDecodeError:
        text = ""
    if not text.endswith("\n") or "\r" in text:
        raise PatchError(f"{path}: expected UTF-8 with a newline at each line's end and no carriage return")
    return text


if __name__ == "__main__":
    main()
