"""Checkpoints shaped like the released ones: their sizes, the ways to write them, and how much memory it takes."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mopeq_edge.source.checkpoint import Checkpoint
from tools.vision_language_checkpoints import Options, molmoe_shapes, vl2_shapes, write_checkpoint
from tools.vision_language_configs import BASE, MODELS, MOLMOE, SMALL, TINY, config_of

BILLIONS = {MOLMOE: 7.2, TINY: 3.37, SMALL: 16.1, BASE: 27.5}
"""All parameters, with what sees pictures, as the released models' pages say."""


@pytest.mark.parametrize("model", MODELS)
def test_as_many_weights_as_released(model: str) -> None:
    shapes = molmoe_shapes(config_of(model)) if model == MOLMOE else vl2_shapes(config_of(model))
    total = sum(math.prod(shape) for shape in shapes.values())
    assert total / 1e9 == pytest.approx(BILLIONS[model], rel=0.005)


@pytest.mark.parametrize("torch", [False, True])
def test_shards_hold_the_same_numbers(tmp_path: Path, torch: bool) -> None:
    whole = Checkpoint(write_checkpoint(tmp_path / "whole", Options(TINY, shrink=True)))
    parts = write_checkpoint(tmp_path / "parts", Options(TINY, shrink=True, torch=torch, shard_bytes=300_000))
    shards = [path for path in parts.iterdir() if path.suffix == (".bin" if torch else ".safetensors")]
    assert len(shards) > 3
    found = Checkpoint(parts)
    assert set(found.names) == set(whole.names)
    for name in whole.names:
        assert found.shape(name) == whole.shape(name)
        assert np.array_equal(found.read_f32(name), whole.read_f32(name))
    assert whole.dtype("language.lm_head.weight") == "BF16"


def test_a_group_of_layers(tmp_path: Path) -> None:
    names = Checkpoint(write_checkpoint(tmp_path / "m", Options(BASE, shrink=True, layers=2))).names
    assert json.loads((tmp_path / "m" / "config.json").read_text())["language_config"]["num_hidden_layers"] == 2
    assert {name.split(".")[3] for name in names if name.startswith("language.model.layers.")} == {"0", "1"}
    assert "language.model.layers.0.mlp.up_proj.weight" in names
    assert "language.model.layers.1.mlp.gate.e_score_correction_bias" in names


def test_chunks_need_no_more_memory_than_themselves(tmp_path: Path) -> None:
    """A tensor of 412 MB is written by a process that may not have as much."""
    limit = 300 << 20
    code = (
        "from pathlib import Path; from tools import vision_language_checkpoints as t; import resource; "
        f"resource.setrlimit(resource.RLIMIT_DATA, ({limit}, {limit})); "
        f"t.write_weights(Path({str(tmp_path / 'm')!r}), {{'a': (50304, 2048)}}, 'bfloat16', 0)"
    )
    subprocess.run(
        [sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2], env={"OMP_NUM_THREADS": "1"}
    )
    assert (tmp_path / "m").stat().st_size > 50304 * 2048 * 2
