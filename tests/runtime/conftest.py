"""A tiny stand-in for llama-cpp-python's source distribution, and an installation made from it."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from mopeq_edge.runtime.install import install
from mopeq_edge.runtime.locate import Runtime, find_runtime, pinned_version

CMAKE_LISTS = """
cmake_minimum_required(VERSION 3.14)
project(stand_in C)
set(CMAKE_RUNTIME_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR}/bin)
set(CMAKE_LIBRARY_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR}/bin)
foreach(name ggml-base ggml ggml-cpu llama mtmd)
    add_library(${name} library.c)
    set_target_properties(${name} PROPERTIES VERSION 0.1.2 SOVERSION 0)
endforeach()
foreach(name bench cli completion imatrix mtmd-cli perplexity quantize server tokenize)
    add_executable(llama-${name} tool.c)
    target_link_libraries(llama-${name} ggml-base)
endforeach()
"""

LIBRARY_C = "int answer(void) { return 4711; }\n"

TOOL_C = r"""
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
int answer(void);
int main(int argc, char ** argv) {
    if (argc > 1 && !strcmp(argv[1], "--version")) { printf("version: stand-in %d\n", answer()); return 0; }
    if (argc > 1 && !strcmp(argv[1], "--fail")) { fputs("loading\nno such tensor\n\n", stderr); return 3; }
    if (argc > 1 && !strcmp(argv[1], "--abort")) { abort(); }
    if (argc > 1 && !strcmp(argv[1], "--mixed")) {
        printf("one\n"); fflush(stdout);
        fprintf(stderr, "two\r\xff three\n");
        printf("four"); return 0;
    }
    char here[4096];
    printf("%s\n", getcwd(here, sizeof here));
    for (int i = 1; i < argc; i++) printf("[%s]\n", argv[i]);
    return 0;
}
"""

# An in-tree backend without requirements, so that pip needs no index to look at the archive.
PYPROJECT = '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
BACKEND = """
import pathlib
def prepare_metadata_for_build_wheel(directory, config_settings=None):
    info = pathlib.Path(directory) / "llama_cpp_python-VERSION.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\\nName: llama_cpp_python\\nVersion: VERSION\\n")
    return info.name
"""


class Recorder:
    """A Progress that remembers."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.steps: dict[str, list[float]] = {}
        self.totals: dict[str, float | None] = {}

    @contextmanager
    def step(self, title: str, total: float | None, unit: str = "") -> Iterator[_Step]:
        self.totals[title] = total
        yield _Step(self.steps.setdefault(title, []))

    def note(self, message: str) -> None:
        self.notes.append(message)


class _Step:
    def __init__(self, amounts: list[float]) -> None:
        self._amounts = amounts

    def advance(self, amount: float = 1.0) -> None:
        self._amounts.append(amount)


class SdistMaker:
    """Writes stand-in source distributions below ``directory``."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def tree(self, *, version: str | None = None, changes: dict[str, str] | None = None) -> Path:
        """An unpacked one; ``changes`` replaces files, by their path below vendor/llama.cpp."""
        version = version or pinned_version()
        root = self._directory / f"llama_cpp_python-{version}"
        files = {
            "PKG-INFO": f"Metadata-Version: 2.1\nName: llama_cpp_python\nVersion: {version}\n\ntext\n",
            "README.md": "not needed\n",
            "backend.py": BACKEND.replace("VERSION", version),
            "pyproject.toml": PYPROJECT,
        }
        source = {
            "CMakeLists.txt": CMAKE_LISTS,
            "library.c": LIBRARY_C,
            "tool.c": TOOL_C,
            "convert_hf_to_gguf.py": "print('convert')\n",
            "conversion/base.py": "# base\n",
            "gguf-py/gguf/__init__.py": "# gguf\n",
            "models/templates/a.jinja": "{{ a }}\n",
            "docs/unneeded.md": "no\n",
        }
        files |= {f"vendor/llama.cpp/{name}": text for name, text in (source | (changes or {})).items()}
        for name, text in files.items():
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return root

    def archive(self, *, version: str | None = None, changes: dict[str, str] | None = None) -> Path:
        """The same as .tar.gz."""
        root = self.tree(version=version, changes=changes)
        path = root.with_name(f"{root.name}.tar.gz")
        with tarfile.open(path, "w:gz") as tar:
            tar.add(root, root.name)
        return path


@pytest.fixture
def sdists(tmp_path: Path) -> SdistMaker:
    directory = tmp_path / "sdists"
    directory.mkdir()
    return SdistMaker(directory)


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache root, in use."""
    root = tmp_path / "cache"
    monkeypatch.setenv("MOPEQ_EDGE_CACHE", str(root))
    monkeypatch.delenv("LLAMA_CPP_LIB_PATH", raising=False)
    return root


@pytest.fixture(scope="session")
def _built_once(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Recorder]:
    directory = tmp_path_factory.mktemp("stand-in")
    recorder = Recorder()
    before = os.environ.get("MOPEQ_EDGE_CACHE")
    os.environ["MOPEQ_EDGE_CACHE"] = str(directory / "cache")
    try:
        install(recorder, jobs=2, sdist=SdistMaker(directory).archive())
    finally:
        os.environ.pop("MOPEQ_EDGE_CACHE")
        if before is not None:
            os.environ["MOPEQ_EDGE_CACHE"] = before
    return directory / "cache", recorder


@pytest.fixture
def installed(_built_once: tuple[Path, Recorder], monkeypatch: pytest.MonkeyPatch) -> Runtime:
    """The installed stand-in, in use. Shared by all tests, which must leave it as it is."""
    monkeypatch.setenv("MOPEQ_EDGE_CACHE", str(_built_once[0]))
    monkeypatch.delenv("LLAMA_CPP_LIB_PATH", raising=False)
    found = find_runtime()
    assert found is not None
    return found


@pytest.fixture
def build_record(_built_once: tuple[Path, Recorder]) -> Recorder:
    """What the installation of `installed` reported."""
    return _built_once[1]


@pytest.fixture
def real_runtime() -> Runtime:
    """The real llama.cpp that the user installed."""
    found = find_runtime()
    if found is None:
        pytest.skip("llama.cpp is not installed (mopeq-edge runtime install)")
    return found
