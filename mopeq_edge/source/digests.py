"""Digests of large files, remembered, so that gigabytes are hashed once."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from mopeq_edge.artifacts import file_digest
from mopeq_edge.atomic import atomic_write
from mopeq_edge.errors import FormatError, OutputError
from mopeq_edge.json_file import load_json
from mopeq_edge.progress import Progress, SilentProgress
from mopeq_edge.source.model import Source

CACHE_FORMAT = 1
MOST_AT_ONCE = 4
"""Files that are read at once."""


class Digests:
    """SHA-256 in hex of files, remembered by path, size, time of change and inode in the JSON file ``cache``.

    The file is made if absent, and ignored if it cannot be read.
    """

    def __init__(self, cache: Path | None = None) -> None:
        self._cache = cache

    def of(self, path: Path) -> str:
        """Digest of the bytes of ``path``."""
        return self._of_each([path])[0]

    def of_files(self, root: Path, files: Iterable[Path], *, threads: int = 1, progress: Progress | None = None) -> str:
        """One digest over names (relative to ``root``) and content of ``files``: of what ``sha256sum`` prints."""
        paths = sorted(files)
        whole = hashlib.sha256()
        for path, found in zip(paths, self._of_each(paths, threads, progress), strict=True):
            whole.update(f"{found}  {path.relative_to(root).as_posix()}\n".encode())
        return whole.hexdigest()

    def of_source(self, source: Source, *, threads: int = 1, progress: Progress | None = None) -> str:
        """One digest over all files of ``source``: names it by its content. ``threads`` files are read at once."""
        root = source.path if source.path.is_dir() else source.path.parent
        return self.of_files(root, source.files, threads=threads, progress=progress)

    def _of_each(self, paths: list[Path], threads: int = 1, progress: Progress | None = None) -> list[str]:
        known = _load_cache(self._cache)
        fresh = dict(known)
        stamps = {path: (str(path.resolve()), _stamp(path)) for path in paths}
        unknown = [path for path, (key, stamp) in stamps.items() if known.get(key, ("", ""))[0] != stamp]
        if unknown:
            total = sum(path.stat().st_size for path in unknown)
            with (progress or SilentProgress()).step("hash of the source", total, "bytes") as step:

                def hashed(path: Path) -> str:
                    return file_digest(path) if progress is None else file_digest(path, step.advance)

                with ThreadPoolExecutor(min(threads, MOST_AT_ONCE)) as pool:
                    for path, found in zip(unknown, pool.map(hashed, unknown), strict=True):
                        key, stamp = stamps[path]
                        fresh[key] = (stamp, found)
        if self._cache is not None and fresh != known:
            text = json.dumps({"format": CACHE_FORMAT, "files": fresh}, indent=1, sort_keys=True)
            # The digest is right without a cache; a place that cannot be written only costs time
            with suppress(OutputError), atomic_write(self._cache) as file:
                file.write(text.encode())
        return [fresh[str(path.resolve())][1] for path in paths]


def _stamp(path: Path) -> str:
    """Changes when the content of ``path`` does, as far as the file system can tell."""
    found = path.stat()
    return f"{found.st_size} {found.st_mtime_ns} {found.st_ino}"


def _load_cache(cache: Path | None) -> dict[str, tuple[str, str]]:
    """(stamp, digest) by path."""
    try:
        found = load_json(cache) if cache is not None else {}
    except (OSError, ValueError, FormatError):
        return {}
    files = found.get("files") if isinstance(found, dict) and found.get("format") == CACHE_FORMAT else None
    if not isinstance(files, dict):
        return {}
    return {
        path: (item[0], item[1])
        for path, item in files.items()
        if isinstance(item, list) and len(item) == 2 and all(isinstance(part, str) for part in item)
    }
