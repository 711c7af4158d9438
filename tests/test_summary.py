"""What validate and inspect say of a file: stock, per-expert, no model, broken."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from mopeq_edge.cli import cli
from mopeq_edge.errors import FormatError, SourceError
from mopeq_edge.expert_groups.layout import ExpertGroup, expert_map, file_layout
from mopeq_edge.ggml.types import BF16, BY_NAME, F32
from mopeq_edge.gguf_layout import string, uint32
from mopeq_edge.source.gguf import GGUFSource
from mopeq_edge.source.model import SourceTensor
from mopeq_edge.summary import experts_by_type, summarise, summarise_finished

from .builders import write_raw_gguf

Q4_0, Q8_0 = BY_NAME["Q4_0"], BY_NAME["Q8_0"]
KVS = {
    "general.architecture": string("olmoe"),
    "olmoe.block_count": uint32(1),
    "olmoe.expert_count": uint32(4),
    "olmoe.expert_used_count": uint32(2),
}
GROUPS = (ExpertGroup(Q4_0, (1, 3)), ExpertGroup(Q8_0, (0, 2)))
STACKS = [SourceTensor(f"blk.0.ffn_{name}_exps.weight", (32, 32, 4), BF16) for name in ("up", "down", "gate")]
ROUTER = SourceTensor("blk.0.ffn_gate_inp.weight", (32, 4), F32)


def invoke(*args: object) -> Result:
    return CliRunner().invoke(cli, [str(arg) for arg in args])


@pytest.fixture
def grouped(tmp_path: Path) -> Path:
    """All stacks but ``up`` in groups."""
    kinds = {STACKS[0].name: Q8_0, STACKS[1].name: GROUPS, STACKS[2].name: GROUPS, ROUTER.name: F32}
    place = file_layout(KVS, [*STACKS, ROUTER], kinds)
    path = tmp_path / "grouped.gguf"
    with path.open("wb") as file:
        file.write(place.header)
        for info in place.tensors:
            # any weights but zeros, which would be a file that was cut short and filled up
            weights = bytes([1]) * info.nbytes
            file.write(expert_map(GROUPS, 4).tobytes() if info.name.endswith(".map") else weights)
            file.write(bytes(-file.tell() % 32))
    return path


def test_numbers_by_hand(grouped: Path) -> None:
    found = summarise(grouped)
    assert (found.layout, found.architecture) == ("per-expert", "olmoe")
    assert (found.n_layer, found.n_expert, found.n_expert_used) == (1, 4, 2)
    assert found.n_weights == 3 * 32 * 32 * 4 + 32 * 4
    # 32 blocks a matrix; the maps have 2 x 4 numbers
    sizes = {"Q8_0": 34 * 32 * (4 + 2 + 2), "Q4_0": 18 * 32 * (2 + 2), "F32": 4 * 32 * 4, "I32": 2 * 32}
    assert found.bytes_by_type == sizes
    assert found.bytes_by_role == {"expert": sum(sizes.values()) - sizes["F32"], "router": sizes["F32"]}
    assert found.file_bytes == grouped.stat().st_size == found.header_bytes + found.tensor_bytes
    assert experts_by_type(found.stacks) == {"Q4_0": 4, "Q8_0": 4}


def test_validate_says_what_runs_it(grouped: Path, bf16_gguf: Path, tmp_path: Path) -> None:
    done = invoke("validate", grouped)
    assert done.exit_code == 0
    assert done.stdout.startswith(
        f"{grouped}: valid: expert groups, version 1: 2 stacks of olmoe in groups of different types; runs in the "
        "llama.cpp that `mopeq-edge runtime install` builds; stock llama.cpp refuses it (a tensor such "
        "as 'blk.0.ffn_down_exps.weight' is not found)\n"
    )
    assert invoke("validate", bf16_gguf, "--no-run").stdout.startswith(
        f"{bf16_gguf}: valid: stock GGUF of olmoe, 51 tensors; runs in any llama.cpp that knows it\n"
    )
    write_raw_gguf(tmp_path / "imatrix.gguf", {"general.type": string("imatrix")}, [])
    assert (
        "valid: no model but a file of type 'imatrix', 0 tensors\n"
        in invoke("validate", tmp_path / "imatrix.gguf").stdout
    )


def test_json(grouped: Path) -> None:
    said: list[dict[str, Any]] = [
        json.loads(invoke(name, grouped, "--json").stdout) for name in ("validate", "inspect")
    ]
    checks = {check["name"]: check["passed"] for check in said[0].pop("checks")}
    assert (checks["structure"], checks["scales"], checks["runs"], said[0].pop("passed")) == (True, True, None, True)
    assert said[0].pop("routing") == []
    assert set(said[0].pop("seconds")) == {"structure", "weights", "source", "run", "evaluation"}
    assert said[0] == said[1] == json.loads(json.dumps(summarise(grouped).as_dict()))
    assert said[0]["stacks"]["blk.0.ffn_gate_exps.weight"] == {
        "shape": [32, 32, 4],
        "groups": [{"type": "Q4_0", "experts": [1, 3]}, {"type": "Q8_0", "experts": [0, 2]}],
    }


def test_inspect_of_expert_groups(grouped: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = invoke("inspect", grouped).stdout
    assert shown.startswith("expert groups, version 1: 2 stacks of olmoe")
    for part in ("4, 2 used per token", "blk.0.ffn_gate_exps", "Q4_0 2, Q8_0 2"):
        assert part in shown
    monkeypatch.setattr("mopeq_edge.cli.inspect.STACKS_SHOWN", 1)
    assert "gate, 1 stack" in invoke("inspect", grouped).stdout


def test_it_is_no_source(grouped: Path) -> None:
    with pytest.raises(SourceError, match=r"a file of the per-expert layout.*give the model that it was made of"):
        GGUFSource(grouped)


@pytest.mark.parametrize("at", [3, 40, -1, -300])
def test_what_is_not_valid(grouped: Path, at: int) -> None:
    raw = grouped.read_bytes()
    grouped.write_bytes(raw[:at])
    done = invoke("validate", grouped)
    assert isinstance(done.exception, FormatError)
    assert "\n" not in str(done.exception)
    assert done.stdout == ""


def test_a_map_that_does_not_add_up(grouped: Path) -> None:
    raw = grouped.read_bytes()
    table = expert_map(GROUPS, 4).tobytes()
    grouped.write_bytes(raw.replace(table, bytes(4) + table[4:]))
    for command in ("validate", "inspect"):
        done = invoke(command, grouped)
        assert isinstance(done.exception, FormatError)
        assert "_exps.map': expected expert 0 in exactly one group, found it in 2" in str(done.exception)


def test_what_has_no_groups(bf16_gguf: Path, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("no GGUF")
    for path in (bf16_gguf, tmp_path, tmp_path / "none", tmp_path / "text"):
        assert summarise_finished(path) is None


def test_validate_does_not_load_torch(grouped: Path) -> None:
    code = f"""
import sys
from click.testing import CliRunner
from mopeq_edge.cli import cli
assert CliRunner().invoke(cli, ["validate", {str(grouped)!r}]).exit_code == 0
print([name for name in ("torch", "transformers", "scipy") if name in sys.modules])
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parent.parent
    )
    assert (done.stdout.strip(), done.stderr) == ("[]", "")
