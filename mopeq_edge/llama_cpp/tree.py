"""Put the patches into a llama.cpp source tree, or take them out again: all of them or nothing."""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from mopeq_edge.atomic import atomic_path
from mopeq_edge.errors import MopeqError, OutputError, PatchError
from mopeq_edge.llama_cpp.diff import ADDED, REMOVED, FilePatch, Hunk, load_patches
from mopeq_edge.llama_cpp.fit import Placement, State, edit, place, split_lines
from mopeq_edge.runtime.locate import BINDING, pinned_version

_PROJECT = re.compile(r"^\s*project\s*\(\s*\"?llama\.cpp\"?[\s)]", re.MULTILINE)
_WITNESS = "src/llama-graph.cpp"


@dataclass(frozen=True)
class FileChange:
    """One file of the tree: its text before and after, None where there is no file."""

    path: Path
    before: bytes | None
    after: bytes | None
    added: int
    removed: int


@dataclass(frozen=True)
class Result:
    """What was done, or with ``check`` what would be; no changes if the tree was in that state already."""

    changes: tuple[FileChange, ...]

    @property
    def already(self) -> bool:
        return not self.changes


def apply_patches(
    tree: Path, patches: Sequence[FilePatch] | None = None, *, check: bool = False, reverse: bool = False
) -> Result:
    """Apply ``patches`` (default: those of this package) to the llama.cpp checkout ``tree``; ``reverse`` undoes them.

    Everything is placed in memory before the first file is written, and a failing write puts back what was written.
    ``check`` writes nothing. Raises PatchError, with the tree as it was, if ``tree`` is no checkout of llama.cpp, if
    hunks do not fit, or if the tree is partly patched; OutputError if a file cannot be written.
    """
    patches = load_patches() if patches is None else patches
    if not patches:
        raise PatchError("this mopeq-edge carries no patch for llama.cpp; nothing to do")
    _check_checkout(tree)
    if reverse:
        patches = [file.inverted() for file in patches]
    looked_at = [(file, *_look(tree, file)) for file in patches]
    placed = [(file, found) for file, _, placements in looked_at for found in placements]
    if all(found.state is State.DONE for _, found in placed):
        return Result(())
    if any(found.state is not State.FITS for _, found in placed):
        raise PatchError(_explain(tree, placed, reverse))
    changes = tuple(_change(tree / file.path, file, text, placements) for file, text, placements in looked_at)
    if not check:
        _write(changes)
    return Result(changes)


def _check_checkout(tree: Path) -> None:
    try:
        project = _PROJECT.search((tree / "CMakeLists.txt").read_text(encoding="utf-8", errors="replace"))
    except OSError:
        project = None
    if project is None or not (tree / _WITNESS).is_file():
        raise PatchError(
            f'{tree}: expected a checkout of llama.cpp, found no CMakeLists.txt with project("llama.cpp") or no '
            f"{_WITNESS}; give the root directory of llama.cpp's source"
        )


def _look(tree: Path, file: FilePatch) -> tuple[str | None, tuple[Placement, ...]]:
    """The file's text, None if there is none, and where its hunks go."""
    path = tree / file.path
    if not path.resolve().is_relative_to(tree.resolve()):
        raise PatchError(f"{path}: leads out of {tree}, so it is left alone; give a checkout without such links")
    try:
        # surrogateescape keeps bytes that are no UTF-8 as they are
        text = path.read_bytes().decode("utf-8", "surrogateescape")
    except FileNotFoundError:
        text = None
    except OSError as error:
        raise PatchError(f"{path}: cannot be read ({error.strerror}); give a checkout of llama.cpp") from error
    if file.creates or file.deletes:
        return text, (Placement(file.hunks[0], _state_of_whole_file(file, text), 0),)
    if text is None:
        return None, tuple(Placement(hunk, State.NO_FILE) for hunk in file.hunks)
    return text, place(file.hunks, text)


def _state_of_whole_file(file: FilePatch, text: str | None) -> State:
    if text is None:
        return State.FITS if file.creates else State.DONE
    content = file.hunks[0].new if file.creates else file.hunks[0].old
    if tuple(line.rstrip("\r\n") for line in split_lines(text)) != content:
        return State.OTHER_TEXT
    return State.DONE if file.creates else State.FITS


def _change(path: Path, file: FilePatch, text: str | None, placements: Sequence[Placement]) -> FileChange:
    after = None if file.deletes else edit(text or "", placements)
    return FileChange(
        path,
        before=_encode(text),
        after=_encode(after),
        added=sum(hunk.count(ADDED) for hunk in file.hunks),
        removed=sum(hunk.count(REMOVED) for hunk in file.hunks),
    )


def _encode(text: str | None) -> bytes | None:
    return None if text is None else text.encode("utf-8", "surrogateescape")


def _explain(tree: Path, looked_at: Sequence[tuple[FilePatch, Placement]], reverse: bool) -> str:
    named = [(f"{file.path} hunk {found.hunk.number} of {found.hunk.patch}", found) for file, found in looked_at]
    wrong = [
        f"{name} ('{_first_line(found.hunk)}' {found.state.value})"
        for name, found in named
        if found.state not in (State.FITS, State.DONE)
    ]
    fitting = [name for name, found in named if found.state is State.FITS]
    done = len(named) - len(wrong) - len(fitting)
    said = []
    if done:
        said.append(f"partly {'unpatched' if reverse else 'patched'}: {done} of {len(named)} hunks are done")
        said += [f"not done: {', '.join(fitting)}"] if fitting else []
    if wrong:
        said.append(f"{len(wrong)} of {len(named)} hunks do not fit: {', '.join(wrong)}")
    remedy = (
        "restore these files, for example with git checkout"
        if done or reverse
        else f"check out the llama.cpp of {BINDING} {pinned_version()}, or let mopeq-edge runtime install build it"
    )
    return f"{tree}: nothing was changed: {'; '.join(said)}; {remedy}"


def _first_line(hunk: Hunk) -> str:
    lines = hunk.old or hunk.new
    return next((line.strip() for line in lines if line.strip()), "")[:80]


def _write(changes: Sequence[FileChange]) -> None:
    folders = _missing_folders(changes)
    written: list[FileChange] = []
    try:
        for change in changes:
            written.append(change)
            _put(change.path, change.after)
    except BaseException as error:
        lost = [change.path for change in reversed(written) if not _restored(change)]
        for folder in folders:
            with suppress(OSError):
                folder.rmdir()
        if lost and isinstance(error, Exception):
            names = ", ".join(str(path) for path in lost)
            raise PatchError(f"{error}; these files could not be put back: {names}; restore them") from error
        raise


def _put(path: Path, content: bytes | None) -> None:
    if content is None:
        try:
            path.unlink()
        except OSError as error:
            raise OutputError(f"{path}: cannot be removed ({error.strerror}); check its permissions") from error
        return
    target = path.resolve()
    with atomic_path(target) as temporary:
        temporary.write_bytes(content)
        if target.exists():
            shutil.copymode(target, temporary)


def _restored(change: FileChange) -> bool:
    try:
        if change.before is None:
            change.path.unlink(missing_ok=True)
        elif not change.path.exists() or change.path.read_bytes() != change.before:
            _put(change.path, change.before)
    except (MopeqError, OSError):
        return False
    return True


def _missing_folders(changes: Sequence[FileChange]) -> list[Path]:
    """Folders that writing will create, the deepest first."""
    found = {parent for change in changes for parent in change.path.parents if not parent.exists()}
    return sorted(found, key=lambda folder: len(folder.parts), reverse=True)
