"""The weights of a Hugging Face directory: one file, or shards and their index; safetensors, or else torch's own."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mopeq_edge.errors import FormatError, SourceError, printable, shown
from mopeq_edge.json_file import load_json
from mopeq_edge.source.quantized import Packing, as_weights, packings
from mopeq_edge.source.remote import RemoteDirectory, RemoteFile
from mopeq_edge.source.safetensors_file import SafetensorsFile
from mopeq_edge.source.shard import Entry, Shard

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
TORCH_SINGLE = "pytorch_model.bin"
TORCH_INDEX = "pytorch_model.bin.index.json"
CONFIG = "config.json"

MAX_SHARDS = 2**14
"""Different files that an index may name; the largest checkpoints in use have hundreds."""
MAX_FILE_NAME = 255

SHARDS_AT_ONCE = 16
"""Headers of shards at a URL that are read at the same time."""


class Checkpoint:
    """Tensors by their name in the checkpoint; only headers are kept in memory.

    Names come shard by shard (sorted), and sorted within a shard: the order in which llama.cpp's converter
    writes them. What ``config`` (config.json) says is quantized is one tensor, under the name of the codes and with the
    weights' shape; its scales are not named. With ``remote`` the weights, safetensors, are there, and ``directory`` has
    the small files beside them. Raises :class:`SourceError` for what is missing or not supported,
    :class:`FormatError` for what is damaged.
    """

    def __init__(
        self, directory: Path, config: Mapping[str, Any] | None = None, remote: RemoteDirectory | None = None
    ) -> None:
        self.directory = directory
        shards, self.files = _open_shards(directory) if remote is None else _open_remote_shards(directory, remote)
        self._shard_of = {name: shard for shard in shards for name in shard.entries}
        entries = {name: shard.entries[name] for name, shard in self._shard_of.items()}
        try:
            self._packed: dict[str, Packing] = packings(config or {}, entries)
        except (SourceError, FormatError) as error:
            raise type(error)(f"{directory}: {error}") from None
        hidden = {part for packing in self._packed.values() for part in packing.parts}
        self.names = tuple(name for name in self._shard_of if name not in hidden)

    @property
    def remote_files(self) -> tuple[RemoteFile, ...]:
        """The shards that are not in the directory."""
        paths = dict.fromkeys(shard.path for shard in self._shard_of.values())
        return tuple(path for path in paths if isinstance(path, RemoteFile))

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor, outermost axis first."""
        return {name: self.shape(name) for name in self.names}

    def _entry(self, name: str) -> Entry:
        shard = self._shard_of.get(name)
        if shard is None:
            raise SourceError(f"{self.directory}: the checkpoint has no tensor '{name}'")
        return shard.entries[name]

    def shape(self, name: str) -> tuple[int, ...]:
        packed = self._packed.get(name)
        return self._entry(name).shape if packed is None else packed.shape

    def dtype(self, name: str) -> str:
        """The safetensors type, e.g. ``BF16``, or one of ``quantized``."""
        packed = self._packed.get(name)
        return self._entry(name).dtype if packed is None else packed.dtype

    def read_stored(self, name: str, start: int = 0, stop: int | None = None) -> Bytes:
        """Bytes [n_rows, row bytes] of rows ``start`` to ``stop``, all axes but the last seen as one."""
        self._entry(name)
        packed = self._packed.get(name)
        if packed is None:
            return self._shard_of[name].read(name, start, stop)
        stop = math.prod(packed.shape[:-1]) if stop is None else stop
        return packed.read(lambda part, first, last: self._shard_of[part].read(part, first, last), start, stop)

    def read_rows(self, name: str, start: int = 0, stop: int | None = None) -> Floats:
        """The same rows as float32 [n_rows, n_in]."""
        self._entry(name)
        if name in self._packed:
            return as_weights(self.dtype(name), self.read_stored(name, start, stop))
        return self._shard_of[name].read_f32(name, start, stop)

    def read_f32(self, name: str, index: int | None = None) -> Floats:
        """A tensor as float32 in its own shape, or ``tensor[index]`` of it (one expert of a packed tensor)."""
        shape = self.shape(name)
        if index is None:
            return self.read_rows(name).reshape(shape)
        if not shape or not 0 <= index < shape[0]:
            raise IndexError(f"{name}: no index {index} in a tensor of shape {list(shape)}")
        if len(shape) == 1:
            return self.read_rows(name).reshape(shape)[index : index + 1].reshape(())
        rows = math.prod(shape[1:-1])
        return self.read_rows(name, index * rows, (index + 1) * rows).reshape(shape[1:])


