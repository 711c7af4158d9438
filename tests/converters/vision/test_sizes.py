"""Bytes of vision files, known from shapes alone, against the files that are written."""

from __future__ import annotations

import json
from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper

from converters.vision import TYPES, find_family, planned_graph, write_vision
from mopeq_edge.device_files import DeviceFile, device_files
from mopeq_edge.errors import FormatError, SourceError
from mopeq_edge.memory.tower import ARENA, PYTHON_BYTES, tower_of_file, work_bytes
from mopeq_edge.source.checkpoint import Checkpoint
from tools.vision_language_configs import BASE, MOLMOE, SMALL, TINY

from ..vision_language import build


@pytest.fixture(scope="module", params=[TINY, SMALL, BASE, MOLMOE])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(request.param, tmp_path_factory.mktemp("model") / "model", "bfloat16")


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("name", ["o.vision.onnx", "a-much-longer-name-of-a-file.vision.onnx"])
def test_predicted_is_written_to_the_byte(model: Path, kind: str, name: str, tmp_path: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    family = find_family(config)
    assert family is not None
    checkpoint = Checkpoint(model)
    graph, weights = planned_graph(checkpoint, family, model, config, name, kind)
    write_vision(checkpoint, family, model, config, tmp_path / name, kind=kind, made_from="a" * 64, threads=1)
    sizes = {path.name: path.stat().st_size for path in tmp_path.iterdir()}
    assert sizes == {name: len(graph.SerializeToString()), f"{name}.data": weights}
    assert device_files(tmp_path / name) == tuple(DeviceFile(file, sizes[file]) for file in (name, f"{name}.data"))
    tower = tower_of_file(tmp_path / name)
    assert tower.nbytes == PYTHON_BYTES + sum(sizes.values()) + int(ARENA[kind] * work_bytes(graph))


def test_what_is_alive_at_once() -> None:
    """By hand: x [4, 8] and its double live while both are added; views cost nothing."""
    nodes = [
        helper.make_node("Add", ["x", "x"], ["a"]),  # 128 bytes
        helper.make_node("Reshape", ["a", "shape"], ["b"]),  # where a is
        helper.make_node("Neg", ["b"], ["c"]),  # 128 more
        helper.make_node("Concat", ["b", "c"], ["d"], axis=0),  # 256 more: all three at once
        helper.make_node("ReduceSum", ["d"], ["y"], keepdims=0),  # 4 beside 256
    ]
    shape = helper.make_tensor("shape", TensorProto.INT64, [2], [8, 4])
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [4, 8])]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, [])]
    graph = helper.make_graph(nodes, "g", inputs, outputs, [shape])
    assert work_bytes(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)])) == 512


def test_files_that_are_not_whole(tmp_path: Path) -> None:
    path = tmp_path / "x.vision.onnx"
    with pytest.raises(SourceError, match=r"x.vision.onnx: expected a file that the device loads beside the GGUF"):
        device_files(path)
    path.write_bytes(b"no graph")
    with pytest.raises(SourceError, match=r"its weights, x.vision.onnx.data, are not beside it"):
        device_files(path)
    (tmp_path / "x.vision.onnx.data").write_bytes(b"1234")
    assert [file.nbytes for file in device_files(path)] == [8, 4]
    with pytest.raises(FormatError, match="is no ONNX file"):
        tower_of_file(path)
    onnx.save(helper.make_model(helper.make_graph([], "g", [], [])), path)
    with pytest.raises(FormatError, match=r"has no 'mopeq\.vision' in its metadata"):
        tower_of_file(path)
