"""Graphs of strangers: one line for each that could read elsewhere, run on, or grow."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from mopeq_edge.errors import FormatError
from mopeq_edge.vision.description import KEY, weights_file
from mopeq_edge.vision.graph_file import OPERATORS, read_graph
from mopeq_edge.vision.session import VisionSession
from tools.fuzz.seeds import vision_description, vision_graph, write_vision_files

Change = Callable[[Any], object]


def placed(**place: str) -> Change:
    """Says that the matrix lies elsewhere."""

    def change(model: Any) -> None:
        matrix = model.graph.initializer[-1]
        own = {entry.key: entry.value for entry in matrix.external_data} | place
        del matrix.external_data[:]
        matrix.external_data.extend(onnx.StringStringEntryProto(key=k, value=v) for k, v in own.items() if v)

    return change


def node(operator: str, inputs: list[str], **attributes: Any) -> Change:
    return lambda model: model.graph.node.append(helper.make_node(operator, inputs, ["more"], **attributes))


def constant(model: Any, name: str, values: Any, kind: int = TensorProto.INT64) -> None:
    model.graph.initializer.append(helper.make_tensor(name, kind, [len(values)], values))


def grown(model: Any) -> None:
    """Concat of a value with itself, time and again."""
    last = "embeddings"
    for number in range(40):
        model.graph.node.append(helper.make_node("Concat", [last, last], [f"twice{number}"], axis=0))
        last = f"twice{number}"


def padded(model: Any) -> None:
    constant(model, "pads", [0, 0, 2**40, 0])
    node("Pad", ["embeddings", "pads"])(model)


def reshaped(model: Any) -> None:
    """To a shape that the picture decides."""
    model.graph.node.append(helper.make_node("Cast", ["pixels"], ["numbers"], to=TensorProto.INT64))
    constant(model, "flat", [-1])
    model.graph.node.append(helper.make_node("Reshape", ["numbers", "flat"], ["sizes"]))
    node("Reshape", ["embeddings", "sizes"])(model)


def branch(model: Any) -> None:
    body = helper.make_graph([], "body", [], [])
    model.graph.node.append(helper.make_node("Loop", ["", ""], ["more"], body=body))


def attribute_graph(model: Any) -> None:
    model.graph.node.append(
        helper.make_node("Identity", ["embeddings"], ["more"], g=helper.make_graph([], "b", [], []))
    )


def wide(model: Any) -> None:
    model.graph.initializer.append(TensorProto(name="wide", data_type=TensorProto.FLOAT, dims=[2**31, 2**31]))


def second(model: Any) -> None:
    copy = TensorProto()
    copy.CopyFrom(model.graph.initializer[-1])
    copy.name = "again"
    model.graph.initializer.append(copy)


HOSTILE: dict[str, tuple[Change, str]] = {
    "parent folder": (placed(location="../out.vision.onnx.data"), "lies in '../out.vision.onnx.data', not in"),
    "absolute path": (placed(location="/etc/passwd"), "tensor 'matrix' lies in '/etc/passwd', not in"),
    "another file": (placed(location="secret.key"), "lies in 'secret.key', not in 'out.vision.onnx.data'"),
    "no place": (placed(offset=""), "tensor 'matrix' lies in"),
    "another key": (placed(checksum="1"), "tensor 'matrix' lies in"),
    "offset that is no number": (placed(offset="-1"), "lies at '-1', which is no number"),
    "offset in other digits": (placed(offset="٣"), "which is no number"),
    "huge offset": (placed(offset="9" * 400), "which is no number"),
    "behind the end": (placed(offset="4200"), "tensor 'matrix' ends at byte 4584 of 4544 of out.vision.onnx.data"),
    "other length": (placed(length="380"), "tensor 'matrix' has 380 bytes, which its shape and type do not make"),
    "one over another": (second, "tensor 'again' lies over another"),
    "loop": (branch, "has the operator 'Loop' of ''"),
    "graph in an operator": (attribute_graph, "has an operator Identity with 'g', which is no number"),
    "operator of onnxruntime": (node("EPContext", ["pixels"], domain="com.microsoft"), "operator 'EPContext' of 'com."),
    "other domain": (lambda m: m.opset_import.append(helper.make_opsetid("com.microsoft", 1)), "not ONNX's own"),
    "function": (lambda m: m.functions.append(onnx.FunctionProto(name="f")), "has functions, training or sparse"),
    "training": (lambda m: m.training_info.append(onnx.TrainingInfoProto()), "has functions, training or sparse"),
    "huge constant": (wide, r"tensor 'wide' has shape \[2147483648, 2147483648\]"),
    "grows": (grown, "has a value 'twice21' of 134217728 numbers, at most 67108864 are computed"),
    "padding": (padded, "has a value 'more' of 8796093022240 numbers"),
    "shape from the picture": (reshaped, "has a value 'more' of no known shape"),
    "shapes that do not fit": (node("MatMul", ["embeddings", "embeddings"]), "has shapes that do not fit"),
    "open input": (lambda m: m.graph.input[0].type.tensor_type.shape.dim[0].Clear(), "of no known shape"),
    "metadata twice": (
        lambda m: m.metadata_props.extend(onnx.StringStringEntryProto(key="a", value=v) for v in "xy"),
        "its metadata have a key twice",
    ),
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write_vision_files(tmp_path / "out.vision.onnx")


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile(path: Path, name: str) -> None:
    change, message = HOSTILE[name]
    model = onnx.load(path, load_external_data=False)
    change(model)
    path.write_bytes(model.SerializeToString())
    for read in (read_graph, lambda p: VisionSession(p, 1)):
        with pytest.raises(FormatError, match=message) as caught:
            read(path)
        assert str(caught.value).startswith(f"{path}: ")
        assert "\n" not in str(caught.value)


def test_what_is_no_file(path: Path) -> None:
    with pytest.raises(FormatError, match=r"cannot be read \(it is a directory\)"):
        read_graph(path.parent)
    for raw in (b"nothing", b"\xff" * 100, path.read_bytes()[:50]):
        path.write_bytes(raw)
        with pytest.raises(FormatError, match=f"^{path}: "):
            read_graph(path)


def test_texts_that_are_none(path: Path) -> None:
    """protobuf's Python gives bytes for them."""
    raw = path.read_bytes()
    for old, new in ((b"mopeq-edge vision", b"mopeq-edge visio\xff"), (b"length", b"lengt\xff"), (b"4096", b"409\xff")):
        assert raw.count(old) == 1
        path.write_bytes(raw.replace(old, new))
        with pytest.raises(FormatError, match=f"^{path}: has the text b'.*which is no UTF-8"):
            read_graph(path)


def test_every_operator_is_one_of_numbers() -> None:
    """ONNX's own schemas: no operator that is accepted runs a graph."""
    for name in OPERATORS:
        schema = onnx.defs.get_schema(name, 18)
        kinds = {attribute.type for attribute in schema.attributes.values() if attribute.required}
        assert onnx.defs.OpSchema.AttrType.GRAPH not in kinds, name


def test_a_graph_that_is_not_what_it_describes(path: Path) -> None:
    model = vision_graph()
    vector = numpy_helper.to_array(model.graph.initializer[0])[:-1]
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(vector.copy(), "newline"))
    model.graph.output[1].type.tensor_type.shape.dim[0].dim_value = 7
    helper.set_model_props(model, {KEY: vision_description().text()})
    path.write_bytes(model.SerializeToString())
    with pytest.raises(FormatError, match=r"its graph gives \{'embeddings': .* describes "):
        VisionSession(path, 1).describe()


def test_the_weights_may_be_a_link(path: Path) -> None:
    beside = weights_file(path)
    beside.rename(path.parent / "blob")
    beside.symlink_to("blob")
    assert VisionSession(path, 1).describe() == vision_description()
