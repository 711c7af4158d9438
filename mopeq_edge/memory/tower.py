"""What sees pictures, in onnxruntime: it is gone before the text model is loaded, so the larger of the two counts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mopeq_edge.device_files import DeviceFile, device_files, total_bytes
from mopeq_edge.vision.description import KEY, read_description

if TYPE_CHECKING:
    import onnx

PYTHON_BYTES = 144_000_000
"""Python, onnxruntime and what it is run with; measured (docs/vision.md)."""

LEFT_BYTES = 213_000_000
"""The same when a tower is gone, with what was allocated for it and is not given back; measured."""

ARENA: Mapping[str, float] = {"F16": 2.75, "INT8": 2.75, "F32": 4.05}
"""What onnxruntime's arena takes, over what is alive at once. Measured; with F32 all shapes are known, and it keeps a
second plan of them."""

_VIEWS = ("Reshape", "Identity", "Squeeze", "Unsqueeze", "Flatten")
"""Operators whose output lies where their input is."""

_SIZES = {1: 4, 10: 2, 3: 1, 7: 8, 9: 1}
"""Bytes of FLOAT, FLOAT16, INT8, INT64 and BOOL, by the numbers that onnx's format gives them."""


@dataclass(frozen=True)
class TowerMemory:
    """Bytes: ``files`` are mapped, ``work`` is what onnxruntime takes for a tile."""

    files: tuple[DeviceFile, ...]
    work: int

    @property
    def nbytes(self) -> int:
        """All of the process while it sees."""
        return PYTHON_BYTES + total_bytes(self.files) + self.work


def tower_of_file(path: Path) -> TowerMemory:
    """What the vision file ``path`` takes; its weights are not read. Raises :class:`MopeqError` for another file."""
    # every plan needs what is above, few have pictures, and onnx takes a tenth of a second to import
    from mopeq_edge.vision.graph_file import read_graph

    files = device_files(path)
    graph = read_graph(path)
    return tower_memory(graph.model, read_description(graph.metadata.get(KEY), str(path)).weights_type, files)


def tower_memory(graph: onnx.ModelProto, kind: str, files: tuple[DeviceFile, ...]) -> TowerMemory:
    """What ``graph`` takes with its matrices as ``kind`` in ``files``."""
    return TowerMemory(files, int(ARENA[kind] * work_bytes(graph)))


def work_bytes(model: onnx.ModelProto) -> int:
    """The most bytes of results that are alive at once when the nodes run in their order, constants left out."""
    from onnx import shape_inference

    inferred = shape_inference.infer_shapes(model, data_prop=True).graph
    sizes = {value.name: _nbytes(value.type.tensor_type) for value in (*inferred.value_info, *inferred.output)}
    constants = {tensor.name for tensor in inferred.initializer} | {value.name for value in inferred.input}
    owner: dict[str, str] = {}
    for node in inferred.node:
        for name in node.output:
            first = node.input[0] if node.op_type in _VIEWS else ""
            owner[name] = owner.get(first, name) if first not in constants else first
    last = {owner.get(name, name): i for i, node in enumerate(inferred.node) for name in node.input}
    alive: dict[str, int] = {}
    most = 0
    for i, node in enumerate(inferred.node):
        alive |= {name: sizes.get(name, 0) for name in node.output if owner[name] == name}
        most = max(most, sum(alive.values()))
        for name in {owner.get(name, name) for name in node.input}:
            if last[name] == i:
                alive.pop(name, None)
    return most


def _nbytes(kind: Any) -> int:
    return _SIZES.get(kind.elem_type, 4) * math.prod(int(dim.dim_value) for dim in kind.shape.dim)
