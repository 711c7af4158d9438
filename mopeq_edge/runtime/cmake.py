"""Configure and build llama.cpp with CMake."""

from __future__ import annotations

import os
import platform
import re
import shlex
import shutil
import sys
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mopeq_edge.errors import RuntimeMissingError
from mopeq_edge.progress import Progress
from mopeq_edge.runtime.gpu import cuda_arch
from mopeq_edge.runtime.locate import CPU
from mopeq_edge.runtime.process import describe_exit, last_words, run_lines

CPU_OPTIONS = ("-DGGML_METAL=OFF",)
CUDA_OPTIONS = ("-DGGML_CUDA=ON",)
"""Without the architecture, which the backend names."""

_LOG_LINES = 400
# NVIDIA's packages put it there and not on PATH.
_USUAL_NVCC = Path("/usr/local/cuda/bin/nvcc")
_C_COMPILERS = ("cc", "gcc", "clang")
_CXX_COMPILERS = ("c++", "g++", "clang++")
_NINJA_COUNT = re.compile(r"^\[\s*(\d+)/(\d+)\]")
_MAKE_PERCENT = re.compile(r"^\[\s*(\d+)%\]")
# What explains most comes first: ninja says FAILED before it shows the compiler's error.
_COMPLAINTS = (
    re.compile(r"CMake Error|\berror( [A-Z]+\d+)?:", re.IGNORECASE),
    re.compile(r"\*\*\*|^FAILED"),
)
_FILE_SYSTEM_FULL = "No space left on device"


@dataclass(frozen=True)
class BuildTools:
    """The programs that build: cmake, ninja if there is one, and nvcc for a CUDA build."""

    cmake: Path
    ninja: Path | None
    nvcc: Path | None = None


def find_build_tools(*, cuda: bool = False) -> BuildTools:
    """Look on PATH and beside this Python, where pip puts the cmake and ninja wheels.

    Raises RuntimeMissingError that names what to install: cmake, a C or C++ compiler, or with ``cuda`` nvcc.
    """
    cmake = _find_program("cmake")
    if cmake is None:
        raise RuntimeMissingError("cmake, which builds llama.cpp, was not found; run: pip install cmake ninja")
    # On Windows CMake finds Visual Studio by itself, off PATH.
    if sys.platform != "win32":
        _check_compiler("C", "CC", _C_COMPILERS)
        _check_compiler("C++", "CXX", _CXX_COMPILERS)
    return BuildTools(cmake, _find_program("ninja"), _find_nvcc() if cuda else None)


def cmake_options(backend: str) -> tuple[str, ...]:
    """What CMake is told about the build, apart from paths of this machine.

    ``backend`` is "cpu", or "cuda" with the architecture, e.g. "cuda87". Raises ValueError for another one.
    """
    arch = cuda_arch(backend)
    if arch is None and backend != CPU:
        raise ValueError(f"backend must be cpu or cuda with an architecture, such as cuda87, got {backend!r}")
    beside_itself = "@loader_path" if sys.platform == "darwin" else "$ORIGIN"
    options: tuple[str, ...] = (
        "-DCMAKE_BUILD_TYPE=Release",
        "-DBUILD_SHARED_LIBS=ON",
        "-DCMAKE_BUILD_WITH_INSTALL_RPATH=ON",
        f"-DCMAKE_INSTALL_RPATH={beside_itself}",
        "-DGGML_CCACHE=OFF",
        "-DLLAMA_ALL_WARNINGS=OFF",
        "-DLLAMA_BUILD_APP=OFF",
        "-DLLAMA_BUILD_EXAMPLES=OFF",
        "-DLLAMA_BUILD_TESTS=OFF",
        "-DLLAMA_BUILD_UI=OFF",
        "-DLLAMA_OPENSSL=OFF",
        "-DLLAMA_USE_PREBUILT_UI=OFF",
    )
    if sys.platform == "linux":
        # Without it LD_LIBRARY_PATH wins over the libraries beside the tool, and a user's other
        # llama.cpp would be mixed with this one.
        old_tags = "-Wl,--disable-new-dtags"
        options += (
            f"-DCMAKE_EXE_LINKER_FLAGS_INIT={old_tags}",
            f"-DCMAKE_SHARED_LINKER_FLAGS_INIT={old_tags}",
        )
    if sys.platform == "linux" and platform.machine() == "x86_64":
        # GCC's tile-load intrinsic tells the compiler of 8 of its 64 bytes, so ggml's AMX kernels are
        # optimized into a crash; only server CPUs have AMX.
        no_amx = "-mno-amx-tile -mno-amx-int8 -mno-amx-bf16"
        options += (f"-DCMAKE_C_FLAGS_INIT={no_amx}", f"-DCMAKE_CXX_FLAGS_INIT={no_amx}")
    if arch is None:
        return options + CPU_OPTIONS
    return (*options, *CUDA_OPTIONS, f"-DCMAKE_CUDA_ARCHITECTURES={arch}")


