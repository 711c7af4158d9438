"""What nvidia-smi says, and what becomes of it, with a stand-in for the program."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from mopeq_edge.errors import RuntimeMissingError
from mopeq_edge.runtime import cmake
from mopeq_edge.runtime.cmake import cmake_options, find_build_tools
from mopeq_edge.runtime.gpu import cuda_arch, cuda_backend, has_gpu

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="the stand-ins are shell scripts")


def script(path: Path, text: str) -> Path:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only folder on PATH."""
    folder = tmp_path / "programs"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    return folder


def nvidia_smi(folder: Path, capabilities: str, code: int = 0) -> None:
    script(
        folder / "nvidia-smi",
        f'case "$*" in\n-L) echo "GPU 0: stand-in (UUID: x)";;\n'
        f'"--query-gpu=compute_cap --format=csv,noheader") printf "{capabilities}";;\n*) exit 9;;\nesac\nexit {code}',
    )


def test_the_oldest_gpu_decides(programs: Path) -> None:
    nvidia_smi(programs, "10.0\\n8.6\\n9.0\\n")
    assert has_gpu()
    assert cuda_backend() == "cuda86"
    nvidia_smi(programs, "12.0\\n")
    assert cuda_backend() == "cuda120"


def test_given_is_not_looked_up(programs: Path) -> None:
    assert cuda_backend("87") == cuda_backend("8.7") == "cuda87"
    for bad in ("", "orin", "8", "sm_87", "87;90"):
        with pytest.raises(RuntimeMissingError, match=r"expected a compute capability such as 87 \(Jetson Orin\)"):
            cuda_backend(bad)


@pytest.mark.parametrize(("capabilities", "code"), [("", 0), ("[N/A]\\n", 0), ("8.6\\n", 6), (None, 0)])
def test_no_gpu_is_one_line(programs: Path, capabilities: str | None, code: int) -> None:
    if capabilities is not None:
        nvidia_smi(programs, capabilities, code)
    assert has_gpu() == (capabilities is not None and code == 0)
    with pytest.raises(RuntimeMissingError, match="--cuda-arch, for example 87 for Jetson Orin"):
        cuda_backend()


def test_what_cmake_is_told() -> None:
    assert cuda_arch("cuda87") == "87"
    assert cuda_arch("cpu") is None
    assert {"-DGGML_CUDA=ON", "-DCMAKE_CUDA_ARCHITECTURES=87"} < set(cmake_options("cuda87"))
    assert not any("CUDA" in option for option in cmake_options("cpu"))
    for bad in ("cuda", "vulkan", ""):
        with pytest.raises(ValueError, match="backend must be"):
            cmake_options(bad)


def test_nvcc_is_looked_for_where_it_is_put(programs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("cmake", "cc", "c++"):
        script(programs / name, "")
    for name in ("CC", "CXX", "CUDACXX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(cmake, "_USUAL_NVCC", tmp_path / "cuda" / "nvcc")
    assert find_build_tools().nvcc is None
    with pytest.raises(RuntimeMissingError, match="no CUDA compiler was found"):
        find_build_tools(cuda=True)
    (tmp_path / "cuda").mkdir()
    usual = script(tmp_path / "cuda" / "nvcc", "")
    assert find_build_tools(cuda=True).nvcc == usual
    on_path = script(programs / "nvcc", "")
    assert find_build_tools(cuda=True).nvcc == on_path
    monkeypatch.setenv("CUDACXX", "no-such-nvcc")
    with pytest.raises(RuntimeMissingError, match="looked for CUDACXX=no-such-nvcc"):
        find_build_tools(cuda=True)


def test_cmake_learns_of_nvcc(tmp_path: Path) -> None:
    """CMake reads CUDACXX; a path on the command line would get into the build's stamp."""
    told = script(tmp_path / "cmake", f'echo "$CUDACXX" > {tmp_path}/told')
    tools = cmake.BuildTools(told, None, tmp_path / "nvcc")
    cmake.CMakeBuild(tools, tmp_path, tmp_path / "build").configure([])
    assert (tmp_path / "told").read_text() == f"{tmp_path}/nvcc\n"
