"""Every planted fault is found and named, in the line that comes first."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from mopeq_edge.cli import cli
from mopeq_edge.errors import FormatError
from mopeq_edge.ggml.types import BY_NAME
from mopeq_edge.gguf_file import read_header

from ..builders import write_raw_gguf
from .files import Made, change, exchange, make, place, set_key, swap

pytestmark = pytest.mark.runtime

UP = "blk.1.ffn_up_exps"


def run(*args: object) -> Result:
    return CliRunner().invoke(cli, ["validate", *[str(arg) for arg in args], "--threads", "1"])


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return make(tmp_path_factory.mktemp("sound"))


@pytest.fixture
def made(sound: Made, tmp_path: Path) -> Made:
    """A copy to damage."""
    file = Path(shutil.copy(sound.file, tmp_path / "out.gguf"))
    shutil.copytree(sound.plan.parent, tmp_path / "out.mopeq")
    return Made(file, tmp_path / "out.mopeq" / "plan.json", sound.source)


def lines(done: Result) -> list[str]:
    """What failed, one line each."""
    assert done.exit_code == 1, done.output
    assert ": not valid: " in done.stdout
    assert "FAILED" in done.stdout
    said = done.stderr.splitlines()
    assert said
    assert all(line.startswith("mopeq-edge: ") for line in said)
    return said


def test_nothing_is_wrong_with_it(made: Made) -> None:
    done = run(made.file, "--against", made.source, "--json")
    assert (done.exit_code, done.stderr) == (0, "")
    found = json.loads(done.stdout)
    passed = {check["name"] for check in found["checks"] if check["passed"]}
    assert passed == {
        *("structure", "plan", "scales", "zeros", "key-values", "tensors", "weights"),
        *("runs", "token by token", "logits", "routing"),
    }
    assert found["passed"]
    assert {name: check["passed"] for check in found["checks"] for name in [check["name"]]}["evaluation"] is None


@pytest.mark.parametrize("number", [np.nan, np.inf])
def test_a_scale_that_is_no_number(made: Made, number: float) -> None:
    """Expert 5 is row 3 of the group in Q8_0."""

    def edit(values: Any) -> None:
        values[3, 4, 34:36] = np.array([number], "<f2").view("u1")

    change(made.file, f"{UP}.1.weight", edit)
    said = lines(run(made.file))
    assert len(said) == 1
    for part in (f"scales: expert 5 of {UP}.weight", f"row 3 of {UP}.1.weight", "row 4, block 1 of it"):
        assert part in said[0]
    assert ("'d' is NaN" if np.isnan(number) else "'d' is infinite") in said[0]


def test_a_number_that_is_none(made: Made) -> None:
    change(made.file, "blk.0.attn_norm.weight", lambda values: values.__setitem__(7, np.nan), "<f4")
    said = lines(run(made.file))
    assert said == ["mopeq-edge: scales: blk.0.attn_norm.weight: F32 number 7 of row 0: is NaN"]


def test_two_experts_swapped_in_a_group(made: Made) -> None:
    """Rows 3 and 4 of the second group are experts 5 and 7."""
    swap(made.file, f"{UP}.1.weight", 3, 4)
    said = lines(run(made.file, "--against", made.source, "--no-run"))
    assert len(said) == 2
    assert said[0].startswith(f"mopeq-edge: weights: expert 5 of {UP}.weight")
    assert said[0].endswith("holds the source's expert 7")
    assert f"expert 7 of {UP}.weight" in said[1]
    assert said[1].endswith("holds the source's expert 5")


def test_a_map_off_by_one_that_is_none(made: Made) -> None:
    """A row twice, another never: the structure is broken."""
    change(made.file, f"{UP}.map", lambda rows: rows.__setitem__((5, 1), rows[5, 1] + 1), "<i4")
    done = run(made.file)
    assert isinstance(done.exception, FormatError)
    assert f"'{UP}.map'" in str(done.exception)
    assert "row 4 of group 1 once, found it for experts [5, 7]" in str(done.exception)


def test_a_map_off_by_one(made: Made) -> None:
    """Every expert of the second group has the row after its own."""
    experts = [0, 2, 4, 5, 7]
    change(made.file, f"{UP}.map", lambda rows: rows.__setitem__((experts, 1), [1, 2, 3, 4, 0]), "<i4")
    said = lines(run(made.file, "--no-run"))
    assert said == [
        f"mopeq-edge: plan: {UP}.weight: its map says expert 7 is row 0 of group 1, planned was expert 0",
    ]
    said = lines(run(made.file, "--against", made.source, "--no-run"))
    assert len(said) == 6
    for expert, holds in zip(experts, [2, 4, 5, 7, 0], strict=True):
        assert any(f"expert {expert} of {UP}.weight" in line and f"'s expert {holds}" in line for line in said)


def test_rows_of_a_router_permuted_and_the_experts_not(made: Made) -> None:
    name = "blk.1.ffn_gate_inp.weight"
    change(made.file, name, lambda rows: rows.__setitem__([2, 6], rows[[6, 2]]), "<f4")
    said = lines(run(made.file, "--against", made.source, "--no-run"))
    assert len(said) == 1
    for part in (name, "row 2 holds the source's row 6, row 6 holds the source's row 2", "the experts did not move"):
        assert part in said[0]


def test_gate_and_up_exchanged(made: Made) -> None:
    exchange(made.file, "blk.0.ffn_gate_exps.weight", "blk.0.ffn_up_exps.weight")
    said = lines(run(made.file, "--against", made.source, "--no-run"))
    assert len(said) == 2
    for a, b in (("gate", "up"), ("up", "gate")):
        expected = f"blk.0.ffn_{a}_exps.weight holds the source's blk.0.ffn_{b}_exps.weight, in all of its 8 matrices"
        assert any(expected in line for line in said)


def test_gate_and_up_of_one_expert_exchanged(made: Made) -> None:
    for g in (0, 1):
        exchange(made.file, f"blk.1.ffn_gate_exps.{g}.weight", f"{UP}.{g}.weight")
    said = lines(run(made.file, "--against", made.source, "--no-run"))
    assert f"{UP}.weight holds the source's blk.1.ffn_gate_exps.weight" in "".join(said)


def test_the_same_tensors_of_two_blocks_exchanged(made: Made) -> None:
    exchange(made.file, "blk.0.attn_q.weight", "blk.1.attn_q.weight")
    said = lines(run(made.file, "--against", made.source, "--no-run"))
    assert "mopeq-edge: weights: blk.0.attn_q.weight holds the source's blk.1.attn_q.weight" in said


def test_a_type_that_was_not_planned(made: Made) -> None:
    """The file is written again with one tensor in another type; everything else stays, the plan's hash too."""
    header, raw = read_header(made.file), made.file.read_bytes()
    tensors = []
    for info in header.tensors:
        kind = BY_NAME["F16"] if info.name == "blk.0.attn_k.weight" else info.type
        start = header.data_start + info.offset
        data = raw[start : start + info.nbytes] if kind is info.type else bytes(range(1, 101)) * 100
        tensors.append((info.name, info.shape, kind, data[: kind.nbytes(info.n_weights)]))
    write_raw_gguf(made.file, header.kvs, tensors)
    said = lines(run(made.file, "--no-run"))
    assert "plan: blk.0.attn_k.weight: has type F16 (8192 bytes), planned was Q8_0 (4352 bytes)" in said[0]
    assert any("planned were" in line and "bytes" in line for line in said[1:])


