"""Broken expert groups in the patched llama.cpp: an error that names the tensor, never a crash. And stock llama.cpp."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from mopeq_edge.binding import LlamaModel
from mopeq_edge.errors import MopeqError
from mopeq_edge.runtime.locate import STOCK, require_runtime, tool

from .architectures import ARCHITECTURES
from .regroup import Tensors, by_turns, regroup
from .test_in_llama_cpp import write_stock

pytestmark = pytest.mark.runtime

UP, MAP = "blk.0.ffn_up_exps", "blk.0.ffn_up_exps.map"


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_stock(tmp_path_factory.mktemp("stock"), ARCHITECTURES["mixtral"], ["Q3_K"])[0]


def edit_map(edit: Callable[[Any], None]) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        rows = tensors[MAP][0].copy()
        edit(rows)
        tensors[MAP] = rows, tensors[MAP][1]

    return change


def set_row(expert: int, group: int, row: int) -> Callable[[Tensors], None]:
    return edit_map(lambda rows: rows.__setitem__((expert, group), row))


def use_row_twice(rows: Any) -> None:
    group = int(np.argmax(rows[0]))
    other = next(e for e in range(1, len(rows)) if rows[e, group] >= 0)
    rows[other, group] = rows[0, group]


def both_kinds(tensors: Tensors) -> None:
    data, kind = tensors[f"{UP}.0.weight"]
    tensors[f"{UP}.weight"] = np.repeat(data[:1], 8, axis=0), kind


def drop(name: str) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.pop(name) and None


def cut_group(tensors: Tensors) -> None:
    data, kind = tensors[f"{UP}.0.weight"]
    tensors[f"{UP}.0.weight"] = data[1:], kind


def narrow_group(tensors: Tensors) -> None:
    data, kind = tensors[f"{UP}.1.weight"]
    tensors[f"{UP}.1.weight"] = np.ascontiguousarray(data[:, :-1]), kind


def float_map(tensors: Tensors) -> None:
    tensors[MAP] = tensors[MAP][0].astype(np.float32), gguf.GGMLQuantizationType.F32


def short_map(tensors: Tensors) -> None:
    tensors[MAP] = np.ascontiguousarray(tensors[MAP][0][:-1]), tensors[MAP][1]


def wide_map(tensors: Tensors) -> None:
    rows = tensors[MAP][0]
    tensors[MAP] = np.concatenate([rows, np.full((8, 6), -1, np.int32)], axis=1), tensors[MAP][1]


def rename_group(tensors: Tensors) -> None:
    tensors[f"{UP}.3.weight"] = tensors.pop(f"{UP}.2.weight")


BROKEN: dict[str, tuple[Callable[[Tensors], None], str]] = {
    "a row that is not there": (set_row(0, 1, 99), f"'{MAP}': expert 0 points to row 99 of group 1"),
    "a row below -1": (set_row(0, 1, -2), f"'{MAP}': expert 0 points to row -2 of group 1"),
    "an expert in no group": (edit_map(lambda rows: rows[3].fill(-1)), f"'{MAP}': expert 3 is in 0 groups, expected 1"),
    "a row of two experts": (edit_map(use_row_twice), f"'{MAP}': row 0 of group"),
    "whole and split": (both_kinds, f"'{UP}.weight' is there both whole and split"),
    "no map": (drop(MAP), f"'{UP}.weight' is split into expert groups, but '{MAP}' is missing"),
    "a missing group": (drop(f"{UP}.2.weight"), f"'{UP}.2.weight' is missing, but '{MAP}' has 3 groups"),
    "a gap": (rename_group, f"'{UP}.2.weight' is missing, but '{MAP}' has 3 groups"),
    "too few rows": (cut_group, f"'{UP}.weight': its expert groups have 7 experts, expected 8"),
    "a group of another shape": (narrow_group, f"'{UP}.1.weight' has wrong shape"),
    "a map of floats": (float_map, f"'{MAP}': expected I32 [1 to 7, 8], got f32"),
    "a map without an expert": (short_map, f"'{MAP}': expected I32 [1 to 7, 8], got i32"),
    "too many groups": (wide_map, f"'{MAP}': expected I32 [1 to 7, 8], got i32"),
}


def reason(path: Path) -> str:
    with pytest.raises(MopeqError) as caught, LlamaModel(path, n_ctx=64):
        pass
    return " ".join(str(caught.value).split())


@pytest.mark.parametrize("name", BROKEN)
def test_groups_that_do_not_make_up_the_stack(stock: Path, tmp_path: Path, name: str) -> None:
    change, expected = BROKEN[name]
    assert expected in reason(regroup([stock], tmp_path / "broken.gguf", by_turns(3), change=change))


@pytest.mark.parametrize(
    ("version", "expected"),
    [(None, "the file has no uint32 'mopeq.expert_groups.version'"), (2, "groups of version 2, expected version 1")],
)
def test_versions(stock: Path, tmp_path: Path, version: int | None, expected: str) -> None:
    assert expected in reason(regroup([stock], tmp_path / "broken.gguf", by_turns(3), version=version))


def test_stock_llama_cpp_misses_the_stack(stock: Path, tmp_path: Path) -> None:
    grouped = regroup([stock], tmp_path / "groups.gguf", by_turns(3))
    # which writes its lines at once; others leave the last ones unwritten now and then
    command = [tool("llama-bench", require_runtime(STOCK)), "-m", grouped, "-p", "1", "-n", "0", "-r", "1", "-v"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "tensor 'blk.0.ffn_down_exps.weight' not found" in done.stderr
