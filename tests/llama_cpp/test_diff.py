"""What the parser takes and what it refuses; the bundle's name."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from mopeq_edge.errors import PatchError
from mopeq_edge.expert_groups.layout import VERSION_KEY
from mopeq_edge.llama_cpp import bundle
from mopeq_edge.llama_cpp.diff import Hunk, load_patches, parse_patch, parse_patches
from mopeq_edge.llama_cpp.fit import State, edit, place, split_lines

from .trees import CREATE, INSERT, REPLACE

HEAD = "--- a/f\n+++ b/f\n"


def test_fields_of_a_diff() -> None:
    text = "What it does.\n\ndiff --git a/f b/f\nindex 1..2 100644\n" + HEAD + "@@ -3 +3,2 @@ int f() {\n a\n+\n"
    (file,) = parse_patch("x.patch", text.encode())
    assert str(file.path) == "f"
    assert not file.creates
    assert file.hunks == (Hunk("x.patch", 1, 3, 3, ((" ", "a"), ("+", ""))),)
    assert (file.hunks[0].old, file.hunks[0].new) == (("a",), ("a", ""))
    (created,) = parse_patch("x.patch", CREATE.encode())
    assert created.creates
    assert created.inverted().deletes
    assert created.inverted().inverted() == created


def test_lines_that_look_like_heads() -> None:
    text = HEAD + "@@ -3,2 +3,2 @@\n a\n--- b\n+++ c\n"
    (file,) = parse_patch("x.patch", text.encode())
    assert file.hunks[0].lines == ((" ", "a"), ("-", "-- b"), ("+", "++ c"))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "no diff\n",
        HEAD,
        HEAD + "@@ -1,2 +1,2 @@\n a\n",  # shorter than its head says
        HEAD + "@@ -1,1 +1,2 @@\n a\n+b\n+c\n",  # longer
        HEAD + "@@ -1,1 +1,2 @@\n a\n+b\n c\n",
        HEAD + "@@ -1,0 +2,1 @@\n+b\n",  # an insertion that nothing places
        HEAD + "@@ -1,1 +0,0 @@\n-b\n",  # a removal that nothing could undo
        HEAD + "@@ -1,1 +1,1 @@\n-a\n+b\n\\ No newline at end of file\n",
        HEAD.replace("b/f", "b/g") + "@@ -1,1 +1,1 @@\n-a\n+b\n",
        HEAD.replace("b/f", "/dev/null") + "@@ -1,1 +0,0 @@\n-a\n",
        "--- f\n+++ f\n@@ -1,1 +1,1 @@\n-a\n+b\n",
        HEAD.replace("/f", "/../f") + "@@ -1,1 +1,1 @@\n-a\n+b\n",
        "--- a//f\n+++ b//f\n@@ -1,1 +1,1 @@\n-a\n+b\n",
        "--- /dev/null\n+++ b/f\n@@ -1,1 +1,2 @@\n a\n+b\n",
        "diff --git a/f b/g\nrename from f\nrename to g\n",
    ],
)
def test_refused(text: str) -> None:
    with pytest.raises(PatchError, match=r"^x\.patch: ") as caught:
        parse_patch("x.patch", text.encode())
    assert "\n" not in str(caught.value)


def test_no_text() -> None:
    with pytest.raises(PatchError, match="not a unified diff"):
        parse_patch("x.patch", b"\xff" + REPLACE.encode())


def test_patches_of_the_same_file() -> None:
    (file,) = parse_patches({"a.patch": REPLACE.encode(), "b.patch": INSERT.encode()})
    assert [(hunk.patch, hunk.number) for hunk in file.hunks] == [("a.patch", 1), ("b.patch", 1)]
    with pytest.raises(PatchError, match=r"b\.patch: src/new/groups\.h is a new file"):
        parse_patches({"a.patch": CREATE.encode(), "b.patch": CREATE.encode()})


def test_lines_end_at_newlines_only() -> None:
    assert split_lines("a\r\nb\x0cc\u2028d\n\ne") == ["a\r\n", "b\x0cc\u2028d\n", "\n", "e"]
    assert split_lines("") == []


def test_an_insertion_that_is_there_already_is_not_done_twice() -> None:
    hunk = Hunk("p", 1, 1, 1, ((" ", "a"), ("+", "x")))
    (placed,) = place([hunk], "a\nb\n")
    assert placed.state is State.FITS
    after = edit("a\nb\n", [placed])
    assert after == "a\nx\nb\n"
    assert place([hunk], after)[0].state is State.DONE


def test_a_replacement_whose_result_is_elsewhere_too_still_fits() -> None:
    hunk = Hunk("p", 1, 1, 1, (("-", "a"), ("+", "b")))
    assert place([hunk], "b\na\n")[0].state is State.FITS
    assert place([hunk], "b\nb\n")[0].state is State.DONE


def named(monkeypatch: pytest.MonkeyPatch, patches: dict[str, bytes]) -> str:
    monkeypatch.setattr(bundle, "patch_files", lambda: patches)
    return bundle.build_name()


def test_the_name_follows_names_and_contents(monkeypatch: pytest.MonkeyPatch) -> None:
    assert named(monkeypatch, {}) == "stock"
    # printf 'a.patch\0001\000x' | sha256sum
    assert named(monkeypatch, {"a.patch": b"x"}) == "groupsf4849e441f"
    names = {
        named(monkeypatch, patches)
        for patches in (
            {"a.patch": b"x"},
            {"a.patch": b"y"},
            {"b.patch": b"x"},
            {"a.patch": b"x", "b.patch": b""},
            {"a.patch": b"x", "b.patch": b"x"},
        )
    }
    assert len(names) == 5
    assert all(name.isalnum() and name == name.lower() and len(name) == 16 for name in names)


def test_the_packaged_patches_can_be_read() -> None:
    found = load_patches()
    assert {hunk.patch for file in found for hunk in file.hunks} == set(bundle.patch_files())


def test_a_patched_library_can_be_told_by_its_text() -> None:
    """`runs_expert_groups` looks for the key in libllama."""
    added = (text for file in load_patches() for hunk in file.hunks for sign, text in hunk.lines if sign == "+")
    assert any(f'"{VERSION_KEY}"' in text for text in added)


def test_patches_are_found_in_an_installed_package(tmp_path: Path) -> None:
    """As importlib.resources sees a package elsewhere, here in a zip archive."""
    import zipfile

    root = Path(bundle.__file__).parents[1]
    archive = tmp_path / "package.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for name in ("__init__.py", "llama_cpp/__init__.py", "llama_cpp/bundle.py"):
            file.write(root / name, f"mopeq_edge/{name}")
        file.writestr("mopeq_edge/llama_cpp/b.patch", "2")
        file.writestr("mopeq_edge/llama_cpp/a.patch", "1")
        file.writestr("mopeq_edge/llama_cpp/a.txt", "3")
    code = f"import sys; sys.path.insert(0, {str(archive)!r})\nfrom mopeq_edge.llama_cpp import bundle as b\n"
    code += "print(b.__file__); print(b.patch_files())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.stdout.splitlines()[1:] == ["{'a.patch': b'1', 'b.patch': b'2'}"], done.stderr
    assert str(archive) in done.stdout
