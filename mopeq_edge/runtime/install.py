"""Build the pinned llama.cpp from source into the cache, once per version and build."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from mopeq_edge.errors import RuntimeMissingError
from mopeq_edge.llama_cpp.bundle import STOCK
from mopeq_edge.progress import Progress
from mopeq_edge.runtime.cmake import CMakeBuild, cmake_options, find_build_tools
from mopeq_edge.runtime.locate import (
    BINDING,
    CACHE_VARIABLE,
    CPU,
    STAMP_FORMAT,
    STAMP_NAME,
    TOOLS,
    Runtime,
    build_id,
    cache_root,
    executable_suffix,
    find_runtime,
    library_path,
    pinned_version,
    runtime_directory,
)
from mopeq_edge.runtime.lock import exclusive_lock
from mopeq_edge.runtime.process import describe_exit, last_words, run_lines
from mopeq_edge.runtime.source import download_sdist, unpack_source

_TARGETS = (*TOOLS, "llama", "ggml", "ggml-base", "ggml-cpu", "mtmd")
_LIBRARIES = ("llama", "ggml", "ggml-base", "ggml-cpu", "mtmd")
_CONVERT_PARTS = ("convert_hf_to_gguf.py", "conversion", "gguf-py", "models/templates")
_LIBRARY_PATTERNS = ("*.so", "*.so.*", "*.dylib", "*.dll")
_SCRATCH_PATTERNS = ("llama.cpp-*.build-*", "llama.cpp-*.tmp-*", "llama.cpp-*.old-*")
_NEEDED_BYTES = 600_000_000


def install(
    progress: Progress,
    *,
    jobs: int | None = None,
    force: bool = False,
    sdist: Path | None = None,
    build: str = STOCK,
    backend: str = CPU,
    prepare: Callable[[Path], object] | None = None,
) -> Runtime:
    """Build llama.cpp and put it into the cache; return at once if it is there, unless ``force``.

    ``jobs`` compilers run at once (default: one per CPU). ``sdist`` is a source distribution of
    llama-cpp-python (archive or directory) to use instead of a download. ``build`` and ``backend``
    name the build, see `locate.build_id`; ``prepare`` is called with the private copy of the
    source tree before CMake and may change it: `apply_patches` makes the build `build_name`.

    Raises RuntimeMissingError if something is missing or fails; then no build is left behind, an
    earlier one stays, and the end of the build's output is in a file that the message names.
    """
    root = cache_root()
    found = None if force else find_runtime(build, backend)
    if found is not None:
        return found
    try:
        root.mkdir(parents=True, exist_ok=True)
        lock = exclusive_lock(
            root / "runtime.lock",
            lambda: progress.note("another installation of llama.cpp runs; waiting for it"),
        )
        with lock:
            _put_back(root)
            found = None if force else find_runtime(build, backend)
            if found is not None:
                return found
            # Nobody else works here while we hold the lock: these are left from a crash.
            for pattern in _SCRATCH_PATTERNS:
                for path in root.glob(pattern):
                    shutil.rmtree(path, ignore_errors=True)
            return _install(progress, jobs or _cpu_count(), sdist, build, backend, prepare)
    except OSError as error:
        raise RuntimeMissingError(_explain(error, root)) from error


def _install(
    progress: Progress,
    jobs: int,
    sdist: Path | None,
    build: str,
    backend: str,
    prepare: Callable[[Path], object] | None,
) -> Runtime:
    target = runtime_directory(build, backend)
    work, staged, old, log = (
        target.with_name(f"{target.name}.{suffix}")
        for suffix in (f"build-{os.getpid()}", f"tmp-{os.getpid()}", f"old-{os.getpid()}", "log")
    )
    version = pinned_version()
    tools = find_build_tools(cuda=backend != CPU)
    _check_space(target.parent)
    try:
        if sdist is None:
            with progress.step(f"downloading {BINDING} {version}", None):
                sdist = download_sdist(version, work / "download")
        source = unpack_source(sdist, work / "source", version)
        if prepare is not None:
            prepare(source)
        tree = CMakeBuild(tools, source, work / "build")
        options = cmake_options(backend)
        try:
            tree.configure(options)
            tree.build(_TARGETS, jobs, progress)
        except RuntimeMissingError as error:
            tree.save_log(log)
            raise RuntimeMissingError(f"{error}; see {log}") from error
        _copy_binaries(tree.tree / "bin", staged / "bin")
        _copy_converter(source, staged / "convert")
        _check_starts(staged / "bin")
        _write_stamp(staged, version, build_id(build, backend), backend, options)
        _replace(target, staged, old)
        log.unlink(missing_ok=True)
    finally:
        for path in (work, staged):
            shutil.rmtree(path, ignore_errors=True)
    return Runtime(version, build_id(build, backend), target)


def _copy_binaries(built: Path, into: Path) -> None:
    """Tools and every shared library, with the links that carry the libraries' sonames."""
    into.mkdir(parents=True)
    # Generators for several configurations, such as Visual Studio's, add a directory.
    built = built / "Release" if (built / "Release").is_dir() else built
    names = [name + executable_suffix() for name in TOOLS]
    files = [built / name for name in names]
    missing = [path.name for path in files if not path.is_file()]
    if missing:
        raise RuntimeMissingError(f"the build of llama.cpp made no {', '.join(missing)}")
    for pattern in _LIBRARY_PATTERNS:
        files += sorted(built.glob(pattern))
    for file in files:
        # Links to a neighbour move along; a link that leads elsewhere becomes a file.
        neighbour = file.is_symlink() and os.readlink(file) == os.path.basename(os.readlink(file))
        shutil.copy2(file, into / file.name, follow_symlinks=not neighbour)
    for stem in _LIBRARIES:
        try:
            library_path(stem, into)
        except RuntimeMissingError as error:
            raise RuntimeMissingError(f"the build of llama.cpp made no library {stem}") from error


