"""Read unified diffs into hunks. Parsing is done by unidiff; here is what we accept of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import PurePosixPath

from unidiff.constants import DEV_NULL
from unidiff.errors import UnidiffParseError
from unidiff.patch import PatchedFile, PatchSet

from mopeq_edge.errors import PatchError
from mopeq_edge.llama_cpp.bundle import patch_files

CONTEXT, REMOVED, ADDED = " ", "-", "+"
_METADATA = ("diff --git ", "index ", "new file mode ")


@dataclass(frozen=True)
class Hunk:
    """One change: ``lines`` are (sign, text without its line end), signs as in the diff.

    ``patch`` and ``number``, from 1 in its file, name it. ``start`` is the line, from 1, where the old block stands in
    the llama.cpp that the patch was made from, ``new_start`` where the new block stands afterwards.
    """

    patch: str
    number: int
    start: int
    new_start: int
    lines: tuple[tuple[str, str], ...]

    @property
    def old(self) -> tuple[str, ...]:
        """The lines that must be there: context and removed ones."""
        return tuple(text for sign, text in self.lines if sign != ADDED)

    @property
    def new(self) -> tuple[str, ...]:
        """The lines that are there afterwards: context and added ones."""
        return tuple(text for sign, text in self.lines if sign != REMOVED)

    def count(self, sign: str) -> int:
        return sum(1 for found, _ in self.lines if found == sign)

    def inverted(self) -> Hunk:
        """The hunk that undoes this one."""
        flip = {CONTEXT: CONTEXT, REMOVED: ADDED, ADDED: REMOVED}
        lines = tuple((flip[sign], text) for sign, text in self.lines)
        return replace(self, start=self.new_start, new_start=self.start, lines=lines)


@dataclass(frozen=True)
class FilePatch:
    """All hunks of one file; ``path`` is below llama.cpp's root. A created or deleted file has one hunk, its text."""

    path: PurePosixPath
    hunks: tuple[Hunk, ...]
    creates: bool = False
    deletes: bool = False

    def inverted(self) -> FilePatch:
        """The patch that undoes this one."""
        return FilePatch(self.path, tuple(hunk.inverted() for hunk in self.hunks), self.deletes, self.creates)


def load_patches() -> tuple[FilePatch, ...]:
    """What this package carries. Raises PatchError for a patch that `parse_patch` refuses."""
    return parse_patches(patch_files())


def parse_patches(patches: Mapping[str, bytes]) -> tuple[FilePatch, ...]:
    """Diffs against one and the same tree, by name; several may change the same file, in different places.

    Raises PatchError as `parse_patch` does, or if a file that one patch creates is in another one too.
    """
    merged: dict[PurePosixPath, FilePatch] = {}
    for name, content in patches.items():
        for found in parse_patch(name, content):
            known = merged.get(found.path)
            if known is None:
                merged[found.path] = found
            elif known.creates or found.creates:
                raise PatchError(f"{name}: {found.path} is a new file, but it is in another patch or twice in this one")
            else:
                merged[found.path] = replace(known, hunks=(*known.hunks, *found.hunks))
    return tuple(merged.values())


def parse_patch(name: str, content: bytes) -> tuple[FilePatch, ...]:
    """The files that the unified diff ``content`` changes or creates, in its order.

    Raises PatchError if it is no UTF-8 diff, loses lines, deletes or renames a file, leaves the tree, or needs a file
    that does not end with a newline.
    """
    try:
        text = content.decode("utf-8").replace("\r\n", "\n")
        parsed = PatchSet(text)
    except (UnicodeDecodeError, UnidiffParseError) as error:
        raise PatchError(f"{name}: not a unified diff: {' '.join(str(error).split())}") from error
    found = tuple(_file_patch(name, patched) for patched in parsed)
    _check_nothing_lost(name, text.split("\n"), found)
    return found


def _file_patch(name: str, patched: PatchedFile) -> FilePatch:
    old, new = patched.source_file, patched.target_file
    creates = old == DEV_NULL
    path = PurePosixPath(new.removeprefix("b/"))
    expected = (DEV_NULL if creates else f"a/{path}", f"b/{path}")
    if (old, new) != expected or path.is_absolute() or ".." in path.parts or not patched:
        raise PatchError(
            f"{name}: expected a file that is changed or created, with hunks, as --- a/PATH or /dev/null and "
            f"+++ b/PATH, found {old} and {new}"
        )
    hunks = []
    for number, hunk in enumerate(patched, 1):
        if any(line.line_type == "\\" for line in hunk):
            raise PatchError(f"{name}: {path} hunk {number}: a file without a newline at its end is not supported")
        lines = tuple(
            (line.line_type, line.value.removesuffix("\n"))
            for line in hunk
            if line.line_type in (CONTEXT, REMOVED, ADDED)
        )
        hunks.append(Hunk(name, number, hunk.source_start, hunk.target_start, lines))
    sound = len(hunks) == 1 and not hunks[0].old if creates else all(hunk.old and hunk.new for hunk in hunks)
    if not sound:
        raise PatchError(
            f"{name}: {path}: expected at least one line before and after each change, so that it can be found and "
            "undone, and only added lines in a file that is created"
        )
    return FilePatch(path, tuple(hunks), creates)


def _check_nothing_lost(name: str, lines: list[str], found: Iterable[FilePatch]) -> None:
    """unidiff takes what follows a complete hunk for prose, so a wrong count in a hunk's head would drop lines."""
    first = next((number for number, line in enumerate(lines) if line.startswith("--- ")), len(lines))
    # A blank line can be context or stand between hunks.
    given = sum(1 for line in lines[first:] if line.strip(" ") and not line.startswith(_METADATA))
    read = sum(
        2 + sum(1 + sum(1 for sign, text in hunk.lines if (sign + text).strip(" ")) for hunk in file.hunks)
        for file in found
    )
    if read == 0 or given != read:
        raise PatchError(
            f"{name}: expected changed files and their hunks and nothing after them, found {given} lines where the "
            f"heads of the hunks tell of {read}"
        )
