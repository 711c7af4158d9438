from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import threading
from collections import namedtuple
from pathlib import Path

import pytest
from click.testing import CliRunner

from mopeq_edge.cli import cli
from mopeq_edge.errors import MopeqError, RuntimeMissingError
from mopeq_edge.llama_cpp import bundle
from mopeq_edge.progress import SilentProgress
from mopeq_edge.runtime import cmake
from mopeq_edge.runtime.cmake import CMakeBuild, cmake_options, percent_done
from mopeq_edge.runtime.install import install
from mopeq_edge.runtime.locate import Runtime, find_runtime, library_dir, pinned_version, runtime_directory

from .builds import write_build
from .conftest import Recorder, SdistMaker

REFUSES = {"CMakeLists.txt": 'cmake_minimum_required(VERSION 3.14)\nmessage(FATAL_ERROR "no luck 4711")\n'}


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def message_of(sdist: Path | None, **options: object) -> str:
    with pytest.raises(RuntimeMissingError) as caught:
        install(SilentProgress(), sdist=sdist, **options)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    return str(caught.value)


def run(path: Path, **env: str) -> str:
    return subprocess.run([path, "--version"], env=env, check=True, text=True, capture_output=True).stdout


def answer_of(library: Path) -> str:
    # In a process of its own: once a stand-in libggml-base is loaded, the real one, which has the same
    # soname, never would be.
    code = "import ctypes, sys; print(ctypes.CDLL(sys.argv[1]).answer())"
    return subprocess.run(
        [sys.executable, "-c", code, library], check=True, text=True, capture_output=True
    ).stdout.strip()


def test_what_is_installed(installed: Runtime) -> None:
    assert names(installed.directory.parent) == [f"llama.cpp-{installed.version}-stock", "runtime.lock"]
    assert names(installed.directory) == ["bin", "convert", "runtime.json"]
    assert names(installed.convert) == ["conversion", "convert_hf_to_gguf.py", "gguf-py", "models"]
    assert names(installed.convert / "models" / "templates") == ["a.jinja"]
    assert library_dir() == installed.bin
    for stem in ("ggml", "ggml-base", "ggml-cpu", "llama", "mtmd"):
        assert answer_of(installed.bin / f"lib{stem}.so") == "4711"
        assert (installed.bin / f"lib{stem}.so.0").resolve() == installed.bin.resolve() / f"lib{stem}.so.0.1.2"


def test_the_stamp(installed: Runtime) -> None:
    text = (installed.directory / "runtime.json").read_text()
    stamp = json.loads(text)
    assert list(stamp) == ["backend", "build", "cmake_options", "format", "tools", "version"]
    assert (stamp["format"], stamp["version"], stamp["build"]) == (1, pinned_version(), "stock")
    assert stamp["backend"] == "cpu"
    wanted = ["bench", "cli", "completion", "imatrix", "mtmd-cli", "perplexity", "quantize", "server", "tokenize"]
    assert stamp["tools"] == [f"llama-{name}" for name in wanted]
    assert {"-DCMAKE_BUILD_TYPE=Release", "-DBUILD_SHARED_LIBS=ON", "-DLLAMA_OPENSSL=OFF"} < set(stamp["cmake_options"])
    # Same input, same bytes: nothing of this machine may be in it.
    assert str(installed.directory.parent) not in text


def test_progress_of_the_build(build_record: Recorder) -> None:
    assert build_record.totals["building llama.cpp"] == 100
    amounts = build_record.steps["building llama.cpp"]
    assert len(amounts) > 5
    assert min(amounts) >= 0
    assert sum(amounts) == pytest.approx(100)