def _copy_converter(source: Path, into: Path) -> None:
    for part in _CONVERT_PARTS:
        (into / part).parent.mkdir(parents=True, exist_ok=True)
        if (source / part).is_dir():
            shutil.copytree(source / part, into / part, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy2(source / part, into / part)


def _check_starts(directory: Path) -> None:
    """A tool that cannot load its libraries from where they now are must not get a stamp."""
    lines: list[str] = []
    name = "llama-imatrix"
    code = run_lines([directory / (name + executable_suffix()), "--version"], lines.append)
    if code != 0:
        raise RuntimeMissingError(
            f"llama.cpp was built but does not run: {name} {describe_exit(code)}: {last_words(lines)}"
        )


def _write_stamp(directory: Path, version: str, name: str, backend: str, options: tuple[str, ...]) -> None:
    stamp = {
        "backend": backend,
        "build": name,
        "cmake_options": sorted(options),
        "format": STAMP_FORMAT,
        "tools": sorted(TOOLS),
        "version": version,
    }
    text = json.dumps(stamp, indent=2, sort_keys=True) + "\n"
    (directory / STAMP_NAME).write_text(text, encoding="utf-8")


def _put_back(root: Path) -> None:
    """An earlier build that was moved away by an installation that was killed before the new one took its place."""
    for old in sorted(root.glob("llama.cpp-*.old-*")):
        target = old.with_name(old.name.rpartition(".old-")[0])
        if not target.exists():
            old.rename(target)


def _replace(target: Path, staged: Path, old: Path) -> None:
    if target.exists():
        target.rename(old)
    try:
        staged.rename(target)
    except OSError:
        if old.exists():
            old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _check_space(root: Path) -> None:
    free = shutil.disk_usage(root).free
    if free < _NEEDED_BYTES:
        raise RuntimeMissingError(
            f"{root}: building llama.cpp needs {_NEEDED_BYTES / 1e9:.1f} GB, {free / 1e9:.1f} GB are free; "
            f"free some space or set {CACHE_VARIABLE} to a directory on another disk"
        )


def _explain(error: OSError, root: Path) -> str:
    if error.errno == errno.ENOSPC:
        return f"{root}: the disk is full; free some space or set {CACHE_VARIABLE} to another disk"
    where = error.filename or root
    return (
        f"llama.cpp could not be installed: {where}: {error.strerror or error}; "
        f"{CACHE_VARIABLE} can name another directory for it"
    )


def _cpu_count() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