def test_another_plan(made: Made, sound: Made, tmp_path: Path) -> None:
    text = made.plan.read_text().replace('"damage": 0.01', '"damage": 0.02')
    (tmp_path / "other.json").write_text(text)
    said = lines(run(made.file, "--plan", tmp_path / "other.json", "--no-run"))
    assert len(said) == 1
    assert "the file is of another plan" in said[0]
    made.plan.write_text(text)
    done = run(made.file, "--no-run", "--json")
    assert done.exit_code == 0
    check = next(check for check in json.loads(done.stdout)["checks"] if check["name"] == "plan")
    assert check["passed"] is None
    assert "is not the plan of this file" in check["message"]


def test_another_base_of_rope(made: Made) -> None:
    set_key(made.file, "olmoe.rope.freq_base", 500000.0)
    said = lines(run(made.file, "--against", made.source, "--no-run"))
    assert said == ["mopeq-edge: key-values: olmoe.rope.freq_base: is 500000.0, the source has 10000.0"]


def test_a_zeroed_tail(made: Made) -> None:
    """From within an expert on, over maps: as long as it should be, and its header sound."""
    name = "blk.1.ffn_down_exps.1.weight"
    info, start = place(made.file, name)
    raw = made.file.read_bytes()
    at = start + info.nbytes // 2
    made.file.write_bytes(raw[:at] + bytes(len(raw) - at))
    done = run(made.file)
    assert isinstance(done.exception, FormatError)
    n_lost = sum(t.offset >= info.offset for t in read_header(made.file).tensors)
    lost = len(made.file.read_bytes()) - len(made.file.read_bytes().rstrip(bytes(1)))
    assert f"its last {lost} bytes are zeros, from within tensor '{name}' on ({n_lost} tensors)" in str(done.exception)


@pytest.mark.parametrize("against", [False, True])
def test_a_zeroed_end_of_a_group(made: Made, against: bool) -> None:
    """The group holds experts 0, 2, 4, 5 and 7: the last two are gone, and the end of 4."""
    name = "blk.1.ffn_down_exps.1.weight"
    change(made.file, name, lambda values: (values[3:].fill(0), values[2, 40:].fill(0)))
    source: tuple[object, ...] = ("--against", made.source) if against else ()
    said = lines(run(made.file, *source, "--no-run"))
    expected = "zeros: blk.1.ffn_down_exps.weight: zeros: all of expert 5, 7, the last 24 rows of 64 of expert 4;"
    assert expected in said[0]
    assert len([line for line in said if ": weights: " in line]) == (3 if against else 0)


def test_a_zeroed_tail_of_a_stock_file(tmp_path: Path) -> None:
    made = make(tmp_path)
    info, start = place(made.file, "blk.0.ffn_up_exps.weight")
    raw = np.fromfile(made.file, np.uint8)
    # from the middle of expert 6 on
    raw[start + info.nbytes * 13 // 16 : start + info.nbytes] = 0
    raw.tofile(made.file)
    said = lines(run(made.file))
    assert said[0].startswith(
        "mopeq-edge: zeros: blk.0.ffn_up_exps.weight: zeros: all of expert 7, the last 16 rows of 32 of expert 6;"
    )


DAMAGES: dict[str, Callable[[Made], None]] = {
    "scale": lambda made: change(
        made.file, f"{UP}.1.weight", lambda v: v.__setitem__((0, 0, slice(0, 2)), [0xFF, 0x7F])
    ),
    "swap": lambda made: swap(made.file, f"{UP}.0.weight", 0, 1),
}


def test_the_most_specific_comes_first(made: Made) -> None:
    set_key(made.file, "olmoe.rope.freq_base", 500000.0)
    for damage in DAMAGES.values():
        damage(made)
    said = lines(run(made.file, "--against", made.source))
    kinds = [line.split(": ")[1] for line in said]
    assert kinds == ["scales", "weights", "weights", "weights", "key-values"]
