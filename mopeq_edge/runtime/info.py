"""What is installed and what would be used."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from mopeq_edge.errors import RuntimeMissingError
from mopeq_edge.llama_cpp.bundle import STOCK, build_name
from mopeq_edge.runtime.locate import (
    CPU,
    LIBRARY_VARIABLE,
    STAMP_NAME,
    TOOLS,
    Runtime,
    cache_root,
    find_runtime,
    installed_builds,
    library_dir,
    pinned_version,
    tool,
)
from mopeq_edge.runtime.per_expert import runs_expert_groups
from mopeq_edge.runtime.process import version_output


@dataclass(frozen=True)
class ToolInfo:
    """One tool: its file, None if missing, and its version line, None if it prints none."""

    name: str
    path: Path | None
    version: str | None


@dataclass(frozen=True)
class RuntimeInfo:
    """State of the llama.cpp runtime.

    ``runtime`` is the build in use, ``builds`` are all that are installed for this binding, each
    with a word on what it is, ``others`` are directories in the cache that this binding does not
    use. ``runs_expert_groups`` is about ``library_dir``, ``library_error`` says why that is None,
    ``library_chosen`` is true if $LLAMA_CPP_LIB_PATH decided it.
    """

    binding_version: str
    cache: Path
    runtime: Runtime | None
    tools: tuple[ToolInfo, ...]
    library_dir: Path | None
    library_error: str | None
    library_chosen: bool
    runs_expert_groups: bool
    builds: tuple[tuple[Runtime, str], ...]
    others: tuple[str, ...]

    @property
    def binding_matches(self) -> bool | None:
        """Whether the libraries are those that the Python binding was made for; None if unknown.

        Our build and the libraries inside the package match by construction; libraries that
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
    builds = installed_builds()
    return RuntimeInfo(
        binding_version=version,
        cache=root,
        runtime=runtime,
        tools=tuple(_tool_info(name, runtime) for name in TOOLS) if runtime else (),
        library_dir=libraries,
        library_error=problem,
        library_chosen=bool(os.environ.get(LIBRARY_VARIABLE)),
        runs_expert_groups=libraries is not None and runs_expert_groups(libraries),
        builds=tuple((build, _describe(build.build_id)) for build in builds),
        others=tuple(
            sorted(
                stamp.parent.name
                for stamp in root.glob(f"llama.cpp-*/{STAMP_NAME}")
                if stamp.parent not in [build.directory for build in builds]
            )
        ),
    )


def _describe(build: str) -> str:
    name, _, backend = build.partition("-")
    kinds = {build_name(): "with our patch", STOCK: "without our patch"}
    return f"{kinds.get(name, 'with an earlier patch, not used')}, for {backend or CPU}"


def _tool_info(name: str, runtime: Runtime) -> ToolInfo:
    try:
        path = tool(name, runtime)
    except RuntimeMissingError:
        return ToolInfo(name, None, None)
    output = version_output(path, seconds=20)
    if output is None:
        return ToolInfo(name, path, None)
    # llama-quantize has no --version and prints its usage.
    lines = [line for line in output.splitlines() if line.startswith("version:")]
    return ToolInfo(name, path, lines[0].removeprefix("version:").strip() if lines else None)
