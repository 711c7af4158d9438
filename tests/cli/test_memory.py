"""``mopeq-edge memory``: the same numbers for a file, its plan and its directory; verdict and advice."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from mopeq_edge.cli import cli
from mopeq_edge.expert_groups.layout import ExpertGroup, Types, file_layout
from mopeq_edge.ggml.types import BY_NAME
from mopeq_edge.plan.artifact import KNAPSACK, MIXED, PER_EXPERT, Plan, PlannedGroup, PlannedTensor, id_runs, write_plan
from mopeq_edge.source.huggingface import HuggingFaceSource

EVEN, ODD = tuple(range(0, 16, 2)), tuple(range(1, 16, 2))


def invoke(*args: object) -> Result:
    return CliRunner().invoke(cli, ["memory", *(str(arg) for arg in args)])


def found_of(*args: object) -> dict[str, Any]:
    done = invoke(*args, "--json")
    assert done.exit_code == 0, done.output
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.fixture(scope="module")
def types(tiny_source: HuggingFaceSource) -> Types:
    kinds: dict[str, Any] = {t.name: BY_NAME["Q4_K"] if t.quantizable else t.type for t in tiny_source.tensors}
    kinds["blk.1.ffn_up_exps.weight"] = (ExpertGroup(BY_NAME["Q3_K"], EVEN), ExpertGroup(BY_NAME["Q6_K"], ODD))
    return kinds


@pytest.fixture(scope="module")
def gguf(tiny_source: HuggingFaceSource, types: Types, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All of a file but its weights, which are zeros."""
    path = tmp_path_factory.mktemp("m") / "m.gguf"
    place = file_layout(tiny_source.kvs, tiny_source.tensors, types)
    with path.open("wb") as file:
        file.write(place.header)
        file.truncate(place.file_size)
    return path


@pytest.fixture(scope="module")
def plan(tiny_source: HuggingFaceSource, types: Types, gguf: Path) -> Path:
    tensors = []
    for t in tiny_source.tensors:
        kind = types[t.name]
        if isinstance(kind, tuple):
            groups = tuple(PlannedGroup(g.type.name, id_runs(g.experts), 0) for g in kind)
            tensors.append(PlannedTensor(t.name, t.role.value, t.shape, MIXED, 0, 0.0, groups))
        else:
            tensors.append(PlannedTensor(t.name, t.role.value, t.shape, kind.name, 0, 0.0))
    path = gguf.with_name("plan.json")
    size = gguf.stat().st_size
    fields = ("fisher", "nats", None, size, 0, 0, 0, 0.0, 0.0, "gradient", (), "0" * 64)
    n_weights = sum(t.n_weights for t in tiny_source.tensors)
    write_plan(Plan(PER_EXPERT, KNAPSACK, *fields, tuple(tensors), n_weights), path)
    return path


def test_a_plan_takes_what_its_file_takes(gguf: Path, plan: Path, tiny_model: Path) -> None:
    options = ("--ctx", 4096, "--parallel", 2, "--cache-type", "q8_0", "--threads", 1)
    file = found_of(gguf, *options)
    planned = found_of(plan, "--model", tiny_model, "--pre", "gpt-2", *options)
    assert planned["file_bytes"] == file["file_bytes"] == gguf.stat().st_size
    assert planned["prediction"] == file["prediction"]
    # two slots of 2048 cells, four layers, K and V of 256 values in blocks of 34 bytes
    cache = next(part for part in file["prediction"]["parts"] if part["name"] == "KV cache")
    assert cache["nbytes"] == 4096 * 4 * 2 * 8 * 34


def test_a_directory_is_what_its_file_would_be(tiny_model: Path, bf16_gguf: Path) -> None:
    options = ("--ctx", 2048, "--threads", 1)
    directory, file = found_of(tiny_model, "--pre", "gpt-2", *options), found_of(bf16_gguf, *options)
    assert directory["prediction"] == file["prediction"]
    assert directory["file_bytes"] == bf16_gguf.stat().st_size


def test_it_says_no_and_what_to_do(gguf: Path) -> None:
    options = (gguf, "--ctx", 32768, "--threads", 1)
    needed = found_of(*options)["prediction"]["needed_bytes"]
    fits = found_of(*options, "--memory", needed * 105 // 100)
    assert fits["verdict"]["ok"]
    assert fits["advice"] == []
    no = found_of(*options, "--memory", needed * 4 // 5)
    assert not no["verdict"]["ok"]
    assert no["verdict"]["missing"] == needed - needed * 4 // 5
    assert no["advice"]
    text = invoke(*options, "--memory", needed // 3).stdout
    assert "does not fit" in text
    assert "GiB" in text or "MiB" in text
    assert "llama-server -m" in text


def test_a_gpu_of_its_own_or_a_shared_memory(gguf: Path) -> None:
    options = (gguf, "--ctx", 512, "--ngl", 99, "--memory", "200MB")
    assert found_of(*options, "--no-unified")["verdict"]["word"] == "unknown"
    shared = found_of(*options, "--unified")
    # CUDA itself is larger than that
    assert shared["verdict"]["word"] == "does not fit"
    assert found_of(*options[:-1], "1GB", "--unified")["verdict"]["ok"]


def test_the_table_names_the_units(gguf: Path) -> None:
    text = invoke(gguf, "--ctx", 512).stdout
    assert "4 x 512 tokens (shared)" in text
    assert "KV cache" in text
    assert "MB (" in text
    assert "MiB)" in text
    assert max(len(line) for line in text.splitlines() if not line.startswith("llama-server")) <= 80


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("PLAN",), "give its source with --model"),
        (("GGUF", "--model", "GGUF"), "--model is for a plan.json"),
        (("GGUF", "--memory", "8G"), "expected a size"),
        (("GGUF", "--cache-type", "q8_0", "--no-flash-attn"), "needs flash attention"),
        (("none.gguf",), "none.gguf"),
    ],
)
def test_bad_input(gguf: Path, plan: Path, args: tuple[str, ...], message: str) -> None:
    places = {"GGUF": str(gguf), "PLAN": str(plan)}
    done = invoke(*(places.get(arg, arg) for arg in args))
    assert done.exit_code == 1
    assert message in str(done.exception)
    assert "\n" not in str(done.exception)


def test_a_vision_model_beside_it(gguf: Path, bf16_gguf: Path) -> None:
    without, beside = found_of(gguf, "--ctx", 512), found_of(gguf, "--ctx", 512, "--mmproj", bf16_gguf)
    part = next(p for p in beside["prediction"]["parts"] if p["name"] == "vision model")
    assert beside["prediction"]["host_bytes"] - without["prediction"]["host_bytes"] == part["nbytes"] > 30_000_000


def test_no_torch_on_the_device(gguf: Path) -> None:
    """In a process of its own: a device has no torch, and a header needs none."""
    code = "import sys; from mopeq_edge.cli import cli; "
    code += f"cli(['memory', {str(gguf)!r}, '--ctx', '512'], standalone_mode=False); "
    code += "assert not {'torch', 'transformers', 'converters'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, cwd=Path(__file__).parents[2])