def test_tools_find_their_libraries_wherever_they_are(installed: Runtime, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(installed.bin, moved, symlinks=True)
    assert run(moved / "llama-cli") == "version: stand-in 4711\n"
    # A library that would not even load, where another llama.cpp's could be.
    (tmp_path / "libggml-base.so.0").write_text("no ELF")
    if sys.platform == "linux":
        assert run(moved / "llama-cli", LD_LIBRARY_PATH=str(tmp_path)) == "version: stand-in 4711\n"
        (moved / "libggml-base.so.0").unlink()
        with pytest.raises(subprocess.CalledProcessError):
            run(moved / "llama-cli")


def test_installed_already_needs_nothing(installed: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert install(SilentProgress(), sdist=Path("no-such-file")) == installed


def test_download_with_pip_replaces_by_force(
    sdists: SdistMaker, cache: Path, monkeypatch: pytest.MonkeyPatch, recorder: Recorder
) -> None:
    archive = sdists.archive()
    for name, value in {"NO_INDEX": "1", "FIND_LINKS": str(archive.parent), "CONFIG_FILE": os.devnull}.items():
        monkeypatch.setenv(f"PIP_{name}", value)
    incomplete = runtime_directory()
    (incomplete / "bin").mkdir(parents=True)
    (incomplete / "left").touch()
    (cache / f"{incomplete.name}.log").touch()
    done = install(recorder, force=True)
    assert names(done.directory) == ["bin", "convert", "runtime.json"]
    assert names(cache) == [done.directory.name, "runtime.lock"]
    assert recorder.totals[f"downloading llama-cpp-python {pinned_version()}"] is None
    # The next attempt fails and must leave this build as it is.
    monkeypatch.setenv("PIP_FIND_LINKS", str(cache))
    said = message_of(None, force=True)
    assert "No matching distribution found" in said
    assert "--sdist PATH" in said
    assert find_runtime() == done
    assert names(cache) == [done.directory.name, "runtime.lock"]


def test_without_its_stamp_it_is_not_installed(installed: Runtime, cache: Path) -> None:
    shutil.copytree(installed.directory, runtime_directory(), symlinks=True)
    assert find_runtime() is not None
    (runtime_directory() / "runtime.json").unlink()
    assert find_runtime() is None


def test_cmake_error_leaves_only_the_log(sdists: SdistMaker, cache: Path) -> None:
    (cache / "llama.cpp-1-stock.build-1" / "x").mkdir(parents=True)
    (cache / "llama.cpp-1-stock.tmp-1").mkdir()
    (cache / "llama.cpp-1-stock").mkdir()
    said = message_of(sdists.tree(changes=REFUSES))
    log = cache / f"llama.cpp-{pinned_version()}-stock.log"
    assert "could not configure" in said
    assert "(message): no luck 4711" in said
    assert said.endswith(f"; see {log}")
    assert "no luck 4711" in log.read_text()
    # Whatever a crash had left is gone, other builds are not.
    assert names(cache) == sorted(["llama.cpp-1-stock", log.name, "runtime.lock"])


def test_compiler_error_is_named(sdists: SdistMaker, cache: Path) -> None:
    said = message_of(sdists.archive(changes={"library.c": "#error wrong machine 4711\n"}))
    assert "could not be built" in said
    assert "wrong machine 4711" in said
    assert names(cache) == [f"llama.cpp-{pinned_version()}-stock.log", "runtime.lock"]


def test_disk_that_fills_up_while_it_compiles(sdists: SdistMaker, cache: Path) -> None:
    full = {"CMakeLists.txt": 'message(FATAL_ERROR "error: x.o: No space left on device")\n'}
    assert "the disk is full; free some space" in message_of(sdists.tree(changes=full))


def test_broken_archives(sdists: SdistMaker, cache: Path, tmp_path: Path) -> None:
    sound = sdists.archive()
    cut, text, empty = (tmp_path / f"{name}.tar.gz" for name in ("cut", "text", "empty"))
    cut.write_bytes(sound.read_bytes()[: sound.stat().st_size // 2])
    text.write_text("this is no archive")
    tarfile.open(empty, "w:gz").close()
    for path in (cut, text):
        assert f"{path}: not a sound source archive" in message_of(path)
    assert f"{empty}: expected a source distribution" in message_of(empty)
    assert f"{tmp_path}: expected a source distribution" in message_of(tmp_path)
    assert "no such file" in message_of(tmp_path / "none")
    other = sdists.archive(version="0.0.9")
    assert f"expected llama-cpp-python {pinned_version()}, found version 0.0.9" in message_of(other)
    assert names(cache) == ["runtime.lock"]


@pytest.mark.parametrize("kind", ["parent", "absolute link", "device"])
def test_unsafe_archive_is_refused(sdists: SdistMaker, cache: Path, tmp_path: Path, kind: str) -> None:
    root = sdists.tree()
    path = tmp_path / "unsafe.tar.gz"
    member = tarfile.TarInfo({"parent": "../../../evil"}.get(kind, f"{root.name}/docs/evil"))
    if kind == "absolute link":
        member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
    if kind == "device":
        member.type = tarfile.CHRTYPE
    with tarfile.open(path, "w:gz") as tar:
        tar.add(root, root.name)
        tar.addfile(member, io.BytesIO())
    said = message_of(path)
    assert "not a sound source archive" in said
    assert "evil" in said
    assert not list(tmp_path.rglob("evil"))
    assert names(cache) == ["runtime.lock"]


def test_the_given_tree_stays_as_it_is(sdists: SdistMaker, cache: Path) -> None:
    root = sdists.tree()
    before = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}

    def patch(source: Path) -> None:
        (source / "CMakeLists.txt").write_text(REFUSES["CMakeLists.txt"].replace("4711", "patched"))

    assert "0a1b2c.log" in message_of(root, build="0a1b2c", prepare=patch)
    assert "no luck patched" in (cache / f"llama.cpp-{pinned_version()}-0a1b2c.log").read_text()
    assert {path: path.read_bytes() for path in root.rglob("*") if path.is_file()} == before


def test_missing_programs(sdists: SdistMaker, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = sdists.tree()
    monkeypatch.setenv("CXX", "no-such-launcher g++")
    monkeypatch.delenv("CC", raising=False)
    assert "no C++ compiler was found (looked for no-such-launcher)" in message_of(root)
    monkeypatch.delenv("CXX")
    beside = tmp_path / "python"
    beside.mkdir()
    monkeypatch.setattr(sys, "executable", str(beside / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "run: pip install cmake ninja" in message_of(root)
    (beside / "cmake").write_text("#!/bin/sh\nexit 1\n")
    (beside / "cmake").chmod(0o755)
    assert "no C compiler was found (looked for cc, gcc, clang)" in message_of(root)
    (tmp_path / "clang").write_text("")
    (tmp_path / "clang").chmod(0o755)
    assert "no C++ compiler was found (looked for c++, g++, clang++)" in message_of(root)
    assert names(cache) == ["runtime.lock"]


def test_full_disk(sdists: SdistMaker, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "free")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: usage(599_999_999))
        assert "needs 0.6 GB, 0.6 GB are free" in message_of(sdists.tree())

    def full(*args: object, **options: object) -> None:
        raise OSError(28, "No space left on device", "some/file")

    monkeypatch.setattr(shutil, "copytree", full)
    assert f"{cache}: the disk is full" in message_of(sdists.tree())
    assert names(cache) == ["runtime.lock"]


def test_cache_that_cannot_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("MOPEQ_EDGE_CACHE", str(tmp_path / "file" / "cache"))
    said = message_of(None)
    assert str(tmp_path / "file") in said
    assert "MOPEQ_EDGE_CACHE" in said


def test_second_installer_waits_and_takes_the_first_result(
    sdists: SdistMaker, cache: Path, installed: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOPEQ_EDGE_CACHE", str(cache))
    root = sdists.tree()
    inside, release = threading.Event(), threading.Event()
    configured: list[Path] = []

    # No compiler is needed here: the first installer takes the binaries of the stand-in.
    def configure(self: CMakeBuild, options: object) -> None:
        configured.append(self.tree)
        inside.set()
        assert release.wait(5)
        shutil.copytree(installed.bin, self.tree / "bin", symlinks=True)

    monkeypatch.setattr(CMakeBuild, "configure", configure)
    monkeypatch.setattr(CMakeBuild, "build", lambda *args: None)
    results: dict[str, Runtime] = {}
    first, second = Recorder(), Recorder()
    threads = [
        threading.Thread(target=lambda: results.update(first=install(first, sdist=root))),
        threading.Thread(target=lambda: results.update(second=install(second, sdist=root))),
    ]
    threads[0].start()
    assert inside.wait(5)
    threads[1].start()
    for _ in range(100):
        if second.notes:
            break
        threads[1].join(0.02)
    waiting = list(second.notes)
    release.set()
    for thread in threads:
        thread.join(5)
    assert waiting == ["another installation of llama.cpp runs; waiting for it"]
    assert first.notes == []
    assert len(configured) == 1
    assert results["first"] == results["second"] == find_runtime()


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ("libggml-base.so.0.1.2", "was built but does not run: llama-imatrix"),
        ("libmtmd.so.0.1.2", "the build of llama.cpp made no library mtmd"),
        ("llama-bench", "the build of llama.cpp made no llama-bench"),
    ],
)
def test_incomplete_build_gets_no_stamp(
    sdists: SdistMaker, cache: Path, installed: Runtime, monkeypatch: pytest.MonkeyPatch, broken: str, message: str
) -> None:
    monkeypatch.setenv("MOPEQ_EDGE_CACHE", str(cache))

    def configure(self: CMakeBuild, options: object) -> None:
        shutil.copytree(installed.bin, self.tree / "bin", symlinks=True)
        (self.tree / "bin" / broken).unlink()
        if "ggml-base" in broken:
            (self.tree / "bin" / broken).write_text("no library")

    monkeypatch.setattr(CMakeBuild, "configure", configure)
    monkeypatch.setattr(CMakeBuild, "build", lambda *args: None)
    assert message in message_of(sdists.tree())
    assert names(cache) == ["runtime.lock"]


def test_an_installer_killed_between_two_names_loses_no_build(
    cache: Path, monkeypatch: pytest.MonkeyPatch, recorder: Recorder
) -> None:
    monkeypatch.setenv("PATH", "")  # nothing can be built
    target = write_build(cache, "stock").parent
    found = find_runtime()
    assert found is not None
    assert found.directory == target
    target.rename(target.with_name(f"{target.name}.old-123"))
    assert find_runtime() is None
    assert install(recorder) == found
    assert target.is_dir()


def test_earlier_build_comes_back_if_the_new_one_cannot_take_its_place(
    sdists: SdistMaker, cache: Path, installed: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOPEQ_EDGE_CACHE", str(cache))
    shutil.copytree(installed.directory, runtime_directory(), symlinks=True)
    (runtime_directory() / "earlier").touch()
    rename = Path.rename

    def refuse(self: Path, target: Path) -> Path:
        if ".tmp-" in self.name:
            raise PermissionError(13, "Permission denied", str(self))
        return rename(self, target)

    monkeypatch.setattr(CMakeBuild, "configure", lambda self, _: shutil.copytree(installed.bin, self.tree / "bin"))
    monkeypatch.setattr(CMakeBuild, "build", lambda *args: None)
    monkeypatch.setattr(Path, "rename", refuse)
    assert "Permission denied" in message_of(sdists.tree(), force=True)
    assert names(cache) == [runtime_directory().name, "runtime.lock"]
    assert (runtime_directory() / "earlier").exists()


@pytest.mark.parametrize(
    ("line", "percent"),
    [
        ("[1/236] Building CXX object a.o", 100 / 236),
        ("[236/236] Linking", 100.0),
        ("[ 25%] Building C object", 25.0),
        ("[100%] Built target llama", 100.0),
        ("[0/0] nothing", None),
        ("warning: [3/4]", None),
        ("[1]4.5,[2]4.6", None),
        ("", None),
    ],
)
def test_percent_done(line: str, percent: float | None) -> None:
    assert percent_done(line) == percent


def test_make_serves_without_ninja(sdists: SdistMaker, tmp_path: Path) -> None:
    if not shutil.which("make"):
        pytest.skip("no make")
    found = cmake.find_build_tools()
    source = sdists.tree() / "vendor" / "llama.cpp"
    tree = CMakeBuild(cmake.BuildTools(found.cmake, None), source, tmp_path / "build")
    recorder = Recorder()
    tree.configure(cmake_options("cpu"))
    tree.build(["ggml-base"], 1, recorder)
    assert (tmp_path / "build" / "bin" / "libggml-base.so").exists()
    assert not (tmp_path / "build" / "build.ninja").exists()
    amounts = recorder.steps["building llama.cpp"]
    assert sum(amounts) == pytest.approx(100)
    assert len(amounts) > 2
    with pytest.raises(MopeqError, match=r"could not be built.*no-such-target"):
        tree.build(["no-such-target"], 1, recorder)


PATCH = b"""\
--- a/src/llama-graph.cpp
+++ b/src/llama-graph.cpp
@@ -1,1 +1,2 @@
 // graph
+// with groups
"""


def test_the_command_builds_the_patched_source(
    sdists: SdistMaker, cache: Path, installed: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOPEQ_EDGE_CACHE", str(cache))
    monkeypatch.setattr(bundle, "patch_files", lambda: {"a.patch": PATCH})
    monkeypatch.setattr("mopeq_edge.llama_cpp.diff.patch_files", bundle.patch_files)
    graph = Path("vendor/llama.cpp/src/llama-graph.cpp")
    sources: list[str] = []

    def configure(self: CMakeBuild, options: object) -> None:
        sources.append((self.tree.parent / "source" / graph).read_text())
        shutil.copytree(installed.bin, self.tree / "bin", symlinks=True)

    monkeypatch.setattr(CMakeBuild, "configure", configure)
    monkeypatch.setattr(CMakeBuild, "build", lambda *args: None)
    changes = {"CMakeLists.txt": 'project("llama.cpp" C CXX)\n', "src/llama-graph.cpp": "// graph\n"}
    root = sdists.tree(changes=changes)
    for options in (["--stock"], [], []):
        done = CliRunner().invoke(cli, ["runtime", "install", "--sdist", str(root), *options])
        assert done.exit_code == 0, done.exception
    assert sources == ["// graph\n", "// graph\n// with groups\n"]
    assert (root / graph).read_text() == "// graph\n"
    version, name = pinned_version(), bundle.build_name()
    assert names(cache) == [f"llama.cpp-{version}-{name}", f"llama.cpp-{version}-stock", "runtime.lock"]
    # The patched build is what is used from now on; nothing can be patched that is not llama.cpp.
    found = find_runtime()
    assert found is not None
    assert (found.build_id, library_dir()) == (name, found.bin)
    (root / graph).write_text("// another graph\n")
    said = CliRunner().invoke(cli, ["runtime", "install", "--force", "--sdist", str(root)])
    assert "src/llama-graph.cpp hunk 1 of a.patch ('// graph' is nowhere)" in str(said.exception)
    assert find_runtime() == found
    assert len(names(cache)) == 3
