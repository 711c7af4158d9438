"""The graphs themselves: ONNX's own operators, no weights inside, and rope's table where no model reaches."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import onnx
import pytest

from converters import CONVERTERS
from converters.onnx_graph import OPSET, Graph
from converters.onnx_reference.layers import make_parts
from converters.onnx_reference.read_settings import read_settings
from converters.onnx_reference.rope import rotations
from converters.onnx_reference.settings import ARCHITECTURES as TABLE
from converters.onnx_reference.settings import Rope
from converters.refused import REFUSED
from mopeq_edge.gguf_file import read_header
from mopeq_edge.source.converter import Converter

from ...expert_groups.architectures import ARCHITECTURES, random_tensors, write_model


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if "scales" not in name])
def test_standard_operators_and_no_weights(tmp_path: Path, name: str) -> None:
    own = ARCHITECTURES[name]
    path = tmp_path / "model.gguf"
    write_model(path, own, random_tensors(own), lambda _, values: (values, gguf.GGMLQuantizationType.F32))
    parts = make_parts(read_settings(read_header(path)), 1)
    every = (parts.attention, *parts.routers, parts.shared, parts.dense, parts.expert, parts.join, parts.head)
    for part in every:
        if part is None:
            continue
        model = part.graph.model()
        onnx.checker.check_model(model, full_check=True)
        assert [opset.domain for opset in model.opset_import] == [""]
        for node in model.graph.node:
            assert node.domain == ""
            assert not onnx.defs.get_schema(node.op_type, OPSET).deprecated
        assert all(np.prod(constant.dims) <= 8 for constant in model.graph.initializer)
        assert {value.name for value in model.graph.input} >= set(part.graph.weights)


def test_every_architecture_that_our_converters_write_is_in_the_table() -> None:
    # a function picks one of these by the rest of config.json
    fixed = {name: entry for name, entry in CONVERTERS.items() if isinstance(entry, Converter)}
    assert {entry.architecture for name, entry in fixed.items() if name not in REFUSED} == set(TABLE)


def test_rms_norm_is_the_definition() -> None:
    graph = Graph("norm")
    x = graph.input("x", ("n", 5))
    graph.output(graph.rms_norm(x, graph.weight("w", (5,)), 0.25), "y", ("n", 5))
    rng = np.random.default_rng(0)
    values, weight = rng.standard_normal((3, 5), dtype=np.float32), rng.standard_normal(5, dtype=np.float32)
    found = graph.session(1).run({"x": values, "w": weight})[0]
    for row, got in zip(values.astype(np.float64), found, strict=True):
        np.testing.assert_allclose(got, row / np.sqrt(np.mean(row**2) + 0.25) * weight, rtol=1e-5)


def test_sigmoids_far_from_zero() -> None:
    graph = Graph("sigmoid")
    graph.output(graph.sigmoid(graph.input("x", ("n",))), "y", ("n",))
    values = np.array([-200, -80, -30, -18.5, -1, 0, 1, 18.5, 200], dtype=np.float32)
    found = graph.session(1).run({"x": values})[0]
    np.testing.assert_allclose(found, 1 / (1 + np.exp(-values.astype(np.float64))), rtol=1e-6, atol=1e-38)


def test_sections_of_the_released_qwen3_vl() -> None:
    """24, 20 and 20 pairs take turns in 64; of the last four two fall to the fourth section, which is 0 in text."""
    cos, sin = rotations(Rope(128, 5e6, 1.0, 0.0, 1.0, 0, (24, 20, 20, 0)), 1000, None)
    assert cos.shape == sin.shape == (1000, 1, 64)
    still = [pair for pair in range(64) if not sin[:, 0, pair].any()]
    assert still == [61, 62]
    turned = [pair for pair in range(64) if pair not in still]
    angles = 999 * 5e6 ** (-np.array(turned) / 64)
    np.testing.assert_allclose(cos[999, 0, turned], np.cos(angles), atol=1e-6)
    assert (cos[:, 0, still] == 1).all()


def test_factors_divide_the_angles() -> None:
    factors = np.array([1, 2, 4, 8], dtype=np.float32)
    _, sin = rotations(Rope(8, 1e4, 0.5, 0.0, 1.0, 0, None), 8, factors)
    np.testing.assert_allclose(sin[7, 0], np.sin(7 * 0.5 * np.array([1, 0.1, 0.01, 0.001]) / factors), atol=1e-7)
