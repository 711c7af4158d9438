"""Where a build's tools and libraries are, what version they say they are, and whether the binding fits."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mopeq_edge.device_report import build as under_test
from mopeq_edge.device_report.binding_probe import wrong_defaults
from mopeq_edge.device_report.build import (
    LLAMA_CPP_OF_BINDING,
    Build,
    ToolVersion,
    find_build,
    read_version,
    same_version,
    why_the_binding_cannot,
)
from mopeq_edge.errors import RuntimeMissingError
from mopeq_edge.expert_groups.layout import VERSION_KEY
from mopeq_edge.llama_cpp.bundle import STOCK
from mopeq_edge.runtime.locate import LIBRARY_VARIABLE, import_llama_cpp, pinned_version, require_runtime

pytestmark = pytest.mark.skipif(os.name != "posix", reason="names of libraries on Linux")


def touch(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")


@pytest.mark.parametrize("place", [".", "bin", "build/bin"])
def test_a_build_tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    monkeypatch.setattr("sys.platform", "linux")
    folder = tmp_path / place
    touch(folder / "llama-server", folder / "libllama.so", folder / "libggml-base.so")
    found = find_build(tmp_path)
    assert found == Build(folder.resolve(), folder.resolve(), "--llama-cpp")
    assert found.is_own
    assert found.tool("llama-server") == folder.resolve() / "llama-server"
    assert found.tool("llama-bench") is None


def test_an_installed_build_and_one_without_libraries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.platform", "linux")
    touch(tmp_path / "bin" / "llama-cli")
    assert find_build(tmp_path).library is None
    touch(tmp_path / "lib" / "libllama.so", tmp_path / "lib" / "libggml-base.so")
    assert find_build(tmp_path).library == (tmp_path / "lib").resolve()


def test_a_directory_without_a_build(tmp_path: Path) -> None:
    with pytest.raises(RuntimeMissingError, match="expected a build of"):
        find_build(tmp_path)


def test_a_patched_build_without_libraries(tmp_path: Path) -> None:
    touch(tmp_path / "llama-server")
    assert not Build(tmp_path, None, "--llama-cpp").runs_expert_groups
    (tmp_path / "llama-server").write_bytes(b"\x7fELF..." + VERSION_KEY.encode() + b"\0...")
    assert Build(tmp_path, None, "--llama-cpp").runs_expert_groups


def test_versions() -> None:
    built = "\nbuilt with GNU 12.2.0 for Linux x86_64\n"
    assert read_version(f"version: 0.5.0-dev (build 7012, commit 1a2b3c4){built}") == ToolVersion(
        "0.5.0-dev", 7012, "1a2b3c4"
    )
    unknown = read_version(f"version: 0.5.0-dev (build 0, commit unknown){built}")
    assert unknown == ToolVersion("0.5.0-dev", None, None)
    logged = "ggml_cuda_init: found 1 CUDA devices:\n"
    assert read_version(f"{logged}version: 6431 (d82f6aa34){built}") == ToolVersion(None, 6431, "d82f6aa34")
    assert read_version("usage: llama-server [options]") == ToolVersion(None, None, None)
    assert same_version("0.5.0-dev", "0.5.0")
    assert same_version("0.5.0", "0.5.0")
    assert not same_version("0.5.1", "0.5.0")
    assert not same_version("0.50.0", "0.5.0")
    assert not same_version("", "")


@pytest.mark.runtime
def test_the_table_of_versions_has_the_one_in_use() -> None:
    expected = LLAMA_CPP_OF_BINDING[pinned_version()]
    assert same_version(import_llama_cpp().llama_version().decode(), expected)
    assert wrong_defaults(import_llama_cpp()) == ""


@pytest.mark.runtime
def test_the_binding_and_a_library(bf16_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that fits; another version; none; a file that is no library; a process that crashes."""
    stock = require_runtime(STOCK).bin
    assert why_the_binding_cannot(stock, bf16_gguf, 0) is None
    assert "no shared libllama" in (why_the_binding_cannot(None, bf16_gguf, 0) or "")
    touch(tmp_path / "libllama.so", tmp_path / "libggml-base.so")
    assert "does not load this llama.cpp" in (why_the_binding_cannot(tmp_path, bf16_gguf, 0) or "")
    monkeypatch.setattr(under_test, "LLAMA_CPP_OF_BINDING", {pinned_version(): "0.4.9"})
    said = why_the_binding_cannot(stock, bf16_gguf, 0) or ""
    assert "this llama.cpp is 0.5" in said
    assert "is made for 0.4.9" in said


def test_a_crash_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    crash = tmp_path / "python"
    crash.write_text("#!/bin/sh\nkill -SEGV $$\n")
    crash.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(crash))
    assert "was ended by SIGSEGV" in (why_the_binding_cannot(tmp_path, tmp_path / "m.gguf", 0) or "")


def test_the_variable_s_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.platform", "linux")
    touch(tmp_path / "libggml-base.so")
    monkeypatch.setenv(LIBRARY_VARIABLE, str(tmp_path))
    assert find_build(None) == Build(tmp_path, tmp_path, LIBRARY_VARIABLE)


def test_shifted_structures_are_seen() -> None:
    class Shifted:
        def llama_context_default_params(self) -> object:
            names = {"n_ctx": 512, "n_batch": 2048, "n_ubatch": 512, "n_seq_max": 1, "type_k": 0, "type_v": 1}
            return type("Params", (), names)()

    assert wrong_defaults(Shifted()) == "type_k is 0"  # type: ignore[arg-type]
