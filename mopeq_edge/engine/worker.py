"""What runs on a machine of the cluster: one task, after it is sure that the machine has what ours has."""

from __future__ import annotations

import platform
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any

from mopeq_edge import __version__
from mopeq_edge.artifacts import file_digest
from mopeq_edge.engine.interface import Tools
from mopeq_edge.errors import MopeqError
from mopeq_edge.ggml.library import load_ggml

Versions = tuple[tuple[str, str], ...]


@lru_cache(maxsize=1)
def versions() -> Versions:
    """(what, version) of everything that the bytes of a result depend on.

    Raises :class:`RuntimeMissingError` without llama.cpp.
    """
    import numpy as np

    from mopeq_edge.runtime.locate import library_path

    library = file_digest(library_path("ggml-base"))[:12]
    python = ".".join(platform.python_version_tuple()[:2])
    return (("mopeq-edge", __version__), ("Python", python), ("numpy", np.__version__), ("libggml", library))


def run_task(expected: Versions, source: Any, work_and_task: bytes) -> tuple[str, Any, float]:
    """("done", result, units), or for an expected failure (class, message, 0).

    ``source`` is the Ray reference of a pickled source in a list; ``work_and_task`` is read when versions agree.
    """
    from ray import cloudpickle

    units = 0.0

    def advance(amount: float) -> None:
        nonlocal units
        units += amount

    try:
        for (what, own), (_, other) in zip(versions(), expected, strict=False):
            if own != other:
                return "ClusterError", f"has {what} {own}, expected {other} as here; install the same everywhere", 0.0
        work, task = cloudpickle.loads(work_and_task)
        with ThreadPoolExecutor(1) as pool:
            result = work(_source(source[0]), task, Tools(load_ggml(), pool, 1, advance))
    except MopeqError as error:
        return type(error).__name__, str(error), 0.0
    return "done", result, units


@lru_cache(maxsize=2)
def _source(reference: Any) -> Any:
    """Once for each process: names and places of a large checkpoint take a second to read."""
    import ray
    from ray import cloudpickle

    return cloudpickle.loads(ray.get(reference))
