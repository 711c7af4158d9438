"""Where the weights of a vision graph come from and go to: the checkpoint, and a file beside the graph.

Matrices are written to the file one at a time, in F32, F16 or INT8 with one scale for each output; the graph turns them
back into float32 when it uses them. Vectors stay in the graph, in float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import BinaryIO, Protocol

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto

from converters.onnx_graph import Floats, Graph, Shape, Value
from mopeq_edge.errors import PlanError, SourceError

F32, F16, INT8 = "F32", "F16", "INT8"
TYPES = (F16, F32, INT8)
"""Types of a tower's matrices, the default first."""

PAGE = 4096
"""Matrices begin at multiples of this, so that a runtime can map each of them."""

_KINDS: Mapping[str, int] = {F32: TensorProto.FLOAT, F16: TensorProto.FLOAT16, INT8: TensorProto.INT8}
_F16_MAX = 65504.0


class Tensors(Protocol):
    """What of a checkpoint is needed here."""

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]: ...

    def read_f32(self, name: str, index: int | None = None) -> Floats: ...


class Weights:
    """Tensors of ``checkpoint`` as values of ``graph``, their matrices appended to ``file``, known as ``location``.

    ``kind`` is one of :data:`TYPES`. Raises :class:`SourceError` for a tensor that is missing or has another shape.
    """

    def __init__(self, graph: Graph, checkpoint: Tensors, file: BinaryIO, location: str, kind: str) -> None:
        self.graph, self.kind = graph, kind
        self._checkpoint, self._file, self._location = checkpoint, file, location
        self._shapes = checkpoint.shapes
        self.used: set[str] = set()

    def numbers(self, name: str, shape: Shape) -> Floats:
        """The tensor ``name``, which has ``shape``, in float32."""
        found = self._shapes.get(name)
        if found is None:
            raise SourceError(
                f"tensor '{name}' is missing, the vision side needs it; download the whole checkpoint again, or give "
                "--text-only for the GGUF alone"
            )
        if found != shape:
            raise SourceError(
                f"tensor '{name}' has shape {list(found)}, but config.json asks for {list(shape)}; use the "
                "config.json of these weights, or give --text-only for the GGUF alone"
            )
        values = np.ascontiguousarray(self._checkpoint.read_f32(name), dtype=np.float32)
        if not np.isfinite(values).all():
            raise SourceError(f"tensor '{name}' has a number that is not finite; download the checkpoint again")
        self.used.add(name)
        return values

    def vector(self, name: str, *shape: int) -> Value:
        """A small tensor, kept in the graph."""
        return self.graph.constant(self.numbers(name, shape))

    def product(self, x: Value, name: str, values: Floats, bias: Value | None = None, *, narrow: bool = True) -> Value:
        """[n, n_out] of ``x`` [n, n_in] and a matrix [n_out, n_in], stored as ``name``; without ``narrow`` INT8 is
        F16.
        """
        return self.graph.linear(x, self._matrix(name, values, x, narrow), bias)

    def _matrix(self, name: str, values: Floats, before: Value, narrow: bool) -> Value:
        """The matrix in float32, which is made once ``before`` is there."""
        kind = F16 if self.kind == INT8 and not narrow else self.kind
        if kind == F32:
            return self._append(name, values, kind)
        if kind == F16:
            if (largest := float(np.abs(values).max(initial=0.0))) > _F16_MAX:
                raise PlanError(
                    f"tensor '{name}': --vision-type {self.kind} is for weights up to {_F16_MAX:g}, found one of "
                    f"magnitude {largest:g}; give --vision-type F32"
                )
            stored = self._when(before, self._append(name, values.astype("<f2"), kind), values.shape)
            return self.graph.add("Cast", stored, to=TensorProto.FLOAT)
        codes, scales = rounded(values)
        stored = self._when(before, self._append(name, codes, kind), values.shape)
        zero = self.graph.constant(np.zeros(len(scales), dtype=np.int8))
        return self.graph.add("DequantizeLinear", stored, self.graph.constant(scales), zero, axis=0)

    def _when(self, before: Value, stored: Value, shape: Shape) -> Value:
        """``stored`` as it is, but not earlier than ``before``.

        A constant is ready at once: without this every matrix would be turned into float32 before the first is used,
        and all would be in memory. A shape that is computed, from a size times 0, makes it wait; nothing is copied.
        """
        graph = self.graph
        nothing = graph.add("Mul", graph.add("Shape", before, start=0, end=1), graph.integers(0))
        return graph.add("Reshape", stored, graph.add("Add", graph.integers(*shape), nothing))

    def linear(self, x: Value, name: str, n_out: int, n_in: int, *, bias: bool = True) -> Value:
        """[n, n_out] of ``x`` [n, n_in] and the layer ``name``."""
        own = self.vector(f"{name}.bias", n_out) if bias else None
        return self.product(x, f"{name}.weight", self.numbers(f"{name}.weight", (n_out, n_in)), own)

    def norm(self, x: Value, name: str, width: int, eps: float) -> Value:
        """The layer norm ``name``."""
        weight, bias = self.vector(f"{name}.weight", width), self.vector(f"{name}.bias", width)
        return self.graph.layer_norm(x, weight, bias, eps)

    def _append(self, name: str, values: npt.NDArray[np.generic], kind: str) -> Value:
        self._file.write(b"\0" * (-self._file.tell() % PAGE))
        offset, data = self._file.tell(), np.ascontiguousarray(values).tobytes()
        self._file.write(data)
        tensor = onnx.TensorProto()
        tensor.name, tensor.data_type = name, _KINDS[kind]
        tensor.dims.extend(values.shape)
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in (("location", self._location), ("offset", str(offset)), ("length", str(len(data)))):
            tensor.external_data.append(onnx.StringStringEntryProto(key=key, value=value))
        return self.graph.stored(tensor)


def rounded(values: Floats) -> tuple[npt.NDArray[np.int8], Floats]:
    """Codes [n_out, n_in] and scales [n_out] of INT8: the largest weight of a row is ±127."""
    scales = np.abs(values).max(axis=1) / np.float32(127)
    safe = np.where(scales > 0, scales, np.float32(1))
    return np.rint(values / safe[:, None]).astype(np.int8), safe.astype(np.float32)
