from __future__ import annotations

import ctypes
import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mopeq_edge.errors import RuntimeMissingError
from mopeq_edge.runtime import locate


def write_stamp(cache: Path, name: str, **changes: object) -> Path:
    directory = cache / name
    (directory / "bin").mkdir(parents=True)
    stamp = {"format": 1, "version": "9.8.7", "build": name.split("-")[2], **changes}
    (directory / "runtime.json").write_text(json.dumps(stamp))
    return directory


@pytest.fixture
def pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: {"llama-cpp-python": "9.8.7+cu124"}[name])


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A llama_cpp package that fails when it is imported."""
    directory = tmp_path / "site" / "llama_cpp"
    directory.mkdir(parents=True)
    (directory / "__init__.py").write_text("raise AssertionError('imported')\n")
    monkeypatch.syspath_prepend(str(directory.parent))
    monkeypatch.delitem(sys.modules, "llama_cpp", raising=False)
    return directory


def test_cache_root_follows_the_variable(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MOPEQ_EDGE_CACHE", str(tmp_path / "a"))
    assert locate.cache_root() == tmp_path / "a"
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("MOPEQ_EDGE_CACHE", "")
    assert locate.cache_root() == tmp_path / ".cache" / "mopeq-edge"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MOPEQ_EDGE_CACHE", "here")
    assert locate.cache_root() == tmp_path / "here"


@pytest.mark.usefixtures("pinned")
def test_the_source_release_has_no_local_label() -> None:
    assert locate.pinned_version() == "9.8.7"


def test_no_binding_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    with pytest.raises(RuntimeMissingError, match="pip install llama-cpp-python"):
        locate.pinned_version()


def test_build_ids() -> None:
    assert locate.build_id() == "stock"
    assert locate.build_id("stock", "cuda") == "stock-cuda"
    assert locate.build_id("0a1b2c") == "0a1b2c"
    for bad in ("../x", "", "a-b", "A"):
        with pytest.raises(ValueError, match="must match"):
            locate.build_id(bad)


@pytest.mark.usefixtures("pinned")
def test_finds_only_a_stamped_build_of_its_own_version(cache: Path) -> None:
    assert locate.find_runtime() is None
    directory = cache / "llama.cpp-9.8.7-stock"
    (directory / "bin").mkdir(parents=True)
    write_stamp(cache, "llama.cpp-9.8.6-stock", version="9.8.6")
    assert locate.find_runtime() is None
    (directory / "bin").rmdir()
    directory.rmdir()
    write_stamp(cache, "llama.cpp-9.8.7-stock")
    found = locate.find_runtime()
    assert found == locate.Runtime("9.8.7", "stock", directory)
    assert (found.bin, found.convert) == (directory / "bin", directory / "convert")
    assert locate.find_runtime("0a1b") is None
    assert locate.find_runtime(backend="cuda") is None


@pytest.mark.usefixtures("pinned")
@pytest.mark.parametrize("changes", [{"format": 2}, {"format": None}, {"version": "1"}, {"build": "other"}])
def test_a_stamp_that_says_something_else_does_not_count(cache: Path, changes: dict[str, object]) -> None:
    write_stamp(cache, "llama.cpp-9.8.7-stock", **changes)
    assert locate.find_runtime() is None


@pytest.mark.usefixtures("pinned")
@pytest.mark.parametrize("text", ["", "{", "[]", "null", "\xff\xfe"])
def test_a_broken_stamp_does_not_count(cache: Path, text: str) -> None:
    directory = write_stamp(cache, "llama.cpp-9.8.7-stock")
    (directory / "runtime.json").write_bytes(text.encode("latin-1"))
    assert locate.find_runtime() is None


@pytest.mark.usefixtures("pinned")
def test_what_is_missing_is_one_line_with_the_command(cache: Path) -> None:
    for call in (locate.require_runtime, lambda: locate.tool("llama-quantize")):
        with pytest.raises(RuntimeMissingError) as caught:
            call()
        message = str(caught.value)
        assert "9.8.7" in message
        assert str(cache) in message
        assert message.endswith("run: mopeq-edge runtime install")
        assert "\n" not in message


@pytest.mark.usefixtures("pinned")
def test_tool_that_was_deleted(cache: Path) -> None:
    directory = write_stamp(cache, "llama.cpp-9.8.7-stock")
    with pytest.raises(RuntimeMissingError, match=r"llama-cli is missing from .*install --force"):
        locate.tool("llama-cli")
    (directory / "bin" / "llama-cli").touch()
    assert locate.tool("llama-cli") == directory / "bin" / "llama-cli"


@pytest.mark.usefixtures("pinned")
def test_libraries_in_order(cache: Path, package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = {"darwin": "libggml-base.dylib", "win32": "ggml-base.dll"}.get(sys.platform, "libggml-base.so")
    with pytest.raises(RuntimeMissingError, match="run: mopeq-edge runtime install"):
        locate.library_dir()
    (package / "lib").mkdir()
    with pytest.raises(RuntimeMissingError):
        locate.library_dir()
    (package / "lib" / name).touch()
    assert locate.library_dir() == package / "lib"
    directory = write_stamp(cache, "llama.cpp-9.8.7-stock")
    assert locate.library_dir() == directory / "bin"
    monkeypatch.setenv("LLAMA_CPP_LIB_PATH", str(tmp_path))
    with pytest.raises(RuntimeMissingError, match=f"LLAMA_CPP_LIB_PATH={tmp_path} has no"):
        locate.library_dir()
    (tmp_path / name).touch()
    assert locate.library_dir() == tmp_path
    assert locate.library_path("ggml-base") == tmp_path / name
    with pytest.raises(RuntimeMissingError, match="llama"):
        locate.library_path("llama")


@pytest.mark.parametrize(
    ("platform", "name"),
    [("linux", "liba.so"), ("darwin", "liba.dylib"), ("win32", "a.dll"), ("win32", "liba.dll")],
)
def test_library_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, platform: str, name: str) -> None:
    for other in ("liba.so", "liba.dylib", "liba.dll", "a.dll"):
        if other == name or not other.endswith(name.split(".")[1]):
            (tmp_path / other).touch()
    monkeypatch.setattr(sys, "platform", platform)
    assert locate.library_path("a", tmp_path).name == name


def run_python(code: str, *, package: Path, **env: str) -> str:
    path = os.pathsep.join([str(package.parent), str(Path(locate.__file__).parents[2])])
    kept = {key: value for key, value in os.environ.items() if key != "LLAMA_CPP_LIB_PATH"}
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**kept, "PYTHONPATH": path, **env},
        check=True,
        text=True,
        capture_output=True,
    ).stdout.strip()


def test_import_llama_cpp_sets_the_variable_first(cache: Path, package: Path, tmp_path: Path) -> None:
    version = locate.pinned_version()
    directory = write_stamp(cache, f"llama.cpp-{version}-stock", version=version)
    (package / "__init__.py").write_text("import os\nseen = os.environ.get('LLAMA_CPP_LIB_PATH')\n")
    code = "from mopeq_edge.runtime.locate import import_llama_cpp as f; print(f().seen)"
    assert run_python(code, package=package, MOPEQ_EDGE_CACHE=str(cache)) == str(directory / "bin")
    chosen = str(tmp_path / "chosen")
    assert run_python(code, package=package, LLAMA_CPP_LIB_PATH=chosen) == chosen


def test_import_llama_cpp_explains_a_library_that_does_not_load(cache: Path, package: Path) -> None:
    version = locate.pinned_version()
    write_stamp(cache, f"llama.cpp-{version}-stock", version=version)
    (package / "__init__.py").write_text("raise OSError('bad\\nELF')\n")
    code = (
        "from mopeq_edge.runtime.locate import import_llama_cpp as f\n"
        "from mopeq_edge.errors import RuntimeMissingError\n"
        "try: f()\nexcept RuntimeMissingError as error: print(error)"
    )
    said = run_python(code, package=package, MOPEQ_EDGE_CACHE=str(cache))
    assert "bad ELF" in said
    assert said.endswith("run: mopeq-edge runtime install --force")


@pytest.mark.runtime
def test_the_real_libraries_load(real_runtime: locate.Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LLAMA_CPP_LIB_PATH", raising=False)
    assert locate.library_dir() == real_runtime.bin
    base = ctypes.CDLL(str(locate.library_path("ggml-base")))
    base.ggml_type_size.restype = ctypes.c_size_t
    # Q4_0 is type 2: 32 weights of 4 bit and one half-precision scale.
    assert base.ggml_type_size(2) == 32 // 2 + 2
    for stem in ("ggml", "ggml-cpu", "llama", "mtmd"):
        ctypes.CDLL(str(locate.library_path(stem)))


@pytest.mark.runtime
def test_the_real_binding_imports(real_runtime: locate.Runtime) -> None:
    code = (
        "from mopeq_edge.runtime.locate import import_llama_cpp as f\n"
        "m = f(); print(m.__version__, m.llama_cpp.llama_max_devices() > 0)"
    )
    assert run_python(code, package=Path("nowhere/llama_cpp")) == f"{real_runtime.version} True"
