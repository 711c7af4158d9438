"""Write a vision side as ONNX: the graph and, beside it, its weights; both whole or neither."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from converters.onnx_graph import Array, Floats, Graph
from converters.vision.families import Family
from converters.vision.weights import F32, Tensors, Weights
from mopeq_edge.atomic import scratch_directory
from mopeq_edge.errors import SourceError
from mopeq_edge.file_hashes import UNKNOWN
from mopeq_edge.vision.description import KEY, STAMP, Description, read_description, weights_file
from mopeq_edge.vision.graph_file import read_graph
from mopeq_edge.vision.hashes import KEY as HASHES_KEY
from mopeq_edge.vision.hashes import sealed, tensor_hashes, unsealed
from mopeq_edge.vision.session import VisionSession, check_weights

ERROR_DIGITS = 24
"""No number that is not negative has more as JSON."""


@dataclass(frozen=True)
class VisionFile:
    """What was written."""

    path: Path
    description: Description
    file_bytes: int
    """Of both files."""


def write_vision(
    checkpoint: Tensors,
    family: Family,
    directory: Path,
    config: Mapping[str, Any],
    out: Path,
    *,
    kind: str,
    made_from: str,
    threads: int,
) -> VisionFile:
    """Write ``out`` and its weights as ``kind``; ``made_from`` is 64 hex digits.

    A type that is not F32 is compared with F32 on a fixed picture, which takes the room of both for a while. One matrix
    is in memory at a time. Raises :class:`SourceError` for a vision side that is not known here.
    """
    tower = family.read(directory, config, checkpoint)
    with scratch_directory(out) as folder:
        if kind != F32:
            exact = _write(checkpoint, family, tower, folder / F32 / out.name, F32, made_from, 0.0)
            wanted = _embed(exact.path, threads)
            shutil.rmtree(folder / F32)
        error = 0.0
        written = _write(checkpoint, family, tower, folder / kind / out.name, kind, made_from, error)
        if kind != F32:
            found = _embed(written.path, threads)
            error = float(np.linalg.norm(found - wanted) / max(float(np.linalg.norm(wanted)), 1e-30))
            written = _describe(written.path, tower, kind, made_from, error)
        # the graph is what is looked for: an old one goes first, the new one comes last
        out.unlink(missing_ok=True)
        os.replace(weights_file(written.path), weights_file(out))
        os.replace(written.path, out)
    return VisionFile(out, written.description, written.file_bytes)


def planned_graph(
    checkpoint: Tensors, family: Family, directory: Path, config: Mapping[str, Any], name: str, kind: str
) -> tuple[onnx.ModelProto, int]:
    """The graph that :func:`write_vision` will write as ``name``, of zeros, and the bytes of its weights.

    From shapes alone; serialized, it has the bytes of the one to come.
    """
    tower = family.read(directory, config, checkpoint)
    graph, beside = Graph(family.name), _Counter()
    family.build(tower, Weights(graph, _Shapes(checkpoint), beside, weights_file(Path(name)).name, kind))
    described = _description(tower, kind, "0" * STAMP, 0.0, beside.size + STAMP)
    model = graph.unchecked_model()
    stored = (tensor.name for tensor in model.graph.initializer if tensor.external_data)
    return _said(model, described, dict.fromkeys(stored, UNKNOWN)), beside.size + STAMP


class _Shapes:
    """A checkpoint of zeros."""

    def __init__(self, checkpoint: Tensors) -> None:
        self.shapes = checkpoint.shapes

    def read_f32(self, name: str, index: int | None = None) -> Floats:
        """Zeros of the tensor's shape."""
        return np.zeros(self.shapes[name] if index is None else self.shapes[name][1:], dtype=np.float32)


class _Counter(BytesIO):
    """A file that keeps nothing but its size."""

    size = 0

    def write(self, data: Any) -> int:
        """Count ``data``."""
        self.size += len(data)
        return len(data)

    def tell(self) -> int:
        """Bytes so far."""
        return self.size


def read_vision(path: Path) -> VisionFile:
    """What is at ``path``, without its weights. Raises :class:`FormatError` for what is damaged or not whole."""
    graph = read_graph(path)
    described = read_description(graph.metadata.get(KEY), str(path))
    check_weights(path, described)
    return VisionFile(path, described, len(graph.raw) + described.weights_bytes)


def _write(
    checkpoint: Tensors, family: Family, tower: Any, path: Path, kind: str, made_from: str, error: float
) -> VisionFile:
    path.parent.mkdir()
    graph = Graph(family.name)
    beside = weights_file(path)
    with beside.open("xb") as file:
        weights = Weights(graph, checkpoint, file, beside.name, kind)
        family.build(tower, weights)
        file.write(made_from.encode())
        file.flush()
        os.fsync(file.fileno())
    for name in checkpoint.shapes:
        if name.startswith(family.prefixes) and name not in weights.used and not name.startswith(tower.unused):
            raise SourceError(
                f"tensor '{name}' is not known in the vision side of a {family.name} with these settings; use the "
                "config.json of these weights, or give --text-only for the GGUF alone"
            )
    onnx.save(graph.unchecked_model(), path)
    onnx.checker.check_model(path, full_check=True)
    return _describe(path, tower, kind, made_from, error)


def _describe(path: Path, tower: Any, kind: str, made_from: str, error: float) -> VisionFile:
    """Put the description, and hashes of everything, into the graph at ``path``."""
    beside = weights_file(path)
    size = beside.stat().st_size
    described = _description(tower, kind, made_from, error, size)
    graph = read_graph(path)
    content = _said(graph.model, described, tensor_hashes(beside, graph.stored))
    with path.open("wb") as file:
        file.write(sealed(content.SerializeToString(deterministic=True)))
        file.flush()
        os.fsync(file.fileno())
    return VisionFile(path, described, path.stat().st_size + size)


def _description(tower: Any, kind: str, made_from: str, error: float, weights_bytes: int) -> Description:
    return Description(
        kind=tower.kind,
        n_embd=tower.n_embd,
        layout=tower.layout,
        prompt=tower.prompt,
        weights_type=kind,
        weights_bytes=weights_bytes,
        relative_error=error,
        made_from=made_from,
    )


def _said(model: onnx.ModelProto, described: Description, hashes: Mapping[str, str]) -> onnx.ModelProto:
    """``model`` that says what it is. Blanks make up for the digits of the error: the file's size is known before."""
    blanks = " " * (ERROR_DIGITS - len(repr(described.relative_error)))
    onnx.helper.set_model_props(model, {KEY: described.text() + blanks, HASHES_KEY: unsealed(hashes)})
    return model


def _embed(path: Path, threads: int) -> Floats:
    """Embeddings of the fixed picture."""
    session = VisionSession(path, threads)
    return session.run({name: _fixed(name, shape) for name, shape in session.inputs.items()})["embeddings"]


def _fixed(name: str, shape: list[int]) -> Array:
    """Smooth colours in [-1, 1], and a mask without padding."""
    if name != "pixels":
        return np.ones(shape, dtype=np.float32)
    _, channels, height, width = shape
    y, x = np.mgrid[0:height, 0:width] / max(height, width)
    waves = [np.sin(7 * (c + 1) * x + 3 * y) * np.cos((5 + c) * y - 2 * x * x) for c in range(channels)]
    return np.stack(waves).astype(np.float32)[None]
