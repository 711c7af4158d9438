"""Which files need the patched llama.cpp, and which llama.cpp is patched."""

from __future__ import annotations

import mmap
from pathlib import Path

from mopeq_edge.errors import FormatError, MopeqError, RuntimeMissingError
from mopeq_edge.expert_groups.layout import VERSION, VERSION_KEY
from mopeq_edge.gguf_file import GGUFHeader, ValueType, read_header
from mopeq_edge.runtime.locate import library_path


def groups_version(header: GGUFHeader) -> int | None:
    """Version of the expert groups in a file, None for a stock file.

    Looks at the key alone, so that the first part of a split file will do. Raises FormatError for a version that
    neither we nor our patch know.
    """
    kv = header.kvs.get(VERSION_KEY)
    if kv is None:
        return None
    if (kv.type, kv.value) != (ValueType.UINT32, VERSION):
        raise FormatError(
            f"{header.path}: {VERSION_KEY} is {kv.value!r} ({kv.type.name}), expected {VERSION} (UINT32); "
            "update mopeq-edge, or make the file again"
        )
    return VERSION


def runs_expert_groups(directory: Path) -> bool:
    """Whether the libllama in ``directory`` reads expert groups: then it has their key in its text."""
    try:
        return knows_expert_groups(library_path("llama", directory))
    except RuntimeMissingError:
        return False


def knows_expert_groups(binary: Path) -> bool:
    """The same of one file: libllama, or a program that it is linked into."""
    try:
        with binary.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
            return text.find(VERSION_KEY.encode()) >= 0
    except (OSError, ValueError):
        return False


def why_it_does_not_load(file: Path, directory: Path) -> str | None:
    """One line if ``file`` has expert groups and the llama.cpp in ``directory`` is not patched, else None."""
    try:
        version = groups_version(read_header(file))
    except MopeqError:
        return None
    if version is None or runs_expert_groups(directory):
        return None
    return not_patched(file, version, f"the llama.cpp in {directory}", "leave LLAMA_CPP_LIB_PATH unset and use")


def not_patched(file: Path, version: int, where: str, remedy: str) -> str:
    """The error for a per-expert file and a llama.cpp, ``where``, that is not patched."""
    return (
        f"{file}: has experts of different types (expert groups, version {version}), which {where} does not run; "
        f"{remedy} the patched llama.cpp (mopeq-edge runtime install)"
    )
