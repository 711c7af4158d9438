"""A checkpoint at a URL that fsspec knows (``s3://bucket/model``): its weights are read by ranges, where they are.

The small files beside the weights, which say what the model is, are copied to a folder first: converters and tokenizers
want files. Credentials are fsspec's own business, on every machine that reads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import numpy.typing as npt

from mopeq_edge.artifacts import digest
from mopeq_edge.atomic import atomic_write
from mopeq_edge.errors import ExtraMissingError, FormatError, SourceError, printable
from mopeq_edge.json_file import MAX_BYTES

TEMPLATES = "additional_chat_templates"


@dataclass(frozen=True)
class ModelURL:
    """A MODEL that is no path."""

    url: str

    @property
    def name(self) -> str:
        """The last part of its path."""
        return PurePosixPath(self.url.partition("://")[2].rstrip("/")).name or "model"

    def __str__(self) -> str:
        return self.url


@dataclass(frozen=True)
class RemoteFile:
    """A file at a URL: ``size`` bytes, and what its storage says that changes when the content does."""

    url: str
    size: int
    version: str

    @property
    def name(self) -> str:
        return self.url.rpartition("/")[2]

    def __str__(self) -> str:
        return self.url

    def read(self, offset: int, count: int) -> npt.NDArray[np.uint8]:
        """``count`` bytes from ``offset``. Raises :class:`FormatError` if there are less, or none can be had."""
        if count == 0:
            return np.empty(0, dtype=np.uint8)
        system, path = _system(self.url)
        try:
            data: bytes = system.cat_file(path, start=offset, end=offset + count)
        except Exception as error:
            # each kind of storage has exceptions of its own
            raise FormatError(f"{self.url}: cannot be read ({_reason(error)})") from None
        if len(data) != count:
            raise FormatError(
                f"{self.url}: {len(data)} bytes from byte {offset}, expected {count}; it changed while it was read, "
                "try again"
            )
        # writable, as what is read from a file is
        return np.frombuffer(bytearray(data), dtype=np.uint8)


class RemoteDirectory:
    """What is directly in the directory at ``url``.

    Raises :class:`SourceError` if it cannot be listed, :class:`ExtraMissingError` without fsspec or its package for
    this kind of URL.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        system, path = _system(self.url)
        self._sizes = self._listed(system, path)
        if not self._sizes:
            raise SourceError(f"{url}: has no files; expected the directory of a Hugging Face checkpoint")

    def has(self, name: str) -> bool:
        return name in self._sizes

    @property
    def names(self) -> list[str]:
        return sorted(self._sizes)

    def file(self, name: str) -> RemoteFile:
        """The file ``name``, which must be there."""
        url = f"{self.url}/{name}"
        system, path = _system(url)
        try:
            return RemoteFile(url, self._sizes[name], digest([str(system.ukey(path)), self._sizes[name]]))
        except Exception as error:
            raise SourceError(f"{url}: cannot be looked up ({_reason(error)})") from None

    def copy_to(self, folder: Path, names: Sequence[str]) -> None:
        """Make ``folder`` hold what is here of the files ``names``, and further chat templates, and nothing else."""
        system, path = _system(f"{self.url}/{TEMPLATES}")
        try:
            templates = self._listed(system, path) if system.exists(path) else {}
        except Exception as error:
            raise SourceError(f"{self.url}: cannot be listed ({_reason(error)})") from None
        wanted = {name: self._sizes[name] for name in names if name in self._sizes}
        wanted |= {f"{TEMPLATES}/{n}": size for n, size in templates.items() if _is_plain(n) and n.endswith(".jinja")}
        for old in [found for found in folder.rglob("*") if found.is_file()]:
            if old.relative_to(folder).as_posix() not in wanted:
                old.unlink()
        for name, size in wanted.items():
            if size > MAX_BYTES:
                raise FormatError(f"{self.url}/{name}: has {size} bytes, expected at most {MAX_BYTES}")
            data = RemoteFile(f"{self.url}/{name}", size, "").read(0, size).tobytes()
            if not (folder / name).is_file() or (folder / name).read_bytes() != data:
                with atomic_write(folder / name) as file:
                    file.write(data)

    def _listed(self, system: Any, path: str) -> dict[str, int]:
        """Bytes of every file by its name."""
        try:
            found: list[Mapping[str, Any]] = system.ls(path, detail=True)
        except Exception as error:
            raise SourceError(
                f"{self.url}: cannot be listed ({_reason(error)}); expected the directory of a Hugging Face checkpoint"
            ) from None
        files = [one for one in found if one["type"] == "file" and isinstance(one["size"], int)]
        return {PurePosixPath(one["name"]).name: one["size"] for one in files}


def _is_plain(name: str) -> bool:
    return name.isprintable() and not any(c in name for c in "/\\:") and name not in ("", ".", "..")


def _system(url: str) -> tuple[Any, str]:
    """fsspec's file system for ``url``, of which it keeps one a kind, and the path in it."""
    try:
        import fsspec
    except ImportError:
        raise ExtraMissingError(f"{url}: needs fsspec; run: pip install 'mopeq-edge[ray]'") from None
    try:
        system, path = fsspec.core.url_to_fs(url)
    except ImportError as error:
        raise ExtraMissingError(f"{url}: fsspec needs one more package for it ({_reason(error)})") from None
    except Exception as error:
        raise SourceError(f"{url}: no URL that fsspec can open ({_reason(error)})") from None
    return system, path


def _reason(error: BaseException) -> str:
    said = printable(str(error).strip(), 200)
    return f"{type(error).__name__}: {said}" if said else type(error).__name__
