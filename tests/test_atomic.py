"""Files are whole or not there, and inputs are safe from outputs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mopeq_edge.atomic import (
    atomic_directory,
    atomic_path,
    atomic_write,
    check_output,
    remove_leftovers,
    scratch_directory,
)
from mopeq_edge.errors import OutputError


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_appears_only_when_whole(tmp_path: Path) -> None:
    path = tmp_path / "out.gguf"
    with atomic_write(path) as file:
        file.write(b"first")
        file.flush()
        assert not path.exists()
        # The half-written file lies beside the target, so that the rename never crosses file systems.
        assert len(names(tmp_path)) == 1
        file.write(b" second")
    assert path.read_bytes() == b"first second"
    assert names(tmp_path) == ["out.gguf"]


def test_an_old_file_stays_until_the_new_one_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "out.gguf"
    path.write_bytes(b"old")
    with atomic_write(path) as file:
        file.write(b"new")
        file.flush()
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"


@pytest.mark.parametrize("error", [RuntimeError("no"), KeyboardInterrupt(), SystemExit(1)], ids=lambda e: repr(e))
def test_an_exception_leaves_nothing(tmp_path: Path, error: BaseException) -> None:
    path = tmp_path / "out.gguf"
    path.write_bytes(b"old")

    def fail() -> None:
        with atomic_write(path) as file:
            file.write(b"half")
            raise error

    with pytest.raises(type(error)):
        fail()
    assert names(tmp_path) == ["out.gguf"]
    assert path.read_bytes() == b"old"


def test_an_exception_with_a_path_leaves_nothing(tmp_path: Path) -> None:
    def fail() -> None:
        with atomic_path(tmp_path / "out") as temporary:
            temporary.write_bytes(b"half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert names(tmp_path) == []


def test_folders_are_made(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "out"
    with atomic_path(path) as temporary:
        assert temporary.parent == path.parent
        temporary.write_bytes(b"x")
    assert path.read_bytes() == b"x"


def test_a_file_where_a_folder_should_be(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"file")
    path = tmp_path / "a" / "out"
    with pytest.raises(OutputError, match=f"^{path}: cannot be written") as caught, atomic_write(path) as file:
        file.write(b"x")
    assert "\n" not in str(caught.value)
    assert (tmp_path / "a").read_bytes() == b"file"


def test_a_directory_under_the_final_name(tmp_path: Path) -> None:
    path = tmp_path / "out"
    path.mkdir()
    with pytest.raises(OutputError, match=f"^{path}: cannot be written"), atomic_write(path) as file:
        file.write(b"x")
    assert names(tmp_path) == ["out"]


def test_an_error_of_another_file_is_not_the_outputs_fault(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught, atomic_write(tmp_path / "out"):
        (tmp_path / "missing input").read_bytes()
    assert caught.value.filename == str(tmp_path / "missing input")
    assert names(tmp_path) == []


FULL = """
import resource, sys
from pathlib import Path
from mopeq_edge.atomic import atomic_path, atomic_write
from mopeq_edge.errors import OutputError

path, way = Path(sys.argv[1]), sys.argv[2]
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
try:
    if way == "write":
        with atomic_write(path) as file:
            for _ in range(100):
                file.write(b"x" * 1000)
    elif way == "flush":  # fits the buffer, so that only the flush at the end fails
        with atomic_write(path) as file:
            file.write(b"x" * 9_000)
            file.flush()
            file.write(b"x" * 2_000)
    else:
        with atomic_path(path) as temporary:
            temporary.write_bytes(b"x" * 100_000)
except OutputError as error:
    print(error)
