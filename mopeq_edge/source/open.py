"""Open a model, whatever it is, and name it by its content."""

from __future__ import annotations

import hashlib
import json
from contextlib import suppress
from pathlib import Path

from mopeq_edge.artifacts import file_digest
from mopeq_edge.atomic import atomic_write
from mopeq_edge.errors import OutputError, SourceError
from mopeq_edge.source.converter import Converters
from mopeq_edge.source.gguf import GGUFSource
from mopeq_edge.source.huggingface import open_huggingface
from mopeq_edge.source.model import Source, moe_shape

CACHE_FORMAT = 1


def open_source(path: Path, converters: Converters, pre: str | None = None) -> Source:
    """Open a Hugging Face directory or a GGUF file.

    ``converters`` are keyed by the name that ``config.json`` has for the architecture; ``pre`` overrides the name of a
    checkpoint's pre-tokenizer. Raises :class:`SourceError` or :class:`FormatError` for anything that is no
    Mixture-of-Experts model or cannot be read.
    """
    source: Source
    if path.is_dir():
        source = open_huggingface(path, converters, pre)
    elif not path.exists():
        raise SourceError(f"{path}: does not exist; give the directory of a Hugging Face checkpoint or a GGUF file")
    elif path.suffix == ".safetensors":
        raise SourceError(f"{path}: holds weights only; give the directory that has its config.json too")
    elif pre is not None:
        raise SourceError(f"{path}: a GGUF file names its own pre-tokenizer; leave out the name '{pre}'")
    else:
        source = GGUFSource(path)
    moe_shape(source)
    return source


def source_files_digest(source: Source, cache: Path | None = None) -> str:
    """SHA-256 in hex over the names (relative to the source) and the content of all its files.

    ``cache`` is a JSON file that remembers the digests of files by path, size, time of change and inode, so that
    gigabytes are hashed once. It is made if absent, and ignored if it cannot be read.
    """
    known = _load_cache(cache)
    fresh = dict(known)
    whole = hashlib.sha256()
    root = source.path if source.path.is_dir() else source.path.parent
    for path in sorted(source.files):
        key, stamp = str(path.resolve()), _stamp(path)
        if known.get(key, ("", ""))[0] != stamp:
            fresh[key] = (stamp, file_digest(path))
        whole.update(f"{fresh[key][1]}  {path.relative_to(root).as_posix()}\n".encode())
    if cache is not None and fresh != known:
        text = json.dumps({"format": CACHE_FORMAT, "files": fresh}, indent=1, sort_keys=True)
        # The digest is right without a cache; a place that cannot be written only costs time
        with suppress(OutputError), atomic_write(cache) as file:
            file.write(text.encode())
    return whole.hexdigest()


def _stamp(path: Path) -> str:
    """Changes when the content of ``path`` does, as far as the file system can tell."""
    found = path.stat()
    return f"{found.st_size} {found.st_mtime_ns} {found.st_ino}"


def _load_cache(cache: Path | None) -> dict[str, tuple[str, str]]:
    """(stamp, digest) by path."""
    try:
        found = json.loads(cache.read_text(encoding="utf-8")) if cache is not None else {}
    except (OSError, ValueError):
        return {}
    files = found.get("files") if isinstance(found, dict) and found.get("format") == CACHE_FORMAT else None
    if not isinstance(files, dict):
        return {}
    return {
        path: (item[0], item[1])
        for path, item in files.items()
        if isinstance(item, list) and len(item) == 2 and all(isinstance(part, str) for part in item)
    }
