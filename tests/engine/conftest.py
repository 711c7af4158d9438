"""A Ray cluster of several nodes on this machine, one processor each."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

SETTINGS = {"health_check_initial_delay_ms": 1000, "health_check_period_ms": 1000, "health_check_failure_threshold": 10}
"""A node that is gone is noticed within ten seconds; on a busy machine one that is there must not be taken for gone."""


@pytest.fixture(scope="session")
def cluster() -> Iterator[Any]:
    """A head without processors, where the driver is, and two nodes."""
    with pytest.MonkeyPatch.context() as environment:
        # else 15: on a busy machine the tests would wait for everybody else
        environment.setenv("RAY_worker_niceness", "0")
        yield from _cluster()


def _cluster() -> Iterator[Any]:
    from ray.cluster_utils import Cluster

    small = {"object_store_memory": 80_000_000, "include_dashboard": False}
    made = Cluster(True, head_node_args={"num_cpus": 0, "_system_config": SETTINGS, **small})
    for _ in range(2):
        made.add_node(num_cpus=1, object_store_memory=80_000_000)
    made.wait_for_nodes()
    yield made
    made.shutdown()
