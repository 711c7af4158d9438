"""All of the patch or nothing: what fits, what does not, what is there already."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from mopeq_edge.errors import MopeqError, OutputError, PatchError
from mopeq_edge.llama_cpp.tree import apply_patches

from .trees import ALL, CREATE, GRAPH, INSERT, REMOVE, REPLACE, digest, make_tree, parsed, patched_graph

NEW_FILE = "#pragma once\n\nint groups;\n"


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    return make_tree(tmp_path / "llama.cpp")


def graph(tree: Path) -> str:
    return (tree / "src/llama-graph.cpp").read_text()


def refusal(tree: Path, *texts: str, **options: bool) -> str:
    """The error's line; the tree must be as before."""
    before = digest(tree)
    with pytest.raises(MopeqError) as caught:
        apply_patches(tree, parsed(*texts), **options)
    assert digest(tree) == before
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_is_changed(tree: Path) -> None:
    done = apply_patches(tree, parsed(*ALL))
    assert graph(tree) == patched_graph()
    assert (tree / "src/new/groups.h").read_text() == NEW_FILE
    assert [(change.path, change.added, change.removed) for change in done.changes] == [
        (tree / "src/llama-graph.cpp", 3, 2),
        (tree / "src/new/groups.h", 3, 0),
    ]
    assert sorted(path.name for path in (tree / "src").iterdir()) == ["llama-graph.cpp", "new"]


@pytest.mark.parametrize("program", ["git", "patch"])
def test_the_same_as_other_programs_make(tree: Path, tmp_path: Path, program: str) -> None:
    """At the right lines, with a line of context on both sides: so that theirs is defined too."""
    if shutil.which(program) is None:
        return  # test_what_is_changed has the same by hand
    text = (
        "--- a/src/llama-graph.cpp\n+++ b/src/llama-graph.cpp\n"
        "@@ -2,3 +2,3 @@\n line 2\n-line 3\n+LINE 3\n line 4\n"
        "@@ -10,2 +10,4 @@\n line 10\n+  ten and a third\n+  ten and two thirds\n line 11\n"
        "@@ -14,3 +16,2 @@\n line 14\n-line 15\n line 16\n" + CREATE
    )
    other = make_tree(tmp_path / "other")
    command = {"git": ["git", "apply", "-p1"], "patch": ["patch", "-p1", "--fuzz=0"]}[program]
    subprocess.run(command, input=text, text=True, cwd=other, check=True, capture_output=True)
    apply_patches(tree, parsed(text))
    assert digest(tree) == digest(other)
    assert graph(tree) == patched_graph()


def test_the_check_writes_nothing(tree: Path) -> None:
    before = digest(tree)
    assert len(apply_patches(tree, parsed(*ALL), check=True).changes) == 2
    assert digest(tree) == before


def test_a_patched_tree_stays_as_it_is(tree: Path) -> None:
    apply_patches(tree, parsed(*ALL))
    before = digest(tree)
    for check in (False, True):
        assert apply_patches(tree, parsed(*ALL), check=check).already
    assert digest(tree) == before


def test_reverse_gives_back_the_tree(tree: Path) -> None:
    before = digest(tree)
    assert apply_patches(tree, parsed(*ALL), reverse=True).already
    apply_patches(tree, parsed(*ALL))
    patched = digest(tree)
    done = apply_patches(tree, parsed(*ALL), reverse=True)
    assert [(change.added, change.removed) for change in done.changes] == [(2, 3), (0, 3)]
    # The folder of the new file stays, empty.
    (tree / "src/new").rmdir()
    assert digest(tree) == before
    apply_patches(tree, parsed(*ALL))
    assert digest(tree) == patched


def test_line_numbers_do_not_matter_where_the_block_is_unique(tree: Path) -> None:
    shifted = "".join(f"// {n}\n" for n in range(1000)) + GRAPH
    (tree / "src/llama-graph.cpp").write_text(shifted)
    apply_patches(tree, parsed(*ALL))
    assert graph(tree) == shifted.removesuffix(GRAPH) + patched_graph()


def test_moved_blocks_fit_in_any_order(tree: Path) -> None:
    lines = GRAPH.splitlines(keepends=True)
    (tree / "src/llama-graph.cpp").write_text("".join(lines[9:] + lines[:9]))
    apply_patches(tree, parsed(*ALL))
    done = patched_graph().splitlines(keepends=True)
    assert graph(tree) == "".join(done[9:] + done[:9])