"""


@pytest.mark.skipif(os.name != "posix", reason="limits on file sizes are POSIX")
@pytest.mark.parametrize("way", ["write", "flush", "path"])
def test_a_full_disk(tmp_path: Path, way: str) -> None:
    path = tmp_path / "out.gguf"
    path.write_bytes(b"old")
    done = subprocess.run([sys.executable, "-c", FULL, path, way], check=True, capture_output=True, text=True)
    assert done.stdout.startswith(f"{path}: cannot be written (File too large); nothing was left under that name; ")
    assert len(done.stdout.splitlines()) == 1
    assert names(tmp_path) == ["out.gguf"]
    assert path.read_bytes() == b"old"


def test_an_output_that_is_an_input(tmp_path: Path) -> None:
    source, other = tmp_path / "model.gguf", tmp_path / "other"
    source.write_bytes(b"weights")
    other.write_bytes(b"")
    hard, soft, spelled = tmp_path / "hard", tmp_path / "soft", tmp_path / "x" / ".." / "model.gguf"
    os.link(source, hard)
    soft.symlink_to(source)
    (tmp_path / "x").mkdir()
    for path in (source, hard, soft, spelled):
        for force in (False, True):
            with pytest.raises(OutputError) as caught:
                check_output(path, [other, source], force=force)
            assert str(caught.value).startswith(f"{path}: is the input {source} (the same file)")
    assert source.read_bytes() == b"weights"


def test_an_output_that_exists(tmp_path: Path) -> None:
    path, source = tmp_path / "out", tmp_path / "in"
    path.write_bytes(b"old")
    source.write_bytes(b"old")
    with pytest.raises(OutputError, match=f"^{path}: exists already; .*--force"):
        check_output(path, [source], force=False)
    check_output(path, [source], force=True)
    check_output(path, [tmp_path / "gone"], force=True)
    check_output(tmp_path / "new", [source], force=False)
    check_output(tmp_path / "no" / "folder" / "yet", [source], force=False)


def test_an_output_that_is_a_directory(tmp_path: Path) -> None:
    for force in (False, True):
        with pytest.raises(OutputError, match=f"^{tmp_path}: is a directory"):
            check_output(tmp_path, [], force=force)


def test_an_output_where_no_folder_can_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OutputError, match=r"out\.gguf.*is no directory that can be written to"):
        check_output(tmp_path / "file" / "deeper" / "out.gguf", [], force=False)
    check_output(tmp_path / "new" / "deeper" / "out.gguf", [], force=False)
    assert not (tmp_path / "new").exists()


def dead_pid() -> int:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    return child.pid


@pytest.mark.parametrize("own", [False, True], ids=["dead process", "the same number again, as in a container"])
def test_what_a_killed_process_left_goes_away(tmp_path: Path, own: bool) -> None:
    left = tmp_path / f".out.gguf.{os.getpid() if own else dead_pid()}.tmp"
    other = tmp_path / ".other.gguf.1.tmp"
    for path in (left, other):
        path.write_bytes(b"half")
    with atomic_write(tmp_path / "out.gguf") as file:
        file.write(b"whole")
    assert names(tmp_path) == [".other.gguf.1.tmp", "out.gguf"]
    assert (tmp_path / "out.gguf").read_bytes() == b"whole"


@pytest.mark.skipif(os.name != "posix", reason="folders are locked on POSIX alone")
def test_folders_of_killed_processes_go_away_and_those_of_living_ones_stay(tmp_path: Path) -> None:
    left = tmp_path / f".out.{dead_pid()}.tmp"
    (left / "deeper").mkdir(parents=True)
    (left / "deeper" / "half").write_bytes(b"half")
    with scratch_directory(tmp_path / "out") as own:
        assert not left.exists()
        (own / "half").write_bytes(b"half")
        remove_leftovers(tmp_path, "out")
        assert (own / "half").exists()
        os.replace(own / "half", tmp_path / "out")
    assert names(tmp_path) == ["out"]


def test_a_directory_appears_only_when_whole(tmp_path: Path) -> None:
    def fail() -> None:
        with atomic_directory(tmp_path / "new") as folder:
            (folder / "half").write_bytes(b"half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert names(tmp_path) == []
    with atomic_directory(tmp_path / "new") as folder:
        (folder / "file").write_bytes(b"whole")
        assert not (tmp_path / "new").exists()
    assert (tmp_path / "new" / "file").read_bytes() == b"whole"
    assert names(tmp_path) == ["new"]


def test_the_file_of_a_living_writer_stays(tmp_path: Path) -> None:
    """Of another process, and of another thread of this one."""
    path = tmp_path / "out"
    hold = (
        "import sys; from pathlib import Path; from mopeq_edge.atomic import atomic_write\n"
        "with atomic_write(Path(sys.argv[1])) as file:\n"
        "    file.write(b'slow'); file.flush(); print('ready', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", hold, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as slow:
        assert slow.stdout is not None
        assert slow.stdout.readline() == b"ready\n"
        with atomic_write(path) as first:
            first.write(b"first")
            with atomic_write(path) as second:
                second.write(b"second")
            assert len(names(tmp_path)) == 3
            assert path.read_bytes() == b"second"
        assert path.read_bytes() == b"first"
        slow.communicate()
        assert slow.returncode == 0
    assert path.read_bytes() == b"slow"
    assert names(tmp_path) == ["out"]
