"""How long quantizing is said to take, by quantizers that take a known time."""

from __future__ import annotations

import time

import numpy as np
import pytest

from mopeq_edge.dry_run import ROW, TRIALS, TRIED, seconds_a_weight
from mopeq_edge.ggml.types import BY_NAME, GgmlType

WORK = 0.004


class Interrupted:
    """Works for :data:`WORK` seconds, longer every other time, and waits as long as a busy machine makes it."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, ...]] = []

    def quantize(self, to: GgmlType, rows: np.ndarray, imatrix: np.ndarray | None = None) -> np.ndarray:
        self.calls.append((rows.size, 0 if imatrix is None else imatrix.size))
        end = time.thread_time() + WORK * (1 + len(self.calls) % 2)
        while time.thread_time() < end:
            pass
        time.sleep(0.05)
        return rows.view(np.uint8)


@pytest.mark.parametrize("imatrix", [None, np.ones(ROW, dtype=np.float32)])
def test_what_else_runs_is_not_counted(imatrix: np.ndarray | None) -> None:
    quantizer = Interrupted()
    found = seconds_a_weight(BY_NAME["Q4_K"], quantizer, imatrix) * TRIED
    assert WORK <= found < 2 * WORK
    assert quantizer.calls == [(n, 0 if imatrix is None else ROW) for n in (ROW, *[TRIED] * TRIALS)]
