"""``run`` and ``serve`` start the right tool with the arguments as they were given; ``runtime patch`` on toy trees."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from PIL import Image

from mopeq_edge.cli import cli
from mopeq_edge.cli.run import mmproj_arguments
from mopeq_edge.errors import PatchError
from mopeq_edge.gguf_file import KV, ValueType
from mopeq_edge.llama_cpp import bundle

from ..llama_cpp.trees import ALL, digest, make_tree
from ..runtime.builds import PATCHED, PATCHES, write_build, write_file, write_per_expert, write_tools

pytestmark = pytest.mark.skipif(os.name != "posix", reason="the stand-ins are shell scripts")

CODE = f"""
from mopeq_edge.llama_cpp import bundle
bundle.patch_files = lambda: {PATCHES}
from mopeq_edge.cli import main
main()
"""


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def mopeq_edge(cache: Path, *args: object, **env: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if name != "LLAMA_CPP_LIB_PATH"}
    return subprocess.run(
        [sys.executable, "-c", CODE, *map(str, args)],
        env={**kept, "MOPEQ_EDGE_CACHE": str(cache), **env},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


ODD = [
    "-p",
    "two  words",
    "",
    "--temp=0.7",
    "-ngl",
    "99",
    "--build",
    "x",
    "*",
    "$HOME",
    "é\n",
    "-h",
    "--help",
    "--",
    "-",
]


@pytest.mark.parametrize(("command", "tool"), [("run", "llama-cli"), ("serve", "llama-server")])
def test_arguments_reach_the_tool_as_they_are(cache: Path, tmp_path: Path, command: str, tool: str) -> None:
    patched = write_build(cache, PATCHED)
    file = write_per_expert(tmp_path / "a b.gguf")
    done = mopeq_edge(cache, command, file, *ODD)
    # nothing of the user's says where the server listens
    arguments = [*(["--host", "127.0.0.1"] if command == "serve" else []), *ODD]
    assert done.stdout == f"{patched / tool}\n[-m]\n[{file}]\n" + "".join(f"[{arg}]\n" for arg in arguments)
    assert done.returncode == 7
    expected = f"{file}: expert groups, version 1 (per-expert types): running in the patched llama.cpp {PATCHED}\n"
    assert done.stderr == expected


def test_what_sees_pictures_beside_the_file_is_passed(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unless the user names another, or none."""
    patched = write_build(cache, PATCHED)
    file, mmproj = write_file(tmp_path / "x.gguf"), tmp_path / "mmproj-x.gguf"
    mmproj.touch()
    done = mopeq_edge(cache, "serve", "--engine", "llama-server", file, "--port", "1")
    own = ["--mmproj", str(mmproj), "--host", "127.0.0.1", "--port", "1"]
    assert done.stdout.splitlines()[3:] == [f"[{arg}]" for arg in own]
    assert done.stderr.splitlines()[1:] == [f"{file}: sees pictures through mmproj-x.gguf"]
    monkeypatch.delenv("LLAMA_ARG_MMPROJ", raising=False)
    assert mmproj_arguments(file, ["--port", "1"]) == ["--mmproj", str(mmproj)]
    for named in (["--mmproj", "m"], ["-mm", "m"], ["--no-mmproj"], ["--mmproj-url=u"]):
        assert mmproj_arguments(file, named) == []
    monkeypatch.setenv("LLAMA_ARG_MMPROJ", "m")
    assert mmproj_arguments(file, []) == []
    photo = tmp_path / "a.png"
    Image.new("RGB", (8, 8)).save(photo)
    asked = ["--image", str(photo), "-p", "What?"]
    done = mopeq_edge(cache, "run", file, *asked)
    expected = ["-m", str(file), "--mmproj", str(mmproj), "--single-turn", "--image", "/dev/fd/N", "-p", "What?"]
    shown = re.sub(r"/dev/fd/\d+", "/dev/fd/N", done.stdout).splitlines()
    assert shown == [f"{patched / 'llama-cli'}", *(f"[{arg}]" for arg in expected)]
    photo.write_bytes(b"none")
    assert f"error: {photo}: not a picture in one of the" in error_of(mopeq_edge(cache, "run", file, *asked))
    # text alone, or with an mmproj of the user's, goes to llama-cli as it is
    assert mopeq_edge(cache, "run", file, "-p", "x").stdout.splitlines()[3:] == ["[-p]", "[x]"]
    assert "--single-turn" not in mopeq_edge(cache, "run", file, "--mmproj", "m", *asked).stdout


