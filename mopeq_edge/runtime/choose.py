"""Choose the llama.cpp that runs a file."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from mopeq_edge.errors import RuntimeMissingError
from mopeq_edge.llama_cpp.bundle import STOCK, build_name
from mopeq_edge.runtime.gpu import cuda_backend, has_gpu
from mopeq_edge.runtime.locate import (
    LIBRARY_VARIABLE,
    Runtime,
    executable_suffix,
    installed_builds,
    library_dir,
    require_runtime,
    tool,
)
from mopeq_edge.runtime.per_expert import groups_version, not_patched, runs_expert_groups
from mopeq_edge.split import read_parts


@dataclass(frozen=True)
class Start:
    """A tool to start for a file: the program, and one line that says what the file is and what runs it."""

    program: Path
    message: str


def prepare_start(name: str, file: Path, build: str = "auto") -> Start:
    """Choose the tool ``name`` for the GGUF ``file``; ``build`` is a key of `BUILDS`.

    Raises FormatError if the file cannot be read or has an unknown version of expert groups, SourceError if it is
    another file than the first of a split one or if one is missing, RuntimeMissingError if the build is not installed,
    lacks the tool, or does not run the file.
    """
    version = groups_version(read_parts(file)[0])
    chosen = _from_variable(name) if build == "auto" else None
    if chosen is None:
        runtime = BUILDS[build]()
        chosen = (runtime.build_id, tool(name, runtime))
    where, program = chosen
    if version is None:
        return Start(program, f"{file}: stock GGUF: runs in any llama.cpp")
    if not runs_expert_groups(program.parent):
        remedy = {"stock": "leave out --build stock and use"}.get(build, "use")
        if where.startswith(LIBRARY_VARIABLE):
            remedy = f"unset {LIBRARY_VARIABLE} and use"
        raise RuntimeMissingError(not_patched(file, version, f"this llama.cpp ({where})", remedy))
    return Start(
        program,
        f"{file}: expert groups, version {version} (per-expert types): running in the patched llama.cpp {where}",
    )


def _from_variable(name: str) -> tuple[str, Path] | None:
    """The tool beside the libraries that $LLAMA_CPP_LIB_PATH names: a llama.cpp of the user's own."""
    chosen = os.environ.get(LIBRARY_VARIABLE)
    if not chosen:
        return None
    program = library_dir() / (name + executable_suffix())
    if not program.is_file():
        raise RuntimeMissingError(
            f"{LIBRARY_VARIABLE}={chosen} has no {name}; unset it, or choose a build with --build cpu, cuda or stock"
        )
    return f"{LIBRARY_VARIABLE}={chosen}", program


def _auto() -> Runtime:
    cuda = _find_cuda()
    return cuda if cuda is not None and has_gpu() else require_runtime()


def _cuda() -> Runtime:
    found = _find_cuda()
    if found is None:
        raise RuntimeMissingError("no CUDA build of llama.cpp is installed; run: mopeq-edge runtime install --cuda")
    return found


def _find_cuda() -> Runtime | None:
    """The patched CUDA build; of several the one for this machine's GPU, else the first."""
    ours = f"{build_name()}-cuda"
    found = [runtime for runtime in installed_builds() if runtime.build_id.startswith(ours)]
    if len(found) > 1:
        try:
            own = f"{build_name()}-{cuda_backend()}"
        except RuntimeMissingError:
            own = ""
        found.sort(key=lambda runtime: runtime.build_id != own)
    return found[0] if found else None


BUILDS: Mapping[str, Callable[[], Runtime]] = {
    "auto": _auto,
    "cpu": lambda: require_runtime(build_name()),
    "cuda": _cuda,
    "stock": lambda: require_runtime(STOCK),
}
"""What ``--build`` takes. auto: $LLAMA_CPP_LIB_PATH, else cuda if it is installed and there is a GPU, else cpu."""
