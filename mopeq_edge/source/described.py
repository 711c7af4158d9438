"""What a model is, remembered: everything about a source but its weights.

Opening a checkpoint reads the headers of all its shards and its tokenizer, seconds for a large one. A plan for another
budget needs only what came out: names, shapes and key-values. They are kept in the work directory with the names,
sizes and times of the files that they were read from, and of the code that read them; if any of those changed, the
model is opened again.

The file is a GGUF without tensors, since that is how key-values are needed: those of 129,280 tokens are read in
hundredths of a second, from JSON it takes three tenths. All the rest is in a key-value of its own.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from mopeq_edge.artifacts import digest
from mopeq_edge.atomic import atomic_write
from mopeq_edge.errors import FormatError, OutputError
from mopeq_edge.ggml.types import BY_NAME
from mopeq_edge.gguf_file import KV, read_header
from mopeq_edge.gguf_layout import layout, string
from mopeq_edge.json_file import parse_json
from mopeq_edge.source.model import Bytes, Floats, Source, SourceTensor

FORMAT, VERSION = "mopeq-edge source description", 2
KEY = "mopeq.source_description"


@dataclass(frozen=True)
class DescribedSource:
    """A :class:`Source` without weights: nothing can be read of it."""

    path: Path
    kind: str
    architecture: str
    kvs: Mapping[str, KV]
    tensors: tuple[SourceTensor, ...]
    warnings: tuple[str, ...]
    files: tuple[Path, ...]

    def read(self, tensor: SourceTensor, matrix: int = 0, rows: slice | None = None) -> Floats:
        raise NotImplementedError(f"{tensor.name}: weights of a description")

    def read_stored(self, tensor: SourceTensor, matrix: int = 0, rows: slice | None = None) -> Bytes:
        raise NotImplementedError(f"{tensor.name}: weights of a description")


def stamp(model: Path, options: Iterable[object], code: Iterable[Path]) -> str:
    """Changes when ``model`` does, as far as names, sizes, times and inodes tell, or ``options``, or folders of code.

    Of a directory all files count: one that joins it may change the key-values. ``model`` is there.
    """
    folders = [model, model / "additional_chat_templates"] if model.is_dir() else []
    files = [path for folder in folders if folder.is_dir() for path in folder.iterdir()]
    # bytecode beside it is written when a module is first used, and says nothing
    files += [path for folder in code for path in folder.rglob("*.py")]
    found = [_of_file(path) for path in (sorted(files) if folders else [*sorted(files), model])]
    return digest([VERSION, _version_of("transformers"), [str(option) for option in options], found])


def stamp_of_files(files: Iterable[Path]) -> str:
    """Changes when one of ``files`` does, as far as names, sizes, times and inodes tell."""
    return digest(["files 1", [_of_file(path.absolute()) for path in sorted(files)]])


def write_description(source: Source, path: Path, made_from: str) -> None:
    """Keep what ``source`` is; a place that cannot be written only costs time."""
    body = {
        **{"format": FORMAT, "version": VERSION, "made_from": made_from},
        **{"path": str(source.path), "kind": source.kind, "architecture": source.architecture},
        "tensors": [[t.name, list(t.shape), t.type.name, t.mtp] for t in source.tensors],
        "warnings": list(source.warnings),
        "files": [str(file) for file in source.files],
    }
    header = layout({**source.kvs, KEY: string(json.dumps(body, sort_keys=True))}, []).header
    with suppress(OutputError), atomic_write(path) as file:
        file.write(header)


def read_description(path: Path, made_from: str) -> DescribedSource | None:
    """What :func:`write_description` kept for this stamp; None for anything else."""
    if not path.is_file():
        return None
    try:
        kvs = read_header(path).kvs
        found = parse_json(kvs.pop(KEY).value.encode())
        if (found["format"], found["version"], found["made_from"]) != (FORMAT, VERSION, made_from):
            return None
        return DescribedSource(
            Path(found["path"]),
            found["kind"],
            found["architecture"],
            kvs,
            tuple(SourceTensor(name, tuple(shape), BY_NAME[kind], mtp) for name, shape, kind, mtp in found["tensors"]),
            tuple(found["warnings"]),
            tuple(Path(file) for file in found["files"]),
        )
    except (FormatError, KeyError, ValueError, TypeError, AttributeError):
        return None


def _of_file(path: Path) -> list[object]:
    found = path.stat()
    # a folder's own times change with what is written into it
    return [str(path), *(() if path.is_dir() else (found.st_size, found.st_mtime_ns, found.st_ino))]


def _version_of(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""
