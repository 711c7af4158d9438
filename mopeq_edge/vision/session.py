"""A vision file in onnxruntime: ``out.vision.onnx``, its description checked, its weights in the file beside it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime

from mopeq_edge.errors import FormatError
from mopeq_edge.vision.description import KEY, WEIGHTS_ENDING, Description, read_description

Floats = npt.NDArray[np.float32]

STAMP = 64
"""Bytes at the end of the file with the weights that say what it was made from."""


def weights_file(path: Path) -> Path:
    """The file with the weights of the graph ``path``; the graph knows it by this name."""
    return path.with_name(path.name + WEIGHTS_ENDING)


class VisionSession:
    """A graph that is ready to run on ``threads`` CPU threads. Raises :class:`FormatError` for files that do not
    fit.
    """

    def __init__(self, path: Path, threads: int) -> None:
        if not path.is_file():
            raise FormatError(f"{path}: does not exist; expected the vision file that mopeq-edge convert wrote")
        if not weights_file(path).is_file():
            raise _alone(path)
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
        self.metadata: Mapping[str, str] = self._session.get_modelmeta().custom_metadata_map
        self.output_names = [output.name for output in self._session.get_outputs()]
        self.inputs: Mapping[str, list[int]] = {x.name: list(x.shape) for x in self._session.get_inputs()}

    def describe(self) -> Description:
        """What the file says of itself; also whether the weights beside it are its own."""
        found = read_description(self.metadata.get(KEY), str(self.path))
        check_weights(self.path, found)
        return found

    def run(self, feeds: Mapping[str, npt.NDArray[Any]]) -> dict[str, Floats]:
        """Every output by its name."""
        return dict(zip(self.output_names, self._session.run(None, dict(feeds)), strict=True))


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
