"""Stand-ins for installed builds: shell scripts as tools, and a libllama that knows expert groups or not."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from mopeq_edge.gguf_file import KV, ValueType
from mopeq_edge.gguf_layout import layout
from mopeq_edge.runtime.locate import TOOLS, pinned_version

PATCHES = {"a.patch": b"x"}
PATCHED = "groupsf4849e441f"
"""Name of the build that `PATCHES` make."""

KEY = "mopeq.expert_groups.version"
_PREFIX, _SUFFIX = {"darwin": ("lib", ".dylib"), "win32": ("", ".dll")}.get(sys.platform, ("lib", ".so"))

# One argument a line between brackets, so that nothing of it is lost.
SCRIPT = '#!/bin/sh\necho "$0"\nfor a in "$@"; do printf "[%s]\\n" "$a"; done\nexit 7\n'


def write_libraries(directory: Path, *, patched: bool) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / f"{_PREFIX}ggml-base{_SUFFIX}").write_bytes(b"")
    key = KEY.encode() if patched else b"general.architecture"
    (directory / f"{_PREFIX}llama{_SUFFIX}").write_bytes(b"\x7fELF" + bytes(9000) + b"\0" + key + b"\0")
    return directory


def write_tools(directory: Path, script: str = SCRIPT) -> Path:
    for name in TOOLS:
        (directory / name).write_text(script)
        (directory / name).chmod(0o755)
    return directory


def write_build(cache: Path, build: str, *, patched: bool | None = None) -> Path:
    """An installed build in the cache root ``cache``; patched if its name says so."""
    directory = cache / f"llama.cpp-{pinned_version()}-{build}"
    write_tools(write_libraries(directory / "bin", patched=build.startswith("groups") if patched is None else patched))
    stamp = {"format": 1, "version": pinned_version(), "build": build}
    (directory / "runtime.json").write_text(json.dumps(stamp))
    return directory / "bin"


def write_file(path: Path, version: KV | None = None) -> Path:
    """A GGUF without tensors; ``version`` is its version of expert groups."""
    kvs = {"general.architecture": KV(ValueType.STRING, "olmoe")}
    path.write_bytes(layout(kvs | ({KEY: version} if version else {}), []).header)
    return path


def write_per_expert(path: Path) -> Path:
    return write_file(path, KV(ValueType.UINT32, 1))