class CMakeBuild:
    """One build tree. Keeps the last lines of the output for `save_log`.

    ``source`` is llama.cpp's source tree, ``tree`` the build directory to create.
    """

    def __init__(self, tools: BuildTools, source: Path, tree: Path) -> None:
        self.tree = tree
        self._tools = tools
        self._source = source
        self._log: deque[str] = deque(maxlen=_LOG_LINES)
        # The progress parser reads ninja's default status; git must not look for a repository
        # above the source and report its commit as llama.cpp's.
        self._env = {
            **os.environ,
            "NINJA_STATUS": "[%f/%t] ",
            "GIT_CEILING_DIRECTORIES": str(source.parent),
            **({"CUDACXX": str(tools.nvcc)} if tools.nvcc is not None else {}),
        }

    def configure(self, options: Sequence[str]) -> None:
        """Raises RuntimeMissingError if CMake fails."""
        command: list[str | Path] = [self._tools.cmake, "-S", self._source, "-B", self.tree, *options]
        if self._tools.ninja is not None:
            command += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={self._tools.ninja}"]
        self._check("cmake could not configure llama.cpp", run_lines(command, self._log.append, env=self._env))

    def build(self, targets: Sequence[str], jobs: int, progress: Progress) -> None:
        """Build ``targets`` with ``jobs`` compilers at once. Raises RuntimeMissingError on failure."""
        command: list[str | Path] = [self._tools.cmake, "--build", self.tree, "--config", "Release"]
        command += ["-j", str(jobs), "--target", *targets]
        with progress.step("building llama.cpp", 100) as step:
            done = 0.0

            def on_line(line: str) -> None:
                nonlocal done
                self._log.append(line)
                percent = percent_done(line)
                if percent is not None and percent > done:
                    step.advance(percent - done)
                    done = percent

            code = run_lines(command, on_line, env=self._env)
            self._check("llama.cpp could not be built", code)
            step.advance(100 - done)

    def save_log(self, path: Path) -> None:
        """Write the last lines of CMake's and the compilers' output."""
        path.write_text("".join(f"{line}\n" for line in self._log), encoding="utf-8")

    def _check(self, what: str, code: int) -> None:
        if code == 0:
            return
        if any(_FILE_SYSTEM_FULL in line for line in self._log):
            raise RuntimeMissingError(f"{what}: the disk is full; free some space")
        raise RuntimeMissingError(f"{what}: cmake {describe_exit(code)}: {_reason(list(self._log))[:300]}")


def percent_done(line: str) -> float | None:
    """Progress in a line of ninja ("[3/12] ...") or make ("[ 25%] ..."), else None."""
    count = _NINJA_COUNT.match(line)
    if count and int(count[2]):
        return min(100.0, 100 * int(count[1]) / int(count[2]))
    percent = _MAKE_PERCENT.match(line)
    return min(100.0, float(percent[1])) if percent else None


def _reason(lines: Sequence[str]) -> str:
    said = [line.strip() for line in lines if line.strip()]
    for pattern in _COMPLAINTS:
        for number, line in enumerate(said):
            if pattern.search(line):
                # CMake puts the place on one line and the reason below it.
                return " ".join(said[number : number + 2]) if line.endswith("):") else line
    return last_words(said)


def _find_program(name: str) -> Path | None:
    found = shutil.which(name) or shutil.which(name, path=str(Path(sys.executable).parent))
    return Path(found) if found else None


def _find_nvcc() -> Path:
    chosen = os.environ.get("CUDACXX")
    found = shutil.which(chosen or "nvcc") or (None if chosen else shutil.which(_USUAL_NVCC))
    if found is None:
        wanted = f"CUDACXX={chosen}" if chosen else f"nvcc on PATH and {_USUAL_NVCC}"
        raise RuntimeMissingError(
            f"no CUDA compiler was found (looked for {wanted}); install the CUDA toolkit, on Jetson "
            "the package cuda-toolkit of JetPack"
        )
    return Path(found)


def _check_compiler(language: str, variable: str, names: Sequence[str]) -> None:
    chosen = os.environ.get(variable)
    wanted = [shlex.split(chosen)[0]] if chosen else list(names)
    if not any(shutil.which(name) for name in wanted):
        raise RuntimeMissingError(
            f"no {language} compiler was found (looked for {', '.join(wanted)}); "
            "install one, for example the package build-essential or g++"
        )
