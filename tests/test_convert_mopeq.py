"""The paper's planner from a checkpoint to a file: the map from the weights alone, and the bytes."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from safetensors import safe_open

from mopeq_edge.cli import cli
from mopeq_edge.errors import PlanError

from .builders import build_olmoe

pytestmark = pytest.mark.runtime

N_LAYER, N_EXPERT = 2, 8
WIDTH = {2: "Q2_K", 3: "Q3_K", 4: "Q4_K"}


def invoke(*args: object) -> Result:
    return CliRunner().invoke(cli, [str(arg) for arg in args])


def printed(done: Result) -> dict[str, Any]:
    assert done.exception is None, done.exception
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Experts of different norms, so that their scores differ."""
    from safetensors.numpy import load_file, save_file

    place = build_olmoe(
        tmp_path_factory.mktemp("mopeq") / "model",
        **{"hidden": 256, "ff": 256, "n_layer": N_LAYER, "n_expert": N_EXPERT, "dtype": "float32"},
    )
    tensors = load_file(place / "model.safetensors")
    rng = np.random.default_rng(0)
    scale = {(n, e): 2.0 ** rng.uniform(-1, 1) for n in range(N_LAYER) for e in range(N_EXPERT)}
    for name, value in tensors.items():
        if ".experts." in name:
            parts = name.split(".")
            tensors[name] = (value * np.float32(scale[int(parts[2]), int(parts[5])])).astype(np.float32)
    save_file(tensors, place / "model.safetensors", metadata={"format": "pt"})
    (place / "calibration.txt").write_text(" ".join(f"{n} brown foxes jump over the lazy dog." for n in range(300)))
    return place


def bits_from_the_weights(model: Path, scope: str) -> dict[tuple[int, int], int]:
    """The paper's S(e), and of all ways to cut its order in three the one of least squared distance."""
    scores = {(n, e): 0.0 for n in range(N_LAYER) for e in range(N_EXPERT)}
    with safe_open(model / "model.safetensors", "numpy") as file:
        for name in file.keys():  # noqa: SIM118
            if ".experts." in name:
                parts, w = name.split("."), file.get_tensor(name).astype(np.float64)
                scores[int(parts[2]), int(parts[5])] += (w.size - 1) / (w.size * np.linalg.norm(w))
    units = [[key for key in scores if key[0] == n] for n in range(N_LAYER)] if scope == "layer" else [list(scores)]
    bits = {}
    for unit in units:
        order = sorted(unit, key=scores.__getitem__)
        ways = []
        for a, b in itertools.combinations(range(1, len(order)), 2):
            parts = (order[:a], order[a:b], order[b:])
            ways.append((sum(np.var([scores[k] for k in p]) * len(p) for p in parts), parts))
        for width, part in zip(WIDTH, min(ways, key=lambda way: float(way[0]))[1], strict=True):
            bits.update(dict.fromkeys(part, width))
    return bits


def types_in(out: Path) -> dict[tuple[int, int], set[str]]:
    """The types of each expert's matrices, from the file."""
    found: dict[tuple[int, int], set[str]] = {}
    for name, stack in printed(invoke("validate", out, "--json"))["stacks"].items():
        for group in stack["groups"]:
            for expert in group["experts"]:
                found.setdefault((int(name.split(".")[1]), expert), set()).add(group["type"])
    return found


def options(work: Path) -> tuple[object, ...]:
    types = ("--types", "Q2_K,Q3_K,Q4_K,Q6_K", "--sample-rows", 40, "--no-fisher")
    return ("--work-dir", work, "--window", 64, "--chunks", 4, "--no-evaluate", "--json", "--planner", "mopeq", *types)


def test_from_the_checkpoint_to_the_file(model: Path, tmp_path: Path) -> None:
    sizes = {}
    for scope in ("layer", "model"):
        out = tmp_path / f"{scope}.gguf"
        done = printed(invoke("convert", model, out, "--scope", scope, *options(tmp_path / "work")))
        assert done["file_bytes"] == done["predicted_file_bytes"] == out.stat().st_size
        assert (done["planner"], done["layout"], done["sensitivity"]) == ("mopeq", "per-expert", "mopeq")
        assert (done["budget_bytes"], done["optimality_gap"], done["forecast"]) == (None, None, None)
        expected = bits_from_the_weights(model, scope)
        assert types_in(out) == {key: {WIDTH[bits]} for key, bits in expected.items()}
        assert done["precision_map"]["experts"] == [list(expected.values()).count(n) for n in WIDTH]
        sizes[scope] = done["file_bytes"]
    # with a target: the same boundaries, moved until it fits
    out, target = tmp_path / "smaller.gguf", sizes["layer"] - 200_000
    budget = ("--scope", "layer", "--target-gb", f"{target / 1e9:.9f}")
    done = printed(invoke("convert", model, out, *budget, *options(tmp_path / "work")))
    assert target - 100_000 < done["file_bytes"] == out.stat().st_size <= target
    assert done["precision_map"]["unscaled_bytes"] == sizes["layer"]
    assert done["precision_map"]["steps"] < 0
    for key, found in types_in(out).items():
        (name,) = found
        assert name <= WIDTH[bits_from_the_weights(model, "layer")[key]]


def test_plan_says_what_was_asked_and_what_the_map_is(model: Path, tmp_path: Path) -> None:
    work = ("--work-dir", tmp_path / "work")
    assert invoke("calibrate", model, *work, "--window", 64, "--chunks", 4, "--no-fisher").exception is None
    assert invoke("sensitivity", model, *work, "--types", "k", "--sample-rows", 40).exception is None
    plan = ("plan", model, *work, "--types", "k")
    free = printed(invoke(*plan, "--planner", "mopeq", "--json"))["file_bytes"]
    shown = " ".join(invoke(*plan, "--planner", "mopeq", "--target-gb", 1).stdout.split())
    assert f"1,000,000,000 bytes asked for, {free:,} without a target" in shown
    assert "0 at Q2_K, 0 at Q3_K, 16 at Q4_K" in shown
    assert f"{free:,} bytes, no target" in " ".join(invoke(*plan, "--planner", "mopeq").stdout.split())
    for arguments, expected in (
        (("--planner", "mopeq", "--layout", "stock"), "--layout stock: --planner mopeq gives every expert a type"),
        (("--bits", "2=Q2_K", "--target-gb", 1), "--bits 2=Q2_K: belongs to --planner mopeq"),
        (("--scope", "layer", "--target-gb", 1), "--scope layer: belongs to --planner mopeq"),
        ((), "budget: give exactly one of --target-gb"),
        (("--planner", "mopeq", "--target-gb", 1, "--target-bpw", 4), "budget: give exactly one of --target-gb"),
        (("--planner", "mopeq", "--tensor-type-file", tmp_path / "x"), "llama-quantize writes the stock layout only"),
    ):
        done = invoke(*plan, *arguments)
        assert isinstance(done.exception, PlanError), arguments
        assert expected in str(done.exception)