def test_what_stands_before_llama_server(cache: Path, tmp_path: Path) -> None:
    """Where it sees pictures: it gets a socket file, and its exit code is ours."""
    write_build(cache, PATCHED)
    file, mmproj = write_file(tmp_path / "x.gguf"), tmp_path / "mmproj-x.gguf"
    mmproj.touch()
    done = mopeq_edge(cache, "serve", file, "--port", "0", "-np", "2", "--host", "localhost", LLAMA_ARG_PORT="1")
    assert done.returncode == 7
    *arguments, where = done.stdout.splitlines()[3:]
    assert arguments == [f"[{arg}]" for arg in ("--mmproj", mmproj, "-np", "2", "--host")]
    assert where.endswith("/llama.sock]")
    line = done.stderr.splitlines()[-1]
    assert re.fullmatch(rf"{file}: served at http://127.0.0.1:\d+, which reads pictures for llama-server", line)
    for given, reason in (
        (("--ssl-key-file", "k"), "with TLS, for which a proxy may stand before it"),
        (("--host", "x.sock"), "with a socket file as --host"),
    ):
        done = mopeq_edge(cache, "serve", file, "--mmproj", "m", *given)
        line = done.stderr.splitlines()[-1]
        assert line.startswith(f"warning: {file}: llama-server reads pictures itself {reason}: EXIF is not followed")
        assert [f"[{arg}]" for arg in given] == done.stdout.splitlines()[-2:]
    for option in ("--no-mmproj", "--help"):
        assert "llama.sock" not in mopeq_edge(cache, "serve", file, option).stdout
    assert "--port x: expected a number" in mopeq_edge(cache, "serve", file, "--port", "x").stderr
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = mopeq_edge(cache, "serve", file, "--port", str(port))
    assert done.returncode == 1
    assert f"error: --host 127.0.0.1 --port {port}: cannot listen there (Address already in use" in done.stderr


def test_the_server_of_our_own_says_what_it_lacks(cache: Path, tmp_path: Path) -> None:
    write_build(cache, PATCHED)
    file = write_file(tmp_path / "x.gguf")
    (tmp_path / "x.vision.onnx").touch()
    done = mopeq_edge(cache, "serve", file, "--mirostat", "2")
    assert done.returncode == 2
    assert "No such option '--mirostat'" in done.stderr
    assert "llama.cpp's library answers" in mopeq_edge(cache, "serve", "--build", "cpu", file).stderr
    assert mopeq_edge(cache, "serve", "--engine", "llama-server", file).stdout.endswith("[--host]\n[127.0.0.1]\n")
    assert "its weights, x.vision.onnx.data, are not beside it" in error_of(mopeq_edge(cache, "serve", file))


def test_the_tool_s_help_and_ours(cache: Path, tmp_path: Path) -> None:
    write_build(cache, PATCHED)
    file = write_file(tmp_path / "x.gguf")
    for args in (["--", "--help"], ["--help"]):
        done = mopeq_edge(cache, "run", file, *args)
        assert done.stdout.splitlines()[1:] == ["[-m]", f"[{file}]", "[--help]"]
        assert done.stderr == f"{file}: stock GGUF: runs in any llama.cpp\n"
    assert mopeq_edge(cache, "run", "--", file, "--", "--").stdout.splitlines()[3:] == ["[--]"]
    assert mopeq_edge(cache, "run", "--help", file).stdout.startswith("Usage: ")
    assert mopeq_edge(cache, "run", file).stdout.splitlines()[1:] == ["[-m]", f"[{file}]"]


