"""The llama.cpp under test: its tools, its library, and whether the Python binding may load that library."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from mopeq_edge.errors import RuntimeMissingError
from mopeq_edge.runtime.choose import BUILDS
from mopeq_edge.runtime.locate import (
    LIBRARY_VARIABLE,
    executable_suffix,
    library_dir,
    library_path,
    pinned_version,
)
from mopeq_edge.runtime.per_expert import knows_expert_groups, runs_expert_groups
from mopeq_edge.runtime.process import describe_exit, version_output

OPTION, INSTALLED, PACKAGE = "--llama-cpp", "runtime", "llama-cpp-python"
LOOKED_FOR = ("llama-server", "llama-cli", "llama-bench")

LLAMA_CPP_OF_BINDING = {"0.3.36": "0.5.0"}
"""llama.cpp's own version by the release of llama-cpp-python whose structures describe it."""

PROBE_SECONDS = 1800
"""A model is loaded in that time, from a card perhaps."""


@dataclass(frozen=True)
class Build:
    """``tools`` and ``library`` are directories, None where there is none; ``given_by`` says what chose the build."""

    tools: Path | None
    library: Path | None
    given_by: str

    @property
    def is_own(self) -> bool:
        """Whether it is the user's own build, so that the binding need not fit it."""
        return self.given_by in (OPTION, LIBRARY_VARIABLE)

    def tool(self, name: str) -> Path | None:
        """The program, None if the build lacks it."""
        path = self.tools / (name + executable_suffix()) if self.tools is not None else None
        return path if path is not None and path.is_file() else None

    @property
    def runs_expert_groups(self) -> bool:
        """Whether it is patched; without a shared library the programs show it."""
        if self.library is not None:
            return runs_expert_groups(self.library)
        return any(program is not None and knows_expert_groups(program) for program in map(self.tool, LOOKED_FOR))


def find_build(directory: Path | None) -> Build:
    """The build in ``directory``: a cmake build tree, a checkout, or a folder with ``bin``.

    Without it the one of $LLAMA_CPP_LIB_PATH, else the installed one, for CUDA where there is a GPU, else the libraries
    of a llama-cpp-python that brought its own. Raises :class:`RuntimeMissingError` if there is none.
    """
    if directory is not None:
        return _in_directory(directory)
    if os.environ.get(LIBRARY_VARIABLE):
        return Build(library_dir(), library_dir(), LIBRARY_VARIABLE)
    try:
        runtime = BUILDS["auto"]()
    except RuntimeMissingError:
        return Build(None, library_dir(), PACKAGE)
    return Build(runtime.bin, runtime.bin, INSTALLED)


def _in_directory(directory: Path) -> Build:
    places = [directory / name for name in ("bin", "build/bin", "build/bin/Release", "bin/Release", ".")]
    for place in places:
        if any((place / (name + executable_suffix())).is_file() for name in LOOKED_FOR):
            beside = (place, place.parent / "lib", place.parent / "lib64")
            return Build(place.resolve(), next((p.resolve() for p in beside if _has_libraries(p)), None), OPTION)
    raise RuntimeMissingError(
        f"{OPTION} {directory}: expected a build of llama.cpp with {', '.join(LOOKED_FOR)}, found none of them in "
        "it, its bin or its build/bin; build it with: cmake --build build --target llama-server llama-cli llama-bench"
    )


def _has_libraries(directory: Path) -> bool:
    try:
        return all(library_path(stem, directory) for stem in ("llama", "ggml-base"))
    except RuntimeMissingError:
        return False


@dataclass(frozen=True)
class ToolVersion:
    """What ``--version`` says; None for what it does not say, as the number and commit of a build without git."""

    version: str | None
    build_number: int | None
    commit: str | None


def tool_version(program: Path) -> ToolVersion:
    """From "version: 0.5.0-dev (build 7012, commit 1a2b3c4)", or of earlier builds "version: 7012 (1a2b3c4)"."""
    output = version_output(program, seconds=60)
    return ToolVersion(None, None, None) if output is None else read_version(output)


def read_version(text: str) -> ToolVersion:
    """The same of the tool's words."""
    match = re.search(r"^version: (\S+) \(build (\d+), commit (\w+)\)", text, re.MULTILINE)
    if match is not None:
        return ToolVersion(match[1], _number(match[2]), _commit(match[3]))
    match = re.search(r"^version: (\d+) \((\w+)\)", text, re.MULTILINE)
    if match is not None:
        return ToolVersion(None, _number(match[1]), _commit(match[2]))
    return ToolVersion(None, None, None)


def _number(text: str) -> int | None:
    return int(text) or None


def _commit(text: str) -> str | None:
    return None if text == "unknown" else text


def why_the_binding_cannot(library: Path | None, model: Path, n_gpu_layers: int) -> str | None:
    """None if the binding can use the libraries in ``library``, else why not, in a line.

    A process of its own loads the library, compares its version and the structures that it fills in with the binding's,
    and loads ``model``: with structures of another version it may crash, and a crash must not take the report along.
    """
    if library is None:
        return "the build has no shared libllama (it needs -DBUILD_SHARED_LIBS=ON)"
    expected = LLAMA_CPP_OF_BINDING.get(pinned_version(), "")
    command = [sys.executable, "-m", "mopeq_edge.device_report.binding_probe"]
    request = json.dumps({"expected": expected, "model": os.fspath(model), "n_gpu_layers": n_gpu_layers})
    # the same code as in this process, wherever that was started
    paths = [os.fspath(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, LIBRARY_VARIABLE: os.fspath(library), "PYTHONPATH": os.pathsep.join(paths)}
    try:
        done = subprocess.run(
            command,
            input=request,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            env=environment,
            timeout=PROBE_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"the library in {library} did not load the file in {PROBE_SECONDS} seconds"
    if done.returncode == 0:
        return None
    said = [line for line in done.stdout.splitlines() if line.startswith("reason: ")]
    if said:
        return said[-1].removeprefix("reason: ")
    return f"a process with the library in {library} {describe_exit(done.returncode)}"


def same_version(library: str, expected: str) -> bool:
    """Whether "0.5.0-dev" is a build of "0.5.0"."""
    return bool(expected) and library.partition("-")[0] == expected
