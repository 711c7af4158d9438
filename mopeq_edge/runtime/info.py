"""What is installed and what would be used."""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

from mopeq_edge.errors import RuntimeMissingError
from mopeq_edge.runtime.locate import (
    LIBRARY_VARIABLE,
    STAMP_NAME,
    TOOLS,
    Runtime,
    cache_root,
    find_runtime,
    library_dir,
    pinned_version,
    tool,
)


@dataclass(frozen=True)
class ToolInfo:
    """One tool: its file, None if missing, and its version line, None if it prints none."""

    name: str
    path: Path | None
    version: str | None


@dataclass(frozen=True)
class RuntimeInfo:
    """State of the llama.cpp runtime.

    ``runtime`` is the stock build for the installed binding, ``others`` are directories in the
    cache that this binding does not use, ``library_error`` says why ``library_dir`` is None,
    ``library_chosen`` is true if $LLAMA_CPP_LIB_PATH decided it.
    """

    binding_version: str
    cache: Path
    runtime: Runtime | None
    tools: tuple[ToolInfo, ...]
    library_dir: Path | None
    library_error: str | None
    library_chosen: bool
    others: tuple[str, ...]

    @property
    def binding_matches(self) -> bool | None:
        """Whether the libraries are those that the Python binding was made for; None if unknown.

        The stock build and the libraries inside the package match by construction; libraries that
        $LLAMA_CPP_LIB_PATH names carry no release that could be compared.
        """
        if self.library_dir is None:
            return False
        ours = self.runtime is not None and self.library_dir.resolve() == self.runtime.bin.resolve()
        return True if ours or not self.library_chosen else None


def collect_info() -> RuntimeInfo:
    """Look at the installed runtime; starts each tool once for its version.

    Raises RuntimeMissingError only if llama-cpp-python itself is not installed.
    """
    version = pinned_version()
    runtime = find_runtime()
    libraries, problem = None, None
    try:
        libraries = library_dir()
    except RuntimeMissingError as error:
        problem = str(error)
    root = cache_root()
    return RuntimeInfo(
        binding_version=version,
        cache=root,
        runtime=runtime,
        tools=tuple(_tool_info(name, runtime) for name in TOOLS) if runtime else (),
        library_dir=libraries,
        library_error=problem,
        library_chosen=bool(os.environ.get(LIBRARY_VARIABLE)),
        others=tuple(
            sorted(
                stamp.parent.name
                for stamp in root.glob(f"llama.cpp-*/{STAMP_NAME}")
                if runtime is None or stamp.parent != runtime.directory
            )
        ),
    )


def _tool_info(name: str, runtime: Runtime) -> ToolInfo:
    try:
        path = tool(name, runtime)
    except RuntimeMissingError:
        return ToolInfo(name, None, None)
    try:
        done = subprocess.run(
            [path, "--version"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            errors="replace",
            timeout=20,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ToolInfo(name, path, None)
    # llama-quantize has no --version and prints its usage.
    lines = [line for line in done.stdout.splitlines() if line.startswith("version:")]
    return ToolInfo(name, path, lines[0].removeprefix("version:").strip() if lines else None)
