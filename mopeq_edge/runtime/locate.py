"""Where llama.cpp is: the installed build, its tools, and the shared libraries to load.

Nothing here imports ``llama_cpp`` by itself, because that package loads libllama at import.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import json
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from mopeq_edge.errors import RuntimeMissingError
from mopeq_edge.llama_cpp.bundle import STOCK, build_name

CACHE_VARIABLE = "MOPEQ_EDGE_CACHE"
LIBRARY_VARIABLE = "LLAMA_CPP_LIB_PATH"
BINDING = "llama-cpp-python"

CPU = "cpu"

STAMP_NAME = "runtime.json"
STAMP_FORMAT = 1

TOOLS = (
    "llama-bench",
    "llama-cli",
    "llama-completion",
    "llama-imatrix",
    "llama-mtmd-cli",
    "llama-perplexity",
    "llama-quantize",
    "llama-server",
    "llama-tokenize",
)


@dataclass(frozen=True)
class Runtime:
    """One complete build of llama.cpp on disk.

    ``version`` is the llama-cpp-python release whose llama.cpp was built, ``build_id`` tells
    builds of one version apart (see `build_id`), ``directory`` holds everything.
    """

    version: str
    build_id: str
    directory: Path

    @property
    def bin(self) -> Path:
        """Tools and shared libraries, side by side, so that the tools find their libraries."""
        return self.directory / "bin"

    @property
    def convert(self) -> Path:
        """``convert_hf_to_gguf.py`` and the Python packages that it imports."""
        return self.directory / "convert"


def cache_root() -> Path:
    """Directory of everything that mopeq-edge installs: $MOPEQ_EDGE_CACHE or ~/.cache/mopeq-edge."""
    chosen = os.environ.get(CACHE_VARIABLE)
    return Path(chosen).expanduser().absolute() if chosen else Path.home() / ".cache" / "mopeq-edge"


def pinned_version() -> str:
    """Version of the installed llama-cpp-python, whose own llama.cpp is the one to build.

    Raises RuntimeMissingError if the package is not installed.
    """
    try:
        version = importlib.metadata.version(BINDING)
    except importlib.metadata.PackageNotFoundError as error:
        raise RuntimeMissingError(
            f"the Python package {BINDING} is not installed; run: pip install {BINDING}"
        ) from error
    # Prebuilt wheels add a local label such as +cu124; the source release has none.
    return version.split("+")[0]


def build_id(build: str = STOCK, backend: str = CPU) -> str:
    """Name of one build of a version: ``build`` is "stock" or `build_name`, ``backend`` e.g. "cuda87".

    Raises ValueError for names that could not be a part of a file name.
    """
    for part in (build, backend):
        if not re.fullmatch(r"[a-z0-9]+", part):
            raise ValueError(f"build and backend must match [a-z0-9]+, got {part!r}")
    return build if backend == CPU else f"{build}-{backend}"


def runtime_directory(build: str = STOCK, backend: str = CPU) -> Path:
    """Where the build of the pinned version belongs, whether or not it is there."""
    return cache_root() / f"llama.cpp-{pinned_version()}-{build_id(build, backend)}"


def find_runtime(build: str | None = None, backend: str = CPU) -> Runtime | None:
    """The installed build of the pinned version, or None if there is no complete one.

    Without ``build`` it is the patched llama.cpp, which does all that the stock one does, or the
    stock one where only that is installed.

    A build is complete when its stamp is there and readable: the installer writes it last. A stamp
    in another format counts as not installed.
    """
    if build is None:
        return find_runtime(build_name(), backend) or find_runtime(STOCK, backend)
    directory = runtime_directory(build, backend)
    stamp = _read_stamp(directory / STAMP_NAME)
    if stamp is None:
        return None
    found = Runtime(pinned_version(), build_id(build, backend), directory)
    if (stamp.get("version"), stamp.get("build")) != (found.version, found.build_id):
        return None
    return found


def installed_builds() -> tuple[Runtime, ...]:
    """Every complete build of the pinned version, by name."""
    version = pinned_version()
    prefix = f"llama.cpp-{version}-"
    found = []
    for path in sorted(cache_root().glob(f"{prefix}*/{STAMP_NAME}")):
        name = path.parent.name.removeprefix(prefix)
        stamp = _read_stamp(path)
        if stamp is not None and (stamp.get("version"), stamp.get("build")) == (version, name):
            found.append(Runtime(version, name, path.parent))
    return tuple(found)


def require_runtime(build: str | None = None, backend: str = CPU) -> Runtime:
    """Like `find_runtime`, but raises RuntimeMissingError that says how to install it."""
    found = find_runtime(build, backend)
    if found is None:
        name = build_id(build_name() if build is None else build, backend)
        options = (" --stock" if build == STOCK != build_name() else "") + ("" if backend == CPU else " --cuda")
        raise RuntimeMissingError(
            f"llama.cpp of {BINDING} {pinned_version()} (build {name}) is not "
            f"installed in {cache_root()}; run: mopeq-edge runtime install{options}"
        )
    return found


def tool(name: str, runtime: Runtime | None = None) -> Path:
    """Path of a llama.cpp tool such as "llama-quantize", by default of the installed build.

    Raises RuntimeMissingError if there is no build or the build lacks the tool.
    """
    runtime = runtime or require_runtime()
    path = runtime.bin / (name + executable_suffix())
    if not path.is_file():
        raise RuntimeMissingError(f"{name} is missing from {runtime.bin}; run: mopeq-edge runtime install --force")
    return path


def executable_suffix() -> str:
    """What the file name of a program ends in on this system."""
    return ".exe" if sys.platform == "win32" else ""


def library_dir() -> Path:
    """Directory of libllama and libggml: $LLAMA_CPP_LIB_PATH, else those of `find_runtime`, for the
    CPU, else the ``lib`` directory of a llama-cpp-python that was installed with its libraries.

    Raises RuntimeMissingError if none of them has libggml-base.
    """
    chosen = os.environ.get(LIBRARY_VARIABLE)
    if chosen:
        directory = Path(chosen)
        if _find_library("ggml-base", directory) is None:
            raise RuntimeMissingError(
                f"{LIBRARY_VARIABLE}={chosen} has no {_library_names('ggml-base')[0]}; "
                "unset it or point it to the libraries of llama.cpp"
            )
        return directory
    runtime = find_runtime()
    if runtime is not None:
        return runtime.bin
    spec = importlib.util.find_spec("llama_cpp")
    for package in (spec.submodule_search_locations or []) if spec else []:
        directory = Path(package) / "lib"
        if _find_library("ggml-base", directory) is not None:
            return directory
    raise RuntimeMissingError(
        f"the llama.cpp libraries are not installed in {cache_root()}; run: mopeq-edge runtime install"
    )


def library_path(stem: str, directory: Path | None = None) -> Path:
    """File of one shared library, e.g. stem "ggml-base"; ``directory`` defaults to `library_dir`.

    Raises RuntimeMissingError if the library is not there.
    """
    directory = library_dir() if directory is None else directory
    path = _find_library(stem, directory)
    if path is None:
        raise RuntimeMissingError(
            f"{_library_names(stem)[0]} is missing from {directory}; run: mopeq-edge runtime install --force"
        )
    return path


def import_llama_cpp() -> ModuleType:
    """The module ``llama_cpp``, bound to the libraries in `library_dir`.

    Sets $LLAMA_CPP_LIB_PATH if it is unset, since the module reads it once at its first import.
    Raises RuntimeMissingError if the libraries are missing or do not load.
    """
    if not os.environ.get(LIBRARY_VARIABLE):
        os.environ[LIBRARY_VARIABLE] = str(library_dir())
    try:
        return importlib.import_module("llama_cpp")
    except (ImportError, OSError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise RuntimeMissingError(
            f"llama_cpp does not load from {os.environ[LIBRARY_VARIABLE]}: {reason}; "
            "run: mopeq-edge runtime install --force"
        ) from error


def _read_stamp(path: Path) -> dict[str, object] | None:
    try:
        stamp = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return stamp if isinstance(stamp, dict) and stamp.get("format") == STAMP_FORMAT else None


def _library_names(stem: str) -> tuple[str, ...]:
    if sys.platform == "win32":
        # MSVC adds no prefix, MinGW does.
        return (f"{stem}.dll", f"lib{stem}.dll")
    return (f"lib{stem}.dylib",) if sys.platform == "darwin" else (f"lib{stem}.so",)


def _find_library(stem: str, directory: Path) -> Path | None:
    candidates = (directory / name for name in _library_names(stem))
    return next((path for path in candidates if path.is_file()), None)
