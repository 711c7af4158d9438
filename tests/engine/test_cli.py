"""``--engine ray`` from the command line: files, stdout and the end of it all."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from mopeq_edge.engine.ray import connected
from mopeq_edge.gguf_file import read_header

pytestmark = [pytest.mark.runtime, pytest.mark.cluster]

PROGRAM = "import sys; sys.argv[0] = 'mopeq-edge'; from mopeq_edge.cli import main; main()"


def environment() -> dict[str, str]:
    found = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    path = os.pathsep.join([os.getcwd(), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**found, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


def command(*arguments: object) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-c", PROGRAM, *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True, env=environment())


@pytest.fixture(scope="module")
def planned(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A work directory with a plan and all before it, made by the local engine."""
    work = tmp_path_factory.mktemp("planned") / "work"
    for arguments in (
        ("calibrate", tiny_model, "--chunks", 2, "--window", 64, "--no-fisher"),
        ("sensitivity", tiny_model, "--types", "Q2_K,Q4_K", "--sample-rows", 8),
        ("plan", tiny_model, "--types", "Q2_K,Q4_K", "--target-gb", 0.008, "--sensitivity", "imatrix"),
    ):
        made = command(*arguments, "--work-dir", work)
        assert made.returncode == 0, made.stderr
    return work


def test_stages_on_a_cluster(cluster: Any, planned: Path, tiny_model: Path, tmp_path: Path) -> None:
    """The table of the local engine, and from a URL the tensors of its file; stdout is JSON alone."""
    work = tmp_path / "work"
    shutil.copytree(planned, work)
    table = "sensitivity-activation.safetensors"
    (work / table).unlink()
    engine = ("--work-dir", work, "--engine", "ray", "--address", cluster.address, "--json")
    made = command("sensitivity", tiny_model, "--types", "Q2_K,Q4_K", "--sample-rows", 8, *engine)
    assert made.returncode == 0, made.stderr
    assert json.loads(made.stdout)["file"] == str(work / table)
    assert (work / table).read_bytes() == (planned / table).read_bytes()
    local = command("emit", tiny_model, tmp_path / "local.gguf", "--work-dir", work, "--json")
    made = command("emit", f"local://{tiny_model.resolve()}", tmp_path / "ray.gguf", *engine)
    assert made.returncode == 0, made.stderr
    assert json.loads(made.stdout)["file_bytes"] == json.loads(local.stdout)["file_bytes"]
    files = [(tmp_path / name).read_bytes() for name in ("local.gguf", "ray.gguf")]
    headers = [read_header(tmp_path / name) for name in ("local.gguf", "ray.gguf")]
    assert files[0][headers[0].data_start :] == files[1][headers[1].data_start :]
    differ = {key for key in headers[0].kvs if headers[0].kvs[key] != headers[1].kvs[key]}
    assert differ == {"mopeq.source.sha256", "mopeq.header_hash"}


def test_ctrl_c_ends_it(cluster: Any, planned: Path, tiny_model: Path, tmp_path: Path) -> None:
    """While tasks run elsewhere: one line, 130, nothing left."""
    work = tmp_path / "work"
    shutil.copytree(planned, work)
    (work / "sensitivity-activation.safetensors").unlink()
    before = sorted(path.name for path in work.iterdir())
    arguments = ("sensitivity", tiny_model, "--types", "IQ2_XXS,IQ3_XXS,IQ2_S", "--work-dir", work, "--engine", "ray")
    child = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *map(str, arguments), "--address", cluster.address],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    # it is at work when the cluster is
    from ray._private.state import available_resources_per_node

    deadline = time.monotonic() + 90
    with connected(cluster.address, print):
        while any(node.get("CPU") for node in available_resources_per_node().values()) and time.monotonic() < deadline:
            time.sleep(0.05)
    child.send_signal(signal.SIGINT)
    start = time.monotonic()
    out, err = child.communicate(timeout=30)
    assert time.monotonic() - start < 5
    assert (child.returncode, out) == (130, "")
    assert err.splitlines()[-1] == "mopeq-edge: interrupted; run the same command again to go on"
    assert not [line for line in err.splitlines()[:-1] if not line.startswith("note: ")]
    assert sorted(path.name for path in work.iterdir() if path.name != ".lock") == before


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (("--address", "auto"), "--address auto: belongs to --engine ray; add it, or leave the address out"),
        (("--engine", "ray", "--address", "ray://x:1"), "expected HOST:PORT or auto, found a URL"),
        (("--engine", "ray", "--address", "nothing"), "--address nothing: no Ray cluster that can be used"),
    ],
)
def test_addresses_that_are_none(planned: Path, tiny_model: Path, arguments: tuple[str, ...], problem: str) -> None:
    made = command("sensitivity", tiny_model, "--work-dir", planned, *arguments)
    assert (made.returncode, made.stdout) == (1, "")
    assert len(made.stderr.splitlines()) == 1
    assert problem in made.stderr
