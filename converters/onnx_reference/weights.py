"""The weights of a finished GGUF in float32, by ``gguf.quants``: none of llama.cpp's code reads them here.

Experts may be in one stack or in groups of different types (docs/expert-groups.md). A matrix is read when it is asked
for and belongs to whoever asked.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import gguf
import gguf.quants
import numpy as np
import numpy.typing as npt

from converters.onnx_graph import Floats, Shape
from mopeq_edge.errors import SourceError
from mopeq_edge.expert_groups.layout import group_name
from mopeq_edge.expert_groups.read import is_part, read_groups
from mopeq_edge.ggml.types import GgmlType
from mopeq_edge.gguf_file import GGUFHeader, TensorInfo
from mopeq_edge.source.file_bytes import read_bytes

AT_ONCE = 1 << 24
"""Weights that are dequantized in one call, so that gguf's own copies stay small."""


@dataclass(frozen=True)
class _Place:
    path: Path
    start: int
    type: GgmlType
    shape: Shape
    """ggml's, without the ones at its end."""


class Weights:
    """All tensors of a file, or of the files of a split one.

    Raises :class:`FormatError` for expert groups that are broken.
    """

    def __init__(self, headers: Sequence[GGUFHeader]) -> None:
        self.path = headers[0].path
        self._places = {i.name: _place(header, i) for header in headers for i in header.tensors if not is_part(i.name)}
        self._experts: dict[str, tuple[tuple[_Place, int], ...]] = {}
        self._read_groups(headers)

    @property
    def shapes(self) -> Mapping[str, Shape]:
        """ggml's shapes of all tensors, without ones at the end; a stack in groups as if it were whole."""
        return {name: place.shape for name, place in self._places.items()}

    def whole(self, name: str) -> Floats:
        """A tensor in numpy's order of axes, [n_out, n_in]."""
        place = self._places[name]
        n_in = place.shape[0]
        flat = self._rows(name, place, 0, int(np.prod(place.shape[1:], dtype=np.int64)))
        return flat.reshape(*reversed(place.shape[1:]), n_in)

    def rows(self, name: str, first: int, count: int) -> Floats:
        """[count, n_in] of a matrix."""
        return self._rows(name, self._places[name], first, count)

    def expert(self, stack: str, expert: int) -> Floats:
        """The matrix [n_out, n_in] of one expert."""
        n_out = self._places[stack].shape[1]
        if stack in self._experts:
            place, row = self._experts[stack][expert]
        else:
            place, row = self._places[stack], expert
        return self._rows(stack, place, row * n_out, n_out)

    def _rows(self, name: str, place: _Place, first: int, count: int) -> Floats:
        n_in = place.shape[0]
        step = max(1, AT_ONCE // n_in)
        if count <= step:
            return self._dequantize(name, place, first, count)
        out = np.empty((count, n_in), dtype=np.float32)
        for start in range(0, count, step):
            n = min(step, count - start)
            out[start : start + n] = self._dequantize(name, place, first + start, n)
        return out

    def _dequantize(self, name: str, place: _Place, first: int, count: int) -> Floats:
        row_bytes = place.type.nbytes(place.shape[0])
        raw = read_bytes(place.path, place.start + first * row_bytes, count * row_bytes).reshape(count, row_bytes)
        try:
            found: npt.NDArray[np.float32] = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType(place.type.id))
        except (NotImplementedError, ValueError):
            raise SourceError(
                f"{place.path}: tensor '{name}' has type {place.type.name}, which the gguf package cannot turn into "
                "F32; choose another type to check the file with the ONNX reference"
            ) from None
        return found

    def _read_groups(self, headers: Sequence[GGUFHeader]) -> None:
        infos = {info.name: (header, info) for header in headers for info in header.tensors}
        for stack in read_groups(*headers):
            experts: list[tuple[_Place, int] | None] = [None] * stack.shape[2]
            for g, group in enumerate(stack.groups):
                place = _place(*infos[group_name(stack.name, g)])
                for row, expert in enumerate(group.experts):
                    experts[expert] = (place, row)
            self._experts[stack.name] = tuple(found for found in experts if found is not None)
            # the type is never looked at: every expert has its own
            self._places[stack.name] = _Place(headers[0].path, 0, stack.groups[0].type, stack.shape)


def _place(header: GGUFHeader, info: TensorInfo) -> _Place:
    shape = info.shape
    while len(shape) > 1 and shape[-1] == 1:
        shape = shape[:-1]
    return _Place(header.path, header.data_start + info.offset, info.type, shape)
