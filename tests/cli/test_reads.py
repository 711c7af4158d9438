"""How often a stage reads each byte of a checkpoint's tensors, counted where all weights are read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from click.testing import CliRunner

from mopeq_edge.cli import cli
from mopeq_edge.source import shard
from mopeq_edge.source.file_bytes import File, read_bytes

from ..conftest import EXAMPLE

pytestmark = pytest.mark.runtime

Times = npt.NDArray[np.uint8]
Stage = Callable[..., Times]
WEIGHTS = EXAMPLE / "model.safetensors"
UNUSED = ("gate", "norm")
"""Parts of names of tensors that have no candidate types: a router's and norms."""


@pytest.fixture
def stage(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Stage:
    """Runs a command on the bundled model; gives how often each byte of its file was read."""
    reads: list[tuple[int, int]] = []

    def counted(path: File, offset: int, count: int) -> npt.NDArray[np.uint8]:
        reads.append((offset, count))
        return read_bytes(path, offset, count)

    monkeypatch.setattr(shard, "read_bytes", counted)

    def run(name: str, *options: object) -> Times:
        reads.clear()
        common = ("--work-dir", tmp_path / "work", *(("--threads", 1) if name != "plan" else ()))
        arguments = [str(argument) for argument in (name, EXAMPLE, *options, *common)]
        done = CliRunner().invoke(cli, arguments, catch_exceptions=False)
        assert done.exit_code == 0, done.output
        times = np.zeros(WEIGHTS.stat().st_size, np.uint8)
        for offset, count in reads:
            times[offset : offset + count] += 1
        return times

    return run


def of_tensors(times: Times) -> dict[str, set[int]]:
    """How often bytes of each tensor were read."""
    length = int.from_bytes(WEIGHTS.read_bytes()[:8], "little")
    header = json.loads(WEIGHTS.read_bytes()[8 : 8 + length])
    places = {name: entry["data_offsets"] for name, entry in header.items() if name != "__metadata__"}
    return {name: set(times[8 + length + a : 8 + length + b].tolist()) for name, (a, b) in places.items()}


def test_each_byte_is_read_once(stage: Stage, tmp_path: Path) -> None:
    text = ("--text", EXAMPLE / "calibration.txt", "--window", 32, "--chunks", 1, "--pre", "gpt-2")
    forward = of_tensors(stage("calibrate", *text, "--no-fisher"))
    embedding = "model.embed_tokens.weight"
    assert {name for name, times in forward.items() if times != {1}} == {embedding}
    assert forward[embedding] <= {0, 1}, "only the text's rows"

    (tmp_path / "work" / "imatrix.gguf").unlink()
    both = of_tensors(stage("calibrate", *text))
    at_the_end = {"model.norm.weight", "lm_head.weight"}
    assert {name for name, times in both.items() if times == {1}} == at_the_end
    rest = both.keys() - at_the_end - {embedding}
    assert all(both[name] == {2} for name in rest), "forward, and backward in the opposite order"

    types = ("--types", "Q3_K,Q4_0", "--pre", "gpt-2")
    for name, times in of_tensors(stage("sensitivity", *types, "--sample-rows", 16)).items():
        own = name.split(".")[-2]
        assert times == ({0} if own.endswith(UNUSED) or own.startswith("norm") else {1}), name

    assert not stage("plan", *types, "--target-bpw", 4.3).any(), "a plan needs the table alone"
    emitted = of_tensors(stage("emit", tmp_path / "out.gguf", "--pre", "gpt-2"))
    assert all(times == {1} for times in emitted.values())
