"""Quantized blocks that are made once for all files of a study: its plans give most experts a type that another had."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np

from mopeq_edge.atomic import atomic_write
from mopeq_edge.errors import OutputError
from mopeq_edge.ggml.library import Bytes, Floats, Quantizer
from mopeq_edge.ggml.types import GgmlType

LIMIT_BYTES = 4 * 10**9
"""What a study keeps on disk at most; beyond it blocks are made anew."""


class BlockCache:
    """Quantizes as ``quantizer`` does, and keeps the blocks in ``folder`` under a hash of all that they depend on.

    ``library`` names the libggml. Threads may share one.
    """

    def __init__(self, quantizer: Quantizer, folder: Path, library: Sequence[str], limit: int = LIMIT_BYTES) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._quantizer, self._folder, self._library = quantizer, folder, "\n".join(library).encode()
        self._room = limit - sum(file.stat().st_size for file in folder.glob("*.blocks"))

    def quantize(self, to: GgmlType, rows: Floats, imatrix: Floats | None = None) -> Bytes:
        """Blocks [n_rows, row bytes] of ``rows`` [n_rows, n_in], weighted by ``imatrix`` [n_in]."""
        rows = np.ascontiguousarray(rows, dtype=np.float32)
        key = hashlib.blake2b(self._library, digest_size=20)
        key.update(f"{to.name} {rows.shape}".encode())
        key.update(rows.data)
        if imatrix is not None:
            key.update(np.ascontiguousarray(imatrix, dtype=np.float32).data)
        path, shape = self._folder / f"{key.hexdigest()}.blocks", (len(rows), to.nbytes(rows.shape[1]))
        with suppress(OSError, ValueError):
            return np.fromfile(path, dtype=np.uint8).reshape(shape)
        blocks = self._quantizer.quantize(to, rows, imatrix)
        if blocks.nbytes <= self._room:
            # a full disk only costs time
            with suppress(OutputError), atomic_write(path) as file:
                file.write(blocks.tobytes())
                self._room -= blocks.nbytes
        return blocks
