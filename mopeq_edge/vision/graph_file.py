"""The ONNX file of a stranger: what it may hold is checked before onnxruntime sees it.

A graph of ONNX's own operators without branches and loops, in which the shape of every value is known beforehand and
limited; its weights lie in the file beside it and nowhere else.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import onnx
from onnx import AttributeProto, ModelProto, TensorProto

from mopeq_edge.errors import FormatError, shown
from mopeq_edge.regular_file import read_whole, regular_size
from mopeq_edge.vision.description import weights_file

MAX_GRAPH = 2**27
"""Bytes of the graph's file; those of the released towers have at most 6 million."""

MAX_NODES = 2**14
MAX_ELEMENTS = 2**26
"""Of a value between two operators; the largest of the released towers has 9 million."""

OPERATORS = frozenset(
    (
        *("Add", "And", "Cast", "Concat", "DequantizeLinear", "Equal", "Erf", "Exp", "Gemm", "Identity"),
        *("LayerNormalization", "Less", "MatMul", "Mul", "Neg", "Not", "Pad", "Reciprocal", "ReduceMean", "Reshape"),
        *("Shape", "Slice", "Softmax", "Tanh", "Transpose"),
    )
)
"""What converters/vision makes graphs of. None of them runs another graph or reads a file."""

_BYTES = {TensorProto.FLOAT: 4, TensorProto.FLOAT16: 2, TensorProto.INT8: 1}
"""Of an element of a type that matrices are stored in."""

_PLAIN = (AttributeProto.FLOAT, AttributeProto.INT, AttributeProto.STRING, AttributeProto.FLOATS, AttributeProto.INTS)


@dataclass(frozen=True)
class StoredTensor:
    """Where the data of a tensor lie in the file beside the graph, in bytes."""

    name: str
    offset: int
    nbytes: int


@dataclass(frozen=True)
class GraphFile:
    """A graph that was read and checked."""

    path: Path
    raw: bytes
    model: ModelProto
    metadata: dict[str, str]
    stored: tuple[StoredTensor, ...]
    """In the order of their places."""


def read_graph(path: Path) -> GraphFile:
    """Read and check the graph at ``path``. Raises :class:`FormatError`, which says what is wrong with it."""
    try:
        raw = read_whole(path, MAX_GRAPH)
    except OSError as error:
        raise FormatError(f"{path}: cannot be read ({error.strerror}); copy it and its weights again") from None
    try:
        model = onnx.load_model_from_string(raw)
    # protobuf's errors have no base that onnx would promise
    except Exception:
        raise FormatError(f"{path}: is no ONNX file; copy it again, or convert the checkpoint again") from None
    try:
        metadata = _texts(model.metadata_props)
        if len(metadata) != len(model.metadata_props):
            raise ValueError("its metadata have a key twice")
        _check_operators(model)
        stored = _stored(model, path)
        _check_shapes(model)
    except ValueError as error:
        raise FormatError(f"{path}: {error}; expected a vision file that mopeq-edge convert wrote") from None
    return GraphFile(path, raw, model, metadata, stored)


def _check_operators(model: ModelProto) -> None:
    graph = model.graph
    if model.functions or model.training_info or graph.sparse_initializer:
        raise ValueError("has functions, training or sparse tensors")
    if any(opset.domain for opset in model.opset_import):
        raise ValueError("has operators that are not ONNX's own")
    if len(graph.node) > MAX_NODES or len(graph.initializer) > MAX_NODES:
        raise ValueError(f"has {max(len(graph.node), len(graph.initializer))} nodes, at most {MAX_NODES} are read")
    for node in graph.node:
        if node.domain or node.op_type not in OPERATORS:
            raise ValueError(f"has the operator {shown(node.op_type)} of {shown(node.domain)}")
        for attribute in node.attribute:
            if attribute.type not in _PLAIN or attribute.ref_attr_name:
                raise ValueError(f"has an operator {node.op_type} with {shown(attribute.name)}, which is no number")


def _stored(model: ModelProto, path: Path) -> tuple[StoredTensor, ...]:
    beside = weights_file(path)
    try:
        size = regular_size(beside)
    except OSError:
        size = 0
    found = []
    for tensor in model.graph.initializer:
        n = math.prod(tensor.dims)
        if min(tensor.dims, default=1) < 0 or n > MAX_ELEMENTS:
            raise ValueError(f"tensor {shown(tensor.name)} has shape {shown(list(tensor.dims))}")
        if tensor.data_location != TensorProto.EXTERNAL:
            if tensor.external_data:
                raise ValueError(f"tensor {shown(tensor.name)} is in the file and out of it")
            continue
        place = _texts(tensor.external_data)
        if place.keys() != {"location", "offset", "length"} or place["location"] != beside.name:
            raise ValueError(
                f"tensor {shown(tensor.name)} lies in {shown(place.get('location'))}, not in {shown(beside.name)}"
            )
        offset, nbytes = _number(place["offset"]), _number(place["length"])
        if tensor.data_type not in _BYTES or nbytes != n * _BYTES[tensor.data_type]:
            raise ValueError(f"tensor {shown(tensor.name)} has {nbytes} bytes, which its shape and type do not make")
        if size and offset + nbytes > size:
            raise ValueError(f"tensor {shown(tensor.name)} ends at byte {offset + nbytes} of {size} of {beside.name}")
        found.append(StoredTensor(_text(tensor.name), offset, nbytes))
    found.sort(key=lambda tensor: tensor.offset)
    end = 0
    for tensor in found:
        if tensor.offset < end:
            raise ValueError(f"tensor {shown(tensor.name)} lies over another")
        end = tensor.offset + tensor.nbytes
    return tuple(found)


def _text(value: str | bytes) -> str:
    """protobuf gives bytes for a text that is no UTF-8."""
    if not isinstance(value, str):
        raise ValueError(f"has the text {shown(value)}, which is no UTF-8")
    return value


def _texts(entries: Iterable[onnx.StringStringEntryProto]) -> dict[str, str]:
    return {_text(entry.key): _text(entry.value) for entry in entries}


def _number(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) < 16):
        raise ValueError(f"a tensor lies at {shown(text)}, which is no number")
    return int(text)


def _check_shapes(model: ModelProto) -> None:
    """Every value has a shape, which follows from those of the inputs, and a limited size."""
    try:
        inferred = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True)
    # onnx has several errors of its own
    except Exception as error:
        raise ValueError(f"has shapes that do not fit ({' '.join(str(error).split())[:120]})") from None
    graph = inferred.graph
    sizes = {value.name: _elements(value) for value in (*graph.input, *graph.value_info, *graph.output)}
    for name in (*(value.name for value in graph.input), *(name for node in graph.node for name in node.output)):
        size = sizes.get(name)
        if size is None:
            raise ValueError(f"has a value {shown(name)} of no known shape")
        if size > MAX_ELEMENTS:
            raise ValueError(f"has a value {shown(name)} of {size} numbers, at most {MAX_ELEMENTS} are computed")


def _elements(value: onnx.ValueInfoProto) -> int | None:
    kind = value.type.tensor_type
    if not kind.HasField("shape") or any(not dim.HasField("dim_value") for dim in kind.shape.dim):
        return None
    return math.prod(int(dim.dim_value) for dim in kind.shape.dim)