def test_the_process_becomes_the_tool(cache: Path, tmp_path: Path) -> None:
    """The same process, stdin, and no signal ignored: a tool in a pipe must end when its reader does."""
    script = '#!/bin/sh\necho $$; cat; grep SigIgn "/proc/$$/status" 2>/dev/null\n'
    write_tools(write_build(cache, PATCHED), script)
    file = write_file(tmp_path / "x.gguf")
    process = subprocess.Popen(
        [sys.executable, "-c", CODE, "run", str(file)],
        env={**os.environ, "MOPEQ_EDGE_CACHE": str(cache), "LLAMA_CPP_LIB_PATH": ""},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    said, _ = process.communicate("typed\n", timeout=60)
    lines = said.splitlines()
    assert lines[:2] == [str(process.pid), "typed"]
    if sys.platform == "linux":
        assert int(lines[2].split()[1], 16) & (1 << 12 | 1 << 24) == 0  # SIGPIPE and SIGXFSZ


def error_of(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("mopeq-edge: error: ")
    assert done.stderr.count("\n") == 1
    return done.stderr


def test_errors_before_anything_starts(cache: Path, tmp_path: Path) -> None:
    file, stock = write_per_expert(tmp_path / "x.gguf"), write_file(tmp_path / "stock.gguf")
    (tmp_path / "text.gguf").write_text("this is no model")
    assert "run: mopeq-edge runtime install" in error_of(mopeq_edge(cache, "run", file))
    write_build(cache, "stock")
    patched = write_build(cache, PATCHED)
    for command in ("run", "serve"):
        assert "leave out --build stock" in error_of(mopeq_edge(cache, command, "--build", "stock", file))
        assert "not a GGUF file" in error_of(mopeq_edge(cache, command, tmp_path / "text.gguf"))
        assert "cannot be read" in error_of(mopeq_edge(cache, command, tmp_path / "none.gguf"))
        assert "cannot be read" in error_of(mopeq_edge(cache, command, tmp_path))
        future = write_file(tmp_path / "future.gguf", KV(ValueType.UINT32, 2))
        assert "expected 1 (UINT32)" in error_of(mopeq_edge(cache, command, future))
    own = cache / f"llama.cpp-{patched.parent.name.split('-')[1]}-stock" / "bin"
    assert "unset LLAMA_CPP_LIB_PATH" in error_of(mopeq_edge(cache, "run", file, LLAMA_CPP_LIB_PATH=str(own)))
    assert mopeq_edge(cache, "run", stock, LLAMA_CPP_LIB_PATH=str(own)).stdout.startswith(f"{own}/llama-cli\n")
    assert mopeq_edge(cache, "run").returncode == 2
    assert mopeq_edge(cache, "run", "-ngl", "9", file).returncode == 2
    (patched / "llama-cli").write_text("#!/no/such/program\n")
    done = mopeq_edge(cache, "run", file)
    assert done.returncode == 1
    assert "llama-cli could not start: No such file or directory; run: mopeq-edge" in done.stderr


@pytest.fixture
def patches(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {f"{number}.patch": text.encode() for number, text in enumerate(ALL)}
    monkeypatch.setattr("mopeq_edge.llama_cpp.diff.patch_files", lambda: found)


def patch(tree: Path, *options: str) -> str:
    done = CliRunner().invoke(cli, ["runtime", "patch", str(tree), *options])
    assert done.exit_code == 0, done.exception
    return done.stdout


@pytest.mark.usefixtures("patches")
def test_patch_check_and_reverse(tmp_path: Path) -> None:
    tree = make_tree(tmp_path / "llama cpp")
    before = digest(tree)
    assert patch(tree, "--check") == (
        f"{tree}: the patch fits (2 files, 6 lines added, 2 removed); nothing was changed\n"
    )
    assert patch(tree, "--reverse") == f"{tree}: has no patch in it; nothing was changed\n"
    assert digest(tree) == before
    said = patch(tree).splitlines()
    assert said[0] == f"{tree}: patched: 2 files, 6 lines added, 2 removed"
    assert said[1].startswith(f"Build it as before, or with: cmake -S '{tree}' -B '{tree}/build' ")
    assert said[2] == f"mopeq-edge run and serve use it with: export LLAMA_CPP_LIB_PATH='{tree}/build/bin'"
    patched = digest(tree)
    assert patched != before
    assert patch(tree) == f"{tree}: is patched already; nothing was changed\n"
    assert patch(tree, "--reverse", "--check").startswith(f"{tree}: the patch can be taken out (2 files, 2 lines added")
    assert digest(tree) == patched
    assert patch(tree, "--reverse").startswith(f"{tree}: unpatched: 2 files, 2 lines added, 6 removed\n")
    (tree / "src/new").rmdir()
    assert digest(tree) == before


@pytest.mark.usefixtures("patches")
def test_patch_refuses(tmp_path: Path) -> None:
    for tree in (tmp_path, tmp_path / "none"):
        done = CliRunner().invoke(cli, ["runtime", "patch", str(tree)])
        assert isinstance(done.exception, PatchError)
        assert f"{tree}: expected a checkout of llama.cpp" in str(done.exception)


def test_the_installer_patches_what_it_builds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Options decide the build's name and backend and whether the source is patched."""
    calls: list[tuple[object, object, object]] = []

    def install(progress: object, *, build: str, backend: str, prepare: object, **rest: object) -> object:
        calls.append((build, backend, getattr(prepare, "__name__", None)))
        return type("Built", (), {"version": "0", "build_id": build, "directory": tmp_path})

    monkeypatch.setattr("mopeq_edge.runtime.install.install", install)
    monkeypatch.setattr(bundle, "patch_files", lambda: PATCHES)
    for options in ([], ["--stock"], ["--cuda", "--cuda-arch", "8.7"], ["--stock", "--cuda", "--cuda-arch", "90"]):
        assert CliRunner().invoke(cli, ["runtime", "install", *options]).exit_code == 0
    monkeypatch.setattr(bundle, "patch_files", dict)
    assert CliRunner().invoke(cli, ["runtime", "install"]).exit_code == 0
    assert CliRunner().invoke(cli, ["runtime", "install", "--cuda-arch", "87"]).exit_code == 2
    assert calls == [
        (PATCHED, "cpu", "apply_patches"),
        ("stock", "cpu", None),
        (PATCHED, "cuda87", "apply_patches"),
        ("stock", "cuda90", None),
        ("stock", "cpu", None),
    ]