def read_config(directory: Path) -> dict[str, Any]:
    """``config.json`` of a checkpoint."""
    if not directory.is_dir():
        what = "is a file" if directory.exists() else "does not exist"
        raise SourceError(f"{directory}: {what}; expected the directory of a Hugging Face checkpoint")
    if not (directory / CONFIG).is_file():
        raise SourceError(f"{directory}: has no {CONFIG}; give the directory of a Hugging Face checkpoint")
    return read_json_object(directory / CONFIG)


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object in ``path``."""
    try:
        # Infinity is in the settings of some families
        found = load_json(path, finite=False)
    except OSError as error:
        raise FormatError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise FormatError(f"{path}: not valid JSON ({error}); download it again") from None
    if not isinstance(found, dict):
        raise FormatError(f"{path}: expected a JSON object, found {type(found).__name__}; download it again")
    return found


def _open_torch_file(path: Path) -> Shard:
    # only here: torch takes seconds to import, and is not installed everywhere
    from mopeq_edge.source.torch_file import open_torch_file

    return open_torch_file(path)


_FORMATS: tuple[tuple[str, str, Callable[[Path], Shard]], ...] = (
    (INDEX, SINGLE, SafetensorsFile),
    (TORCH_INDEX, TORCH_SINGLE, _open_torch_file),
)
"""(index, single file, how to open a shard), the one that is preferred first."""


def _open_shards(directory: Path) -> tuple[list[Shard], tuple[Path, ...]]:
    """The shards in order, and every file that says something about the weights."""
    for index_name, single, open_shard in _FORMATS:
        index = directory / index_name
        if index.is_file():
            placement, names = _read_index(index)
            missing = [name for name in names if not (directory / name).is_file()]
            _require_all(str(directory), missing, index_name, names)
            shards = [open_shard(directory / name) for name in names]
            _check_index(index, placement, shards)
            return shards, (index, *(directory / name for name in names))
        if (directory / single).is_file():
            return [open_shard(directory / single)], (directory / single,)
    others = sorted(p.name for p in directory.glob("*") if p.suffix in (".safetensors", ".bin", ".pt", ".pth"))
    found = f"found {', '.join(others[:3])}" if others else "found no weights"
    raise SourceError(
        f"{directory}: expected {SINGLE} or {INDEX}, {found}; download the safetensors files of the checkpoint"
    )


def _open_remote_shards(directory: Path, remote: RemoteDirectory) -> tuple[list[Shard], tuple[Path, ...]]:
    """The shards in ``remote``, many at once: each takes requests of its own. The index is in ``directory``."""
    index = directory / INDEX
    if index.is_file():
        placement, names = _read_index(index)
        _require_all(remote.url, [name for name in names if not remote.has(name)], INDEX, names)
    elif remote.has(SINGLE):
        placement, names = {}, [SINGLE]
    else:
        found = ", ".join([name for name in remote.names if name.endswith((".safetensors", ".bin"))][:3])
        raise SourceError(
            f"{remote.url}: expected {SINGLE} or {INDEX}, found {found or 'no weights'}; files of torch's own are read "
            "from a directory alone"
        )
    with ThreadPoolExecutor(SHARDS_AT_ONCE) as pool:
        shards: list[Shard] = list(pool.map(lambda name: SafetensorsFile(remote.file(name)), names))
    if placement:
        _check_index(index, placement, shards)
    return shards, (index,) if placement else ()


def _require_all(where: str, missing: list[str], index_name: str, names: list[str]) -> None:
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise SourceError(
            f"{where}: shard '{missing[0]}'{more} is missing, {index_name} names {len(names)} shards; download it"
        )


def _read_index(path: Path) -> tuple[dict[str, str], list[str]]:
    """The file of each tensor, and all files."""
    placement = read_json_object(path).get("weight_map")
    if not isinstance(placement, dict) or not placement:
        raise FormatError(f"{path}: has no weight_map; download it again")
    for tensor, shard in placement.items():
        if not _is_file_name(shard):
            raise FormatError(
                f"{path}: tensor '{printable(tensor, 200)}' is said to be in {shown(shard)}, "
                "expected the plain name of a file beside it; download it again"
            )
    names = sorted(set(placement.values()))
    if len(names) > MAX_SHARDS:
        raise FormatError(f"{path}: names {len(names)} files, expected at most {MAX_SHARDS}; download it again")
    return placement, names


def _is_file_name(name: object) -> bool:
    """Whether ``name`` can only be that of a file in the same folder, on any system."""
    return (
        isinstance(name, str)
        and name not in ("", ".", "..")
        and name.isprintable()
        and not any(c in name for c in "/\\:")
        and len(name.encode()) <= MAX_FILE_NAME
    )


def _check_index(index: Path, placement: dict[str, str], shards: list[Shard]) -> None:
    held = {shard.path.name: shard.entries for shard in shards}
    for tensor, name in placement.items():
        if tensor not in held[name]:
            raise FormatError(
                f"{index}: tensor '{tensor}' is said to be in '{name}', but is not there; "
                "the files are of different downloads, download them again"
            )
    for name, entries in held.items():
        for tensor in entries:
            if placement.get(tensor) != name:
                where = f"puts it in '{placement[tensor]}'" if tensor in placement else "does not name it"
                raise FormatError(
                    f"{index.parent / name}: holds tensor '{tensor}', but {index.name} {where}; "
                    "the files are of different downloads, download them again"
                )
