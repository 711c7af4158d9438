"""A vision file in onnxruntime: ``out.vision.onnx``, its description checked, its weights in the file beside it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mopeq_edge.errors import FormatError, shown
from mopeq_edge.vision.description import (
    KEY,
    STAMP,
    Crops,
    Description,
    Tiles,
    read_description,
    weights_file,
)
from mopeq_edge.vision.graph_file import read_graph

Floats = npt.NDArray[np.float32]


class VisionSession:
    """A graph that is ready to run on ``threads`` CPU threads. Raises :class:`FormatError` for files that do not
    fit.
    """

    def __init__(self, path: Path, threads: int) -> None:
        if not path.is_file():
            raise FormatError(f"{path}: does not exist; expected the vision file that mopeq-edge convert wrote")
        if not weights_file(path).is_file():
            raise _alone(path)
        metadata = read_graph(path).metadata
        # it starts a thread, and a conversion of a model that sees nothing comes by here
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        # without the arena, which is the default, freed matrices of every size stay in the allocator's lists
        options.enable_cpu_mem_arena = True
        options.log_severity_level = 4
        # packed or folded, or with all constants turned into float32 at once, a tower would be in memory a second time
        options.add_session_config_entry("session.disable_prepacking", "1")
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
        try:
            self._session = onnxruntime.InferenceSession(
                str(path), options, providers=["CPUExecutionProvider"], disabled_optimizers=["ConstantFolding"]
            )
        # onnxruntime's errors have no base of their own
        except Exception as error:
            reason = " ".join(str(error).split())[:200]
            raise FormatError(f"{path}: onnxruntime cannot load it: {reason}; convert the checkpoint again") from None
        self.path = path
        self.metadata: Mapping[str, str] = metadata
        self.outputs: Mapping[str, list[int]] = {x.name: list(x.shape) for x in self._session.get_outputs()}
        self.inputs: Mapping[str, list[int]] = {x.name: list(x.shape) for x in self._session.get_inputs()}

    def describe(self) -> Description:
        """What the file says of itself; also whether its graph and the weights beside it are what it describes."""
        found = read_description(self.metadata.get(KEY), str(self.path))
        check_weights(self.path, found)
        for what, has, expected in (("takes", self.inputs, _inputs(found)), ("gives", self.outputs, _outputs(found))):
            if has != expected:
                raise FormatError(
                    f"{self.path}: its graph {what} {shown(has)}, '{KEY}' describes {shown(expected)}; convert the "
                    "checkpoint again"
                )
        return found

    def run(self, feeds: Mapping[str, npt.NDArray[Any]]) -> dict[str, Floats]:
        """Every output by its name."""
        try:
            found = self._session.run(None, dict(feeds))
        # onnxruntime's errors have no base of their own
        except Exception as error:
            reason = " ".join(str(error).split())[:200]
            raise FormatError(f"{self.path}: cannot be computed ({reason}); convert the checkpoint again") from None
        return dict(zip(self.outputs, found, strict=True))


def _inputs(described: Description) -> dict[str, list[int]]:
    layout = described.layout
    pixels = {"pixels": [1, 3, layout.side, layout.side]}
    return pixels if isinstance(layout, Tiles) else {**pixels, "mask": [(layout.side // layout.patch) ** 2]}


def _outputs(described: Description) -> dict[str, list[int]]:
    layout, width = described.layout, described.n_embd
    if isinstance(layout, Crops):
        # four patches are one token
        return {"embeddings": [(layout.side // layout.patch // 2) ** 2, width], "picture_tokens": [4, width]}
    return {"embeddings": [layout.rows**2, width], "image_newline": [width], "view_seperator": [width]}


def check_weights(path: Path, description: Description) -> None:
    """Raise :class:`FormatError` if the file with the weights of ``path`` is not the one that it was written with."""
    weights = weights_file(path)
    if not weights.is_file():
        raise _alone(path)
    size = weights.stat().st_size
    if size != description.weights_bytes:
        raise FormatError(
            f"{weights}: has {size} bytes, expected {description.weights_bytes}; copy it and {path.name} again"
        )
    with weights.open("rb") as file:
        file.seek(-STAMP, 2)
        stamp = file.read()
    if stamp != description.made_from.encode():
        raise FormatError(f"{weights}: belongs to another {path.name}; copy both files again")


def _alone(path: Path) -> FormatError:
    return FormatError(
        f"{path}: its weights, {weights_file(path).name}, are not beside it; move or copy both files together"
    )
