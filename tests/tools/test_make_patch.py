"""The least context that places each hunk, and the way back: the patch gives the new tree."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from mopeq_edge.errors import PatchError
from mopeq_edge.llama_cpp.diff import parse_patches
from mopeq_edge.llama_cpp.tree import apply_patches
from tools.make_patch import main, make_patch

from ..llama_cpp.trees import GRAPH, digest, make_tree


def text_of(lines: str) -> str:
    return "".join(f"{line}\n" for line in lines.split("|"))


def patch_of(tmp_path: Path, old: str, new: str) -> str:
    """The patch between two files given as lines joined by |."""
    trees = [make_tree(tmp_path / name, f=text_of(lines)) for name, lines in (("old", old), ("new", new))]
    text, doubtful = make_patch(*trees)
    assert doubtful == []
    apply_patches(trees[0], parse_patches({"x": text.encode()}))
    assert digest(trees[0]) == digest(trees[1])
    return text.removeprefix("--- a/src/f.cpp\n+++ b/src/f.cpp\n")


@pytest.mark.parametrize(
    ("old", "new", "hunks"),
    [
        # what is replaced is unique: no context
        ("a|b|c", "a|x|c", "@@ -2,1 +2,1 @@|-b|+x"),
        # an insertion or a removal has at least one line, the one before if that is unique
        ("a|b|c", "a|b|x|c", "@@ -2,1 +2,2 @@| b|+x"),
        ("a|b|c", "a|c", "@@ -1,2 +1,1 @@| a|-b"),
        ("a|b|b|c", "a|b|b|x|c", "@@ -4,1 +4,2 @@|+x| c"),
        ("a|b|c", "x|a|b|c", "@@ -1,1 +1,2 @@|+x| a"),
        # neither neighbour is unique, both together are
        ("b|c|a|b|a|c|a", "b|c|a|b|x|a|c|a", "@@ -4,2 +4,3 @@| b|+x| a"),
        # two changes stay two hunks
        ("a|b|c|d|e", "a|B|c|D|e", "@@ -2,1 +2,1 @@|-b|+B|@@ -4,1 +4,1 @@|-d|+D"),
        # the second one needs the first one's line: one hunk
        ("a|q|a|q|b|q|c|q", "a|q|a|q|B|q|X|c|q", "@@ -5,1 +5,1 @@|-b|+B|@@ -7,1 +7,2 @@|+X| c"),
        ("k|m|k|m|k|z|y|w", "K|m|X|k|m|k|z|y|w", "@@ -1,4 +1,5 @@|-k|+K| m|+X| k| m"),
    ],
)
def test_least_context(tmp_path: Path, old: str, new: str, hunks: str) -> None:
    assert patch_of(tmp_path, old, new) == text_of(hunks)


def test_an_insertion_is_a_whole_block(tmp_path: Path) -> None:
    old = "|int f() {|    return 1;|}||int h() {|    return 3;|}"
    new = "|int f() {|    return 1;|}||int g() {|    return 2;|}||int h() {|    return 3;|}"
    assert patch_of(tmp_path, old, new) == text_of("@@ -6,1 +6,5 @@|+int g() {|+    return 2;|+}|+| int h() {")


def test_an_insertion_moves_to_where_it_can_be_placed(tmp_path: Path) -> None:
    end = "    }|    }|    }|}"
    old = f"start|{end}|middle|{end}"
    assert "middle" in patch_of(tmp_path, old, f"{old}|new|{end}")


def test_new_files_and_named_paths(tmp_path: Path) -> None:
    old, new = make_tree(tmp_path / "old", a="1\n", b="1\n"), make_tree(tmp_path / "new", a="2\n", b="2\n", c="\n+\n")
    (old / "src/b.bin").write_bytes(b"\xff")
    (new / "src/b.bin").write_bytes(b"\xff")
    assert make_patch(old, new, ["src/b.cpp"])[0] == "--- a/src/b.cpp\n+++ b/src/b.cpp\n@@ -1,1 +1,1 @@\n-1\n+2\n"
    whole = make_patch(old, new, ["src", "src/a.cpp"])[0]
    assert whole.startswith("--- a/src/a.cpp\n")
    assert whole.endswith("--- /dev/null\n+++ b/src/c.cpp\n@@ -0,0 +1,2 @@\n+\n++\n")
    assert whole == make_patch(old, new)[0]
    apply_patches(old, parse_patches({"x": whole.encode()}))
    assert digest(old) == digest(new)


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("1\n", "1\n", "nothing to write"),
        ("1\n", None, "deletes a file"),
        ("1\n", "2", "a newline at each line's end"),
        ("1\r\n", "2\r\n", "no carriage return"),
        ("1\n", b"\xff\n", "expected UTF-8"),
        ("1\n", "", "a newline at each line's end"),
    ],
)
def test_refused(tmp_path: Path, before: str, after: str | bytes | None, message: str) -> None:
    old, new = make_tree(tmp_path / "old", a=before), make_tree(tmp_path / "new", a=after)
    with pytest.raises(PatchError, match=message):
        make_patch(old, new)
    with pytest.raises(PatchError, match="is neither in"):
        make_patch(old, new, ["src/none.cpp"])


def test_the_command(tmp_path: Path) -> None:
    old, new = make_tree(tmp_path / "old", a="x\n" * 20), make_tree(tmp_path / "new", a="x\n" * 10 + "y\n" + "x\n" * 10)
    out = tmp_path / "out.patch"
    done = CliRunner().invoke(main, [str(old), str(new), str(out)])
    assert done.exit_code == 0, done.output
    assert "src/a.cpp hunk 1: not unique with 3 lines of context, only its line number places it" in done.stderr
    apply_patches(old, parse_patches({"x": out.read_bytes()}))
    assert digest(old) == digest(new)
    failed = CliRunner().invoke(main, [str(new), str(new), str(out)])
    assert (failed.exit_code, "nothing to write" in failed.stderr) == (1, True)


def test_git_makes_the_same_of_it(tmp_path: Path) -> None:
    old = make_tree(tmp_path / "old", f=GRAPH)
    new = make_tree(tmp_path / "new", f=GRAPH.replace("line 7\n", "").replace("line 12\n", "line 12\n12b\n"), g="g\n")
    text = make_patch(old, new)[0]
    if shutil.which("git"):
        command = ["git", "apply", "-p1", "--unidiff-zero"]
        subprocess.run(command, input=text, text=True, cwd=old, check=True, capture_output=True)
    else:
        apply_patches(old, parse_patches({"x": text.encode()}))
    assert digest(old) == digest(new)


LINES = st.lists(st.sampled_from(["a", "b", "c", "}", "", "unique 1", "unique 2"]), min_size=1, max_size=14)


@settings(max_examples=150, deadline=None)
@given(old=LINES, new=LINES, above=st.lists(st.sampled_from(["p", "q"]), max_size=3))
def test_what_is_unique_is_placed_in_a_longer_file_too(old: list[str], new: list[str], above: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        texts = ["".join(f"{line}\n" for line in lines) for lines in (old, new)]
        trees = [make_tree(Path(folder) / str(number), f=text) for number, text in enumerate(texts)]
        try:
            text, doubtful = make_patch(*trees)
        except PatchError as error:
            assert old == new or "too alike" in str(error)  # noqa: PT017
            return
        patches = parse_patches({"x": text.encode()})
        shift = "".join(f"{line}\n" for line in above) if not doubtful else ""
        make_tree(trees[0], f=shift + texts[0])
        apply_patches(trees[0], patches)
        assert (trees[0] / "src/f.cpp").read_text() == shift + texts[1]
