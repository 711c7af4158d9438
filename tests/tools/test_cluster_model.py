"""The simulation of a cluster against cases that were worked out by hand, and the model's tasks against the model."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from mopeq_edge.engine.ray import PART_WEIGHTS
from tools.cluster_model import FP8_BYTES, NAME, OneExpert, Rates, deepseek_v3, model_rows, stages_of
from tools.cluster_simulation import Machines, Task, predict, simulate, throughput


def seconds(tasks: list[Task], machines: Machines) -> float:
    return simulate(tasks, machines).seconds


def test_lists_by_hand() -> None:
    # one processor has 3, the other 2 and then 2
    assert seconds([Task(3), Task(2), Task(2)], Machines(2, 1)) == 4
    # two rounds of four, and one more
    assert seconds([Task(1)] * 8, Machines(2, 2)) == 2
    assert seconds([Task(1)] * 9, Machines(2, 2)) == 3
    # the largest last, against the largest first
    assert seconds([Task(1), Task(1), Task(4)], Machines(2, 1)) == 5
    assert seconds([Task(4), Task(1), Task(1)], Machines(2, 1)) == 4


def test_shared_storage_by_hand() -> None:
    # four read 10 bytes at once, at 10 bytes a second for all: until 4; then 1 second each
    assert seconds([Task(1, read=10)] * 4, Machines(2, 2, storage=10)) == pytest.approx(5)
    # alone: one second for the input, three of work, two for the output
    assert seconds([Task(3, 10, 20)], Machines(1, 1, storage=10)) == pytest.approx(6)
    # A reads 10 and B 30 at half the rate until 4 (10 x 2 / 5); B has 20 left and 5 a second: until 8
    assert seconds([Task(0, read=10), Task(0, read=30)], Machines(2, 1, storage=5)) == pytest.approx(8)
    # the network of a machine with two processors gives each at most 2 bytes a second
    assert seconds([Task(1, read=10)], Machines(1, 2, storage=100, network=4)) == pytest.approx(6)


def test_a_slow_driver_by_hand() -> None:
    # tasks leave at 1, 2, 3 and 4, and take half a second
    assert seconds([Task(0.5)] * 4, Machines(4, 1, overhead=1)) == pytest.approx(4.5)


@pytest.mark.parametrize(
    ("n", "tasks", "expected", "again"),
    [
        # alone: lost at 2, back at 7, done at 10
        (1, [Task(3)], 10.0, 1),
        # two: machine 0 is lost at 2; its task is known to be lost at 3, and waits for machine 1 until 4
        (2, [Task(3), Task(4)], 7.0, 1),
        # the third task waits behind the lost one, on machine 0 when it is back at 7
        (2, [Task(3), Task(4), Task(1)], 8.0, 1),
    ],
)
def test_failures_by_hand(
    monkeypatch: pytest.MonkeyPatch, n: int, tasks: list[Task], expected: float, again: int
) -> None:
    times = iter([2.0, *[1e9] * 9])
    monkeypatch.setattr(random.Random, "expovariate", lambda self, rate: next(times))
    run = simulate(tasks, Machines(n, 1, mtbf=100, detection=1, repair=5))
    assert (run.seconds, run.failures, run.again) == (expected, 1, again)


@pytest.mark.parametrize(
    "machines",
    [
        Machines(4, 8),
        # processors often wait for each other's transfers; only that makes the order of tasks matter
        Machines(4, 8, storage=200, network=80),
        Machines(16, 8, storage=50, network=400),
        Machines(16, 8, storage=1e5, network=1e4, mtbf=3600, detection=15, repair=600),
    ],
)
def test_the_formula_is_near_the_simulation(machines: Machines) -> None:
    """Many tasks of different sizes on storage that is the limit or is not; with failures."""
    rng = random.Random(3)
    tasks = [Task(rng.uniform(10, 60), read=100, written=20) for _ in range(3000)]
    runs = [simulate(tasks, machines, seed).seconds for seed in range(8 if machines.mtbf else 1)]
    assert predict(tasks, machines) == pytest.approx(sum(runs) / len(runs), rel=0.1 if machines.mtbf else 0.06)


def test_throughput_by_hand() -> None:
    """Two processors think for 2 s and are served for 1 s, one at a time: states weigh 1, 1 and 1/2."""
    assert throughput(2, 2.0, 0.0, 1.0) == pytest.approx((1 + 0.5) / 2.5)
    # no shared limit: each comes back after 3 seconds
    assert throughput(5, 2.0, 1.0, 0.0) == pytest.approx(5 / 3)
    # nothing to move, or nothing to compute
    assert throughput(4, 2.0, 0.0, 0.0) == 2
    assert throughput(4, 0.0, 2.0, 1.0) == 1


def test_the_tasks_are_those_of_the_model() -> None:
    """671 B weights, each of them once in every stage."""
    n_weights = sum(tensor.n_weights for tensor in deepseek_v3())
    assert n_weights == pytest.approx(671e9, rel=0.002)
    stages = stages_of(Rates(1.0, 1.0, 1.0, 8, 1.0, 1.0, 1.0, 1.0, 1.0), None)
    for stage in ("norms", "measure", "emit"):
        assert sum(task.seconds for task in stages[stage]) == pytest.approx(n_weights)
        assert sum(task.read for task in stages[stage]) == pytest.approx(n_weights * FP8_BYTES)
    assert max(task.seconds for task in stages["emit"]) <= PART_WEIGHTS
    rows = model_rows(stages, lambda n: Machines(n, 2**20), 2.0, (1,))
    assert rows[0].cost == pytest.approx(2 * rows[0].simulated_hours)


def test_what_is_measured_is_fp8(tmp_path: Path) -> None:
    """Codes times scales, by torch's own float8."""
    import torch
    from safetensors.torch import load_file

    source: Any = OneExpert(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    scales = stored["w_scale_inv"].repeat_interleave(128, 0).repeat_interleave(128, 1)
    expected = (stored["w"].to(torch.float32) * scales)[100:130].numpy()
    assert source.tensors[0].name == NAME
    assert (source.read(source.tensors[0], 0, slice(100, 130)) == expected).all()
