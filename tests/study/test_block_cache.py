"""What is kept is what libggml makes, and nothing is taken for something else."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mopeq_edge.ggml.library import Ggml, load_ggml
from mopeq_edge.ggml.types import BY_NAME, GgmlType
from mopeq_edge.study.block_cache import BlockCache

pytestmark = pytest.mark.runtime
Q2, Q4 = BY_NAME["Q2_K"], BY_NAME["Q4_K"]
ROWS = np.random.default_rng(0).normal(size=(3, 512)).astype(np.float32)
WEIGHTS = np.random.default_rng(1).uniform(0.1, 2, 512).astype(np.float32)


class Counting:
    """libggml that counts how often it is asked."""

    def __init__(self) -> None:
        self.ggml: Ggml = load_ggml()
        self.asked = 0

    def quantize(self, to: GgmlType, rows: np.ndarray, imatrix: np.ndarray | None = None) -> np.ndarray:
        self.asked += 1
        return self.ggml.quantize(to, rows, imatrix)


def test_the_same_bits_made_once(tmp_path: Path) -> None:
    counting = Counting()
    questions = [
        (Q2, ROWS, WEIGHTS),
        (Q4, ROWS, WEIGHTS),
        (Q2, ROWS, None),
        (Q2, ROWS[:2], WEIGHTS),
        (Q2, -ROWS, WEIGHTS),
    ]
    for _ in range(2):
        # the second time another process would read the same folder
        cache = BlockCache(counting, tmp_path / "blocks", ["libggml 1"])
        for question in questions:
            np.testing.assert_array_equal(cache.quantize(*question), load_ggml().quantize(*question))
    assert counting.asked == len(questions)


def test_another_library_is_asked_again(tmp_path: Path) -> None:
    counting = Counting()
    for library in ("libggml 1", "libggml 2"):
        BlockCache(counting, tmp_path, [library]).quantize(Q2, ROWS)
    assert counting.asked == 2


def test_the_limit_holds_and_a_damaged_file_is_made_anew(tmp_path: Path) -> None:
    counting = Counting()
    one = Q2.nbytes(ROWS.size)
    cache = BlockCache(counting, tmp_path, [], limit=one)
    expected = cache.quantize(Q2, ROWS)
    cache.quantize(Q4, ROWS)
    (kept,) = tmp_path.glob("*.blocks")
    assert kept.stat().st_size == one
    kept.write_bytes(kept.read_bytes()[:-1])
    np.testing.assert_array_equal(BlockCache(counting, tmp_path, [], limit=10 * one).quantize(Q2, ROWS), expected)
    assert counting.asked == 3
    assert kept.stat().st_size == one
