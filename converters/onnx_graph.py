"""ONNX graphs, node by node, and the sessions that run them.

Weights may be inputs of a graph, in the numpy array that they were dequantized to: such a graph holds none, serves
every layer of its kind, and onnxruntime copies nothing. Or they are constants: small ones in the graph, large ones in a
file beside it. Nodes are of ONNX's own operators, and a :class:`Session` runs them as they are written: no fusion.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float32]
Shape = tuple[int, ...]
Value = str
"""The name of a node's output, or of an input."""

OPSET = 18
IR_VERSION = 9
FLOAT, INT64 = TensorProto.FLOAT, TensorProto.INT64


class Graph:
    """A graph that grows. Weights to feed have the names of the GGUF's tensors, without ``blk.N.``."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.weights: dict[str, Shape] = {}
        """Shape of each weight in numpy's order, [n_out, n_in]: the reverse of ggml's."""
        self._inputs: list[onnx.ValueInfoProto] = []
        self._outputs: list[onnx.ValueInfoProto] = []
        self._nodes: list[onnx.NodeProto] = []
        self._constants: list[onnx.TensorProto] = []

    def input(self, name: str, dims: Sequence[int | str], kind: int = FLOAT) -> Value:
        """Something to feed; a dimension with a name may have any size."""
        self._inputs.append(helper.make_tensor_value_info(name, kind, list(dims)))
        return name

    def weight(self, name: str, shape: Shape) -> Value:
        """A float32 weight to feed."""
        self.weights[name] = shape
        return self.input(name, shape)

    def output(self, value: Value, name: str, dims: Sequence[int | str], kind: int = FLOAT) -> None:
        """Give ``value`` out under ``name``."""
        self._nodes.append(helper.make_node("Identity", [value], [name]))
        self._outputs.append(helper.make_tensor_value_info(name, kind, list(dims)))

    def add(self, operator: str, *inputs: Value, **attributes: Any) -> Value:
        """A node with one output."""
        return self.add_several(operator, 1, *inputs, **attributes)[0]

    def add_several(self, operator: str, n_outputs: int, *inputs: Value, **attributes: Any) -> list[Value]:
        """A node with several outputs."""
        outputs = [f"{operator}.{len(self._nodes)}.{i}" for i in range(n_outputs)]
        self._nodes.append(helper.make_node(operator, list(inputs), outputs, **attributes))
        return outputs

    def floats(self, *values: float) -> Value:
        """Constants: one number is a scalar, several are a vector."""
        return self._constant(np.array(values[0] if len(values) == 1 else values, dtype=np.float32))

    def integers(self, *values: int) -> Value:
        """A constant vector."""
        return self._constant(np.array(values, dtype=np.int64))

    def constant(self, values: Array) -> Value:
        """A constant of any shape and type, kept in the graph."""
        return self._constant(values)

    def stored(self, tensor: onnx.TensorProto) -> Value:
        """A constant whose numbers lie in another file."""
        self._constants.append(tensor)
        return tensor.name

    def filled(self, like: Value, value: float | bool) -> Value:
        """``value`` in the shape of ``like``."""
        kind = np.bool_ if isinstance(value, bool) else np.float32
        one = numpy_helper.from_array(np.array([value], dtype=kind))
        return self.add("ConstantOfShape", self.add("Shape", like), value=one)

    def reshape(self, value: Value, *shape: int) -> Value:
        """0 keeps a dimension, -1 takes what is left."""
        return self.add("Reshape", value, self.integers(*shape))

    def slice(self, value: Value, first: int, end: int) -> Value:
        """Part of the last axis."""
        return self.add("Slice", value, self.integers(first), self.integers(end), self.integers(-1))

    def linear(self, x: Value, weight: Value, bias: Value | None = None) -> Value:
        """[n, n_out] of ``x`` [n, n_in] and ``weight`` [n_out, n_in]; the weight is read as it lies."""
        return self.add("Gemm", x, weight, *([] if bias is None else [bias]), transB=1)

    def sigmoid(self, x: Value) -> Value:
        """1 / (1 + exp(-x)). onnxruntime's own operator gives 0 below -18, where gates and routers still differ."""
        return self.add("Reciprocal", self.add("Add", self.add("Exp", self.add("Neg", x)), self.floats(1.0)))

    def rms_norm(self, x: Value, weight: Value, eps: float) -> Value:
        """``x`` over the root mean square of its last axis, times ``weight``."""
        mean = self.add("ReduceMean", self.add("Mul", x, x), self.integers(-1), keepdims=1)
        root = self.add("Sqrt", self.add("Add", mean, self.floats(eps)))
        return self.add("Mul", self.add("Div", x, root), weight)

    def layer_norm(self, x: Value, weight: Value, bias: Value, eps: float) -> Value:
        """``x`` less the mean of its last axis, over its standard deviation, times ``weight`` plus ``bias``."""
        return self.add("LayerNormalization", x, weight, bias, epsilon=eps, axis=-1)

    def times(self, x: Value, factor: float) -> Value:
        """``x`` times a number."""
        return self.add("Mul", x, self.floats(factor))

    def model(self) -> onnx.ModelProto:
        """The graph as an ONNX model, checked."""
        model = self.unchecked_model()
        onnx.checker.check_model(model, full_check=True)
        return model

    def unchecked_model(self) -> onnx.ModelProto:
        """The same; with constants in another file it can be checked once both files are there."""
        graph = helper.make_graph(self._nodes, self.name, self._inputs, self._outputs, self._constants)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)

    def session(self, threads: int) -> Session:
        """Something that runs the graph on the CPU."""
        return Session(self.model(), threads)

    def _constant(self, values: Array) -> Value:
        name = f"constant.{len(self._constants)}"
        self._constants.append(numpy_helper.from_array(values, name))
        return name


class Session:
    """A graph in onnxruntime. Between runs it keeps no memory: neither an arena nor packed weights."""

    def __init__(self, model: onnx.ModelProto, threads: int) -> None:
        # it starts a thread, and most conversions have no graph to run
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.enable_cpu_mem_arena = False
        options.enable_mem_pattern = False
        options.log_severity_level = 3
        options.add_session_config_entry("session.disable_prepacking", "1")
        # threads that wait in a loop would take the processor from the dequantization
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self._session = onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )

    def run(self, feeds: Mapping[str, Array]) -> list[Array]:
        """The outputs, in the order in which the graph has them. Contiguous arrays are not copied."""
        found: list[Array] = self._session.run(None, dict(feeds))
        return found
