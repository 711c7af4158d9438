"""The blocks' inputs for all windows, in memory or in a scratch file."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mopeq_edge.errors import OutputError
from mopeq_edge.units import format_bytes

IN_MEMORY_BYTES = 2**30
"""Up to here the states stay in memory; larger ones go to a scratch file that the kernel pages."""


class HiddenStates:
    """float32 [n_slots, n_tokens, n_embd], windows of ``lengths`` one behind the other; a slot is one block's input."""

    def __init__(self, n_slots: int, lengths: Sequence[int], n_embd: int, scratch: Path) -> None:
        ends = np.cumsum(lengths)
        self._places = [slice(int(end) - n, int(end)) for n, end in zip(lengths, ends, strict=True)]
        shape = (n_slots, int(ends[-1]), n_embd)
        self._file: Path | None = None
        if int(np.prod(shape)) * 4 <= IN_MEMORY_BYTES:
            self._data: np.ndarray = np.zeros(shape, dtype=np.float32)
        else:
            self._file = _reserve(scratch, int(np.prod(shape)) * 4)
            self._data = np.memmap(self._file, dtype=np.float32, mode="r+", shape=shape)
            if os.name == "posix":
                # the map keeps it: a killed process leaves nothing
                self._file.unlink()

    def get(self, slot: int, window: int) -> Tensor:
        """A copy [1, n_tokens, n_embd] of one window's state."""
        return torch.from_numpy(np.array(self._data[slot, self._places[window]])).unsqueeze(0)

    def put(self, slot: int, window: int, state: Tensor) -> None:
        place = self._data[slot, self._places[window]]
        place[:] = state.detach().reshape(place.shape).numpy()

    def close(self) -> None:
        """Let go of the memory or the scratch file."""
        del self._data
        if self._file is not None:
            self._file.unlink(missing_ok=True)


def _reserve(folder: Path, nbytes: int) -> Path:
    """A file of ``nbytes`` zeros. A full disk shows here, not as a bus error when a page is written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix="states-", dir=folder)
        try:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(handle, 0, nbytes)
            else:
                os.truncate(handle, nbytes)
        except OSError:
            os.unlink(name)
            raise
        finally:
            os.close(handle)
    except OSError as error:
        raise OutputError(
            f"{folder}: {format_bytes(nbytes)} for the hidden states of the calibration text cannot be written "
            f"({error.strerror}); free space, choose another --work-dir, or give fewer --chunks"
        ) from None
    return Path(name)
