"""The source's logits on a text, computed once and kept on disk for many targets.

A reference is a folder ``reference-<key>`` with ``logits.npy`` (float32 [n_windows, n_rows, n_vocab]),
``tokens.npy`` (int32 [n_windows, n_ctx]) and ``reference.json``, which is written last: without it the
folder is unfinished and is written again. The key hashes everything the logits depend on.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib.format import open_memmap

from mopeq_edge.atomic import atomic_write
from mopeq_edge.binding import Floats, Tokens
from mopeq_edge.errors import FormatError, OutputError
from mopeq_edge.evaluate.chunks import Positions, first_counted
from mopeq_edge.json_file import load_json
from mopeq_edge.units import format_bytes

FORMAT = 1
_META, _TOKENS, _LOGITS = "reference.json", "tokens.npy", "logits.npy"
_SPARE_BYTES = 16 << 20
"""Left free on the disk beside the reference: its small files, and other programs."""


@dataclass(frozen=True)
class ReferenceKey:
    """What the logits depend on. ``n_chunks`` None means all windows of the text."""

    source_sha256: str
    text_sha256: str
    n_ctx: int
    n_chunks: int | None
    positions: Positions
    library: str

    def folder(self, work_dir: Path) -> Path:
        """Where the reference of this key lies in ``work_dir``."""
        text = json.dumps({"format": FORMAT, **asdict(self)}, sort_keys=True)
        return work_dir / f"reference-{hashlib.sha256(text.encode()).hexdigest()[:16]}"


@dataclass(frozen=True)
class ReferenceLogits:
    """A finished reference. ``tokens``: int32 [n_windows, n_ctx]; ``logits``: float32
    [n_windows, n_rows, n_vocab], mapped from disk; row i of a window is position ``first`` + i.
    """

    folder: Path
    key: ReferenceKey
    source_name: str
    tokens: Tokens
    logits: Floats

    @property
    def n_windows(self) -> int:
        return int(self.logits.shape[0])

    @property
    def n_vocab(self) -> int:
        return int(self.logits.shape[2])

    @property
    def first(self) -> int:
        """The first position of a window that has a row."""
        return first_counted(self.key.n_ctx, self.key.positions)


def n_rows(n_ctx: int, positions: Positions) -> int:
    """Positions of one window that count: each has its next token in the window."""
    return n_ctx - 1 - first_counted(n_ctx, positions)


def open_reference(work_dir: Path, key: ReferenceKey) -> ReferenceLogits | None:
    """The finished reference of ``key`` in ``work_dir``, None if there is none.

    Raises :class:`FormatError` if its files do not fit the key or each other.
    """
    folder = key.folder(work_dir)
    if not (folder / _META).is_file():
        return None
    try:
        meta = load_json(folder / _META)
        # mapped, and as one array: np.load would also read archives, and allocate what a header claims
        tokens, logits = (open_memmap(folder / name, mode="r") for name in (_TOKENS, _LOGITS))
    except (OSError, ValueError, EOFError, TypeError, OverflowError, SyntaxError) as error:
        raise _broken(folder, f"cannot be read ({error})") from None
    _check(folder, "format and key", {"format": FORMAT, **asdict(key)}, _without(meta, "n_vocab", "source_name"))
    _check(folder, "type of the tokens", np.dtype(np.int32), tokens.dtype)
    _check(folder, "type of the logits", np.dtype(np.float32), logits.dtype)
    _check(folder, "axes of the tokens", 2, tokens.ndim)
    _check(folder, "shape of the tokens", (len(tokens), key.n_ctx), tokens.shape)
    shape = (len(tokens), n_rows(key.n_ctx, key.positions), meta.get("n_vocab"))
    _check(folder, "shape of the logits", shape, logits.shape)
    return ReferenceLogits(folder, key, str(meta.get("source_name")), np.array(tokens), logits)


def write_reference(
    work_dir: Path, key: ReferenceKey, source_name: str, tokens: Tokens, n_vocab: int, rows: Iterable[Floats]
) -> ReferenceLogits:
    """Store one reference and open it.

    ``tokens``: int32 [n_windows, n_ctx]; ``rows`` gives float32 [n_rows, n_vocab] for each window in turn, so
    that only one is in memory. Raises :class:`OutputError` if the disk lacks the space, before the first row
    is computed, or refuses to be written.
    """
    folder = key.folder(work_dir)
    shape = (len(tokens), n_rows(key.n_ctx, key.positions), n_vocab)
    _check_space(folder, 4 * shape[0] * shape[1] * shape[2])
    with atomic_write(folder / _TOKENS) as file:
        np.save(file, tokens.astype(np.int32))
    with atomic_write(folder / _LOGITS) as file:
        header = {"descr": np.lib.format.dtype_to_descr(np.dtype(np.float32)), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        done = 0
        for window in rows:
            if window.shape != shape[1:]:
                raise ValueError(f"window {done}: expected rows of shape {shape[1:]}, got {window.shape}")
            # Written, not mapped: a disk that fills up is then an error and not the death of the process.
            file.write(np.ascontiguousarray(window, np.float32).data)
            done += 1
        if done != shape[0]:
            raise ValueError(f"expected {shape[0]} windows, got {done}")
    meta = {"format": FORMAT, **asdict(key), "n_vocab": n_vocab, "source_name": source_name}
    with atomic_write(folder / _META) as file:
        file.write(json.dumps(meta, indent=2, sort_keys=True).encode() + b"\n")
    reference = open_reference(work_dir, key)
    if reference is None:
        raise _broken(folder, "was removed while it was written")
    return reference


def _check_space(folder: Path, needed: int) -> None:
    existing = folder
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    if free < needed + _SPARE_BYTES:
        raise OutputError(
            f"{folder.parent}: the source's logits need {format_bytes(needed)}, {format_bytes(free)} are free; "
            "evaluate fewer windows or choose another work directory"
        )


def _check(folder: Path, what: str, expected: object, found: object) -> None:
    if expected != found:
        raise _broken(folder, f"{what}: expected {expected}, found {found}")


def _broken(folder: Path, what: str) -> FormatError:
    return FormatError(f"{folder}: {what}; delete the folder and evaluate again")


def _without(meta: Any, *names: str) -> object:
    return {name: value for name, value in meta.items() if name not in names} if isinstance(meta, dict) else meta