def test_a_block_that_is_there_twice_fits_only_at_its_own_line(tree: Path) -> None:
    path = tree / "src/llama-graph.cpp"
    path.write_text(GRAPH + "line 10\n")
    apply_patches(tree, parsed(INSERT))
    lines = GRAPH.splitlines(keepends=True)
    assert graph(tree) == "".join(
        [*lines[:10], "  ten and a third\n", "  ten and two thirds\n", *lines[10:], "line 10\n"]
    )
    path.write_text("// one line more\n" + GRAPH + "line 10\n")
    said = refusal(tree, INSERT)
    assert "src/llama-graph.cpp hunk 1 of 0.patch ('line 10' is in several places)" in said


def test_every_hunk_that_does_not_fit_is_named(tree: Path) -> None:
    (tree / "src/llama-graph.cpp").write_text(GRAPH.replace("line 3\n", "line three\n").replace("line 16", "line XVI"))
    said = refusal(tree, *ALL)
    assert "2 of 4 hunks do not fit" in said
    assert "src/llama-graph.cpp hunk 1 of 0.patch ('line 3' is nowhere)" in said
    assert "src/llama-graph.cpp hunk 1 of 2.patch ('line 15' is nowhere)" in said
    assert "1.patch" not in said
    assert said.startswith(f"{tree}: nothing was changed")
    assert said.endswith("or let mopeq-edge runtime install build it")


def test_hunks_that_meet_in_another_version(tree: Path) -> None:
    first = REPLACE.replace("@@ -3,1 +3,1 @@\n", "@@ -3,2 +3,2 @@\n") + " line 4\n"
    second = REPLACE.replace("@@ -3,1 +3,1 @@\n-line 3\n+LINE 3\n", "@@ -4,2 +4,2 @@\n line 4\n-line 5\n+LINE 5\n")
    assert "('line 4' is where another hunk is)" in refusal(tree, first, second)


def test_a_partly_patched_tree(tree: Path) -> None:
    apply_patches(tree, parsed(REPLACE, INSERT))
    said = refusal(tree, *ALL)
    assert "partly patched: 2 of 4 hunks are done" in said
    assert "not done: src/llama-graph.cpp hunk 1 of 2.patch, src/new/groups.h hunk 1 of 3.patch" in said
    assert "git checkout" in said
    assert "partly unpatched: 2 of 4" in refusal(tree, *ALL, reverse=True)


def test_a_file_that_should_be_new_but_is_there(tree: Path) -> None:
    make_tree(tree)
    (tree / "src/new").mkdir()
    (tree / "src/new/groups.h").write_text("mine\n")
    said = refusal(tree, CREATE, REPLACE)
    assert "src/new/groups.h hunk 1 of 0.patch ('#pragma once' should begin a file that has another text)" in said


def test_a_file_that_is_not_there(tree: Path) -> None:
    other = REPLACE.replace("llama-graph", "llama-other")
    assert "('line 3' belongs into a file that is not there)" in refusal(tree, other)
    (tree / "src/llama-other.cpp").mkdir()
    assert "cannot be read" in refusal(tree, other)


def test_crlf_stays_crlf(tree: Path) -> None:
    path = tree / "src/llama-graph.cpp"
    path.write_bytes(GRAPH.replace("\n", "\r\n").encode())
    apply_patches(tree, parsed(*ALL))
    assert path.read_bytes() == patched_graph().replace("\n", "\r\n").encode()
    assert apply_patches(tree, parsed(*ALL)).already
    apply_patches(tree, parsed(*ALL), reverse=True)
    assert path.read_bytes() == GRAPH.replace("\n", "\r\n").encode()


def test_a_patch_with_crlf_is_the_same_patch(tree: Path) -> None:
    assert parsed(*(text.replace("\n", "\r\n") for text in ALL)) == parsed(*ALL)


def test_mixed_line_ends_stay_where_nothing_changes(tree: Path) -> None:
    path = tree / "src/llama-graph.cpp"
    path.write_bytes(GRAPH.encode().replace(b"line 10\n", b"line 10\r\n"))
    apply_patches(tree, parsed(*ALL))
    assert path.read_bytes() == patched_graph().encode().replace(b"line 10\n", b"line 10\r\n")


