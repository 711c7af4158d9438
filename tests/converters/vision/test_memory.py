"""A tower is never in memory in float32 as a whole: measured in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from converters.vision import find_family, write_vision
from tools.vision_language_configs import TINY, config_of
from tools.vision_sides import vl2_vision_shapes

MIB = 2**20
LAYERS, WIDTH = 10, 512

CODE = """
import sys, json
from pathlib import Path
import numpy as np
from mopeq_edge.vision.graph_file import read_graph
import onnxruntime
from mopeq_edge.vision.session import VisionSession
# the check before makes onnx's table of operators, once
read_graph(Path(sys.argv[1]))
def resident(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1]) * 1024
before = resident("VmRSS")
session = VisionSession(Path(sys.argv[1]), 1)
loaded = resident("VmHWM") - before
feeds = {name: np.zeros(shape, np.float32) for name, shape in session.inputs.items()}
session.run(feeds)
print(json.dumps([loaded, resident("VmHWM") - before]))
"""


class Noise:
    """Any tensor of these shapes."""

    def __init__(self, shapes: dict[str, tuple[int, ...]]) -> None:
        self.shapes = shapes

    def read_f32(self, name: str, index: int | None = None) -> Any:
        assert index is None
        return np.random.default_rng(len(name)).standard_normal(self.shapes[name], dtype=np.float32) / 16


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(("kind", "share"), [("F32", 1.0), ("F16", 0.5), ("INT8", 0.25)])
def test_memory_is_that_of_the_file_and_a_few_matrices(kind: str, share: float, tmp_path: Path) -> None:
    config = config_of(TINY, shrink=True)
    config["vision_config"] |= {"width": WIDTH, "layers": LAYERS, "heads": 8, "mlp_ratio": 4.0}
    config["projector_config"]["input_dim"] = WIDTH
    shapes = vl2_vision_shapes(config)
    family = find_family(config)
    assert family is not None
    options: dict[str, Any] = {"kind": kind, "made_from": "0" * 64, "threads": 1}
    written = write_vision(Noise(shapes), family, tmp_path, config, tmp_path / "out.vision.onnx", **options)
    exact = 4 * LAYERS * 12 * WIDTH**2
    assert 0.9 * share < written.description.weights_bytes / exact < 1.2 * share + 0.05
    done = subprocess.run([sys.executable, "-c", CODE, written.path], capture_output=True, text=True, check=True)
    loaded, peak = json.loads(done.stdout)
    # a matrix in float32 is 4 MiB; all are 120 MiB
    assert exact == 120 * MIB
    assert loaded < 16 * MIB
    assert peak < written.description.weights_bytes + 48 * MIB