def test_no_newline_at_the_end_and_bytes_that_are_no_text(tree: Path) -> None:
    path = tree / "src/llama-graph.cpp"
    path.write_bytes(b"\xff\x0c\x85\n" + GRAPH.encode() + b"end")
    at_end = "--- a/src/llama-graph.cpp\n+++ b/src/llama-graph.cpp\n@@ -22,1 +22,2 @@\n end\n+after\n"
    apply_patches(tree, parsed(*ALL, at_end))
    assert path.read_bytes() == b"\xff\x0c\x85\n" + patched_graph().encode() + b"end\nafter"


def test_permissions_stay(tree: Path) -> None:
    path = tree / "src/llama-graph.cpp"
    path.chmod(0o755)
    apply_patches(tree, parsed(*ALL))
    assert path.stat().st_mode & 0o777 == 0o755


@pytest.mark.parametrize("what", ["empty", "no witness", "other project", "file", "nothing"])
def test_what_is_no_checkout(tmp_path: Path, what: str) -> None:
    root = tmp_path / "dir"
    if what == "file":
        root.touch()
    elif what == "empty":
        root.mkdir()
    elif what == "no witness":
        (make_tree(root) / "src/llama-graph.cpp").unlink()
    elif what == "other project":
        (make_tree(root) / "CMakeLists.txt").write_text('# project("llama.cpp")\nproject("ggml")\n')
    said = refusal(root, *ALL)
    assert said.startswith(f"{root}: expected a checkout of llama.cpp")


def test_no_patches_are_an_error(tree: Path) -> None:
    assert "carries no patch" in refusal(tree)


def test_a_link_out_of_the_tree_is_not_followed(tree: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside.cpp"
    outside.write_text(GRAPH)
    (tree / "src/llama-graph.cpp").unlink()
    (tree / "src/llama-graph.cpp").symlink_to(outside)
    assert "leads out of" in refusal(tree, REPLACE)
    assert outside.read_text() == GRAPH


@pytest.mark.parametrize("fails_at", [1, 2, 3])
def test_a_failing_write_puts_everything_back(tree: Path, monkeypatch: pytest.MonkeyPatch, fails_at: int) -> None:
    second = REPLACE.replace("llama-graph", "llama-second")
    make_tree(tree, llama_second=GRAPH)
    replace, calls = os.replace, 0

    def refuse(source: Path, target: Path) -> None:
        nonlocal calls
        calls += 1
        if calls == fails_at:
            raise PermissionError(13, "Permission denied", str(source))
        replace(source, target)

    monkeypatch.setattr(os, "replace", refuse)
    said = refusal(tree, REPLACE, CREATE, second)
    assert "cannot be written (Permission denied)" in said


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="the superuser writes everywhere")
def test_a_folder_that_cannot_be_written(tree: Path) -> None:
    (tree / "src").chmod(0o555)
    try:
        assert "Permission denied" in refusal(tree, REPLACE)
    finally:
        (tree / "src").chmod(0o755)


def test_what_cannot_be_put_back_is_named(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_tree(tree, llama_second=GRAPH)
    replace, calls = os.replace, 0

    def refuse(source: Path, target: Path) -> None:
        nonlocal calls
        calls += 1
        if calls > 1:
            raise OSError(28, "No space left on device", str(source))
        replace(source, target)

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(PatchError, match=r"could not be put back: .*llama-graph\.cpp; restore them"):
        apply_patches(tree, parsed(REPLACE, REPLACE.replace("llama-graph", "llama-second")))


def test_a_new_file_that_cannot_be_removed(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    apply_patches(tree, parsed(*ALL))
    unlink = Path.unlink

    def refuse(self: Path, missing_ok: bool = False) -> None:
        if self.name == "groups.h":
            raise PermissionError(13, "Permission denied", str(self))
        unlink(self, missing_ok)

    monkeypatch.setattr(Path, "unlink", refuse)
    before = digest(tree)
    with pytest.raises(OutputError, match="cannot be removed"):
        apply_patches(tree, parsed(*ALL), reverse=True)
    assert digest(tree) == before


def test_removing_needs_its_block(tree: Path) -> None:
    (tree / "src/llama-graph.cpp").write_text(GRAPH.replace("line 15\n", ""))
    # What is left of the block is there: it counts as done.
    assert apply_patches(tree, parsed(REMOVE)).already
