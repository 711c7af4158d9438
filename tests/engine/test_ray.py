"""Stages on a Ray cluster against the same stages in this process: the same bytes, whatever is lost on the way."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mopeq_edge.calibrate.statistics import Routing
from mopeq_edge.emit import emit
from mopeq_edge.emit_parts import emit_on
from mopeq_edge.engine.interface import Engine, Tools
from mopeq_edge.engine.local import LocalEngine
from mopeq_edge.engine.ray import ATTEMPTS, RayEngine, connected
from mopeq_edge.errors import ClusterError, OutputError, SourceError
from mopeq_edge.expert_groups.layout import ExpertGroup, Types
from mopeq_edge.file_hashes import unknown_hashes
from mopeq_edge.ggml.library import load_ggml
from mopeq_edge.ggml.types import BY_NAME
from mopeq_edge.imatrix import GRADIENT, Entry, Imatrix
from mopeq_edge.plan.candidates import parse_types
from mopeq_edge.progress import SilentProgress
from mopeq_edge.sensitivity.pricing import Statistics
from mopeq_edge.sensitivity.run import measure_sensitivity
from mopeq_edge.sensitivity.table import write_table
from mopeq_edge.source.huggingface import HuggingFaceSource
from mopeq_edge.source.model import Bytes, Floats, Source, SourceTensor
from mopeq_edge.source.roles import Role

pytestmark = [pytest.mark.runtime, pytest.mark.cluster]

PART = 2**18
"""Weights of a task: four experts' matrices of the bundled model."""


class Counting(SilentProgress):
    """Every step comes to its end."""

    def __init__(self) -> None:
        self.steps: dict[str, float] = {}

    @contextmanager
    def step(self, title: str, total: float | None, unit: str = "") -> Iterator[Any]:
        self.steps[title], self._now = 0.0, title
        yield self
        assert total == pytest.approx(self.steps[title])

    def advance(self, amount: float = 1.0) -> None:
        self.steps[self._now] += amount


@pytest.fixture(scope="module")
def statistics(tiny_source: HuggingFaceSource) -> Statistics:
    """Of every kind, at random."""
    rng = np.random.default_rng(5)

    def imatrix(kind: str) -> Imatrix:
        entries = {
            t.name: Entry(
                rng.random((t.n_matrices, t.n_in), dtype=np.float32) + 0.1,
                rng.integers(1, 99, t.n_matrices).astype(np.float32),
            )
            for t in tiny_source.tensors
            if t.quantizable and t.role is not Role.EMBEDDING
        }
        return Imatrix(entries, ("text",), 4, 64, kind)

    counts = {layer: rng.integers(0, 99, 16).astype(np.float64) for layer in range(4)}
    vocabulary = next(t.n_out for t in tiny_source.tensors if t.role is Role.EMBEDDING)
    tokens = rng.integers(0, 9, vocabulary).astype(np.float64)
    routing = Routing(n_tokens=256, counts=counts, gate_weights=counts, token_counts=tokens)
    return Statistics(imatrix("activation"), imatrix(GRADIENT), routing)


def table_bytes(
    source: Source, statistics: Statistics, engine: Engine, path: Path, progress: Counting | None = None
) -> bytes:
    table = measure_sensitivity(
        *(source, parse_types("Q2_K,Q3_K,Q4_K,IQ2_XXS"), statistics, GRADIENT, engine),
        **{"sample_rows": 32, "made_from": "x", "progress": progress or SilentProgress()},
    )
    write_table(table, path)
    return path.read_bytes()


@pytest.fixture(scope="module")
def types(tiny_source: HuggingFaceSource) -> Types:
    """Stacks of one type and in groups, and matrices of several types."""
    kinds = [BY_NAME[name] for name in ("Q4_K", "Q2_K", "IQ2_XXS", "Q6_K")]
    found: dict[str, Any] = {t.name: t.type for t in tiny_source.tensors}
    stacks = [t for t in tiny_source.tensors if t.role is Role.EXPERT]
    for number, tensor in enumerate(stacks):
        found[tensor.name] = kinds[number % 3]
    found[stacks[5].name] = (ExpertGroup(kinds[0], (0, 3, 5, 15)), ExpertGroup(kinds[1], (1, 2, 4, *range(6, 15))))
    for tensor in tiny_source.tensors:
        if tensor.role is Role.ATTENTION:
            found[tensor.name] = kinds[3]
    return found


@pytest.fixture(scope="module")
def local_table(
    tiny_source: HuggingFaceSource, statistics: Statistics, tmp_path_factory: pytest.TempPathFactory
) -> bytes:
    engine = LocalEngine(2, load_ggml())
    return table_bytes(tiny_source, statistics, engine, tmp_path_factory.mktemp("t") / "local")


def kvs_of(source: Source) -> dict[str, Any]:
    """With room for the hashes, as every planned file has it."""
    return {**source.kvs, **unknown_hashes(0)}


@pytest.fixture(scope="module")
def local_file(
    tiny_source: HuggingFaceSource, statistics: Statistics, types: Types, tmp_path_factory: pytest.TempPathFactory
) -> bytes:
    path = tmp_path_factory.mktemp("f") / "local.gguf"
    emit(
        *(tiny_source, types, kvs_of(tiny_source), statistics.gradient, load_ggml(), path),
        **{"threads": 2, "progress": SilentProgress()},
    )
    return path.read_bytes()


def emitted(
    engine: Engine, source: Source, types: Types, statistics: Statistics, path: Path, progress: Any = None
) -> bytes:
    emit_on(
        *(engine, source, types, kvs_of(source), statistics.gradient, path),
        **{"progress": progress or SilentProgress()},
    )
    assert [found.name for found in path.parent.iterdir()] == [path.name]
    return path.read_bytes()


@pytest.fixture(scope="module")
def notes() -> list[str]:
    return []


@pytest.fixture(scope="module")
def engine(cluster: Any, notes: list[str]) -> Iterator[RayEngine]:
    with connected(cluster.address, notes.append, PART) as found:
        yield found


def test_the_same_bytes(
    engine: RayEngine,
    tiny_source: HuggingFaceSource,
    statistics: Statistics,
    types: Types,
    local_table: bytes,
    local_file: bytes,
    tmp_path: Path,
) -> None:
    progress = Counting()
    assert table_bytes(tiny_source, statistics, engine, tmp_path / "table", progress) == local_table
    out = tmp_path / "out" / "out.gguf"
    assert emitted(engine, tiny_source, types, statistics, out, progress) == local_file
    assert list(progress.steps) == ["norms", "sensitivity", "emit", "hash"]


def pid_of(source: Source, task: int, tools: Tools) -> int:
    """A task that takes a while, and says where it ran."""
    time.sleep(0.3)
    return os.getpid()


def killed_once(source: Source, task: tuple[int, Path], tools: Tools) -> int:
    """The first time task 3 runs, its process kills itself."""
    number, marker = task
    if number == 3 and not marker.exists():
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return number * number


def killed_always(source: Source, task: int, tools: Tools) -> int:
    os.kill(os.getpid(), signal.SIGKILL)
    return task


class Wrapped:
    """A source of which every read is preceded by something that happens to its reader."""

    def __init__(self, source: Source) -> None:
        self.source = source
        for name in ("path", "kind", "architecture", "kvs", "tensors", "warnings", "files"):
            setattr(self, name, getattr(source, name))

    def before(self) -> None: ...

    def read(self, tensor: SourceTensor, matrix: int = 0, rows: slice | None = None) -> Floats:
        self.before()
        return self.source.read(tensor, matrix, rows)

    def read_stored(self, tensor: SourceTensor, matrix: int = 0, rows: slice | None = None) -> Bytes:
        self.before()
        return self.source.read_stored(tensor, matrix, rows)


class Limited(Wrapped):
    """Readers may write no file beyond 2 MB: as on a full disk, the kernel refuses."""

    def before(self) -> None:
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, resource.RLIM_INFINITY))


class Marked(Wrapped):
    """The first reader on every node leaves the node's name in a folder, and is at work for a while."""

    def __init__(self, source: Source, folder: Path) -> None:
        super().__init__(source)
        self.folder = folder

    def before(self) -> None:
        import ray

        mark = self.folder / ray.get_runtime_context().get_node_id()
        if not mark.exists():
            mark.touch()
            time.sleep(2)


def kill_when_it_works(cluster: Any, node: Any, folder: Path) -> None:
    """Kill all processes of ``node`` when one of them has left a mark in ``folder``."""
    deadline = time.monotonic() + 60
    while not (folder / node.node_id).exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    cluster.remove_node(node, allow_graceful=False)


def test_a_killed_worker(engine: RayEngine, tiny_source: HuggingFaceSource, notes: list[str], tmp_path: Path) -> None:
    found = dict(engine.map(killed_once, tiny_source, ((n, tmp_path / "killed") for n in range(6)), lambda _: None))
    assert found == {n: n * n for n in range(6)}
    assert (tmp_path / "killed").exists()
    assert notes.pop() == "note: task 3 lost its machine (WorkerCrashedError); it runs again"


def test_a_task_that_kills_every_worker(engine: RayEngine, tiny_source: HuggingFaceSource, notes: list[str]) -> None:
    with pytest.raises(ClusterError, match=f"task 0 lost its machine {ATTEMPTS} times.*memory is the usual reason"):
        list(engine.map(killed_always, tiny_source, [0], lambda _: None))
    assert len(notes) == ATTEMPTS - 1
    notes.clear()


def test_tasks_in_flight_are_bounded(engine: RayEngine, tiny_source: HuggingFaceSource) -> None:
    taken = 0

    def tasks() -> Iterator[int]:
        nonlocal taken
        for number in range(1, 9):
            taken = number
            yield number

    done = 0
    for done, (_, process) in enumerate(engine.map(pid_of, tiny_source, tasks(), lambda _: None), 1):
        # two processors
        assert taken <= done + 2
        assert process != os.getpid()
    assert done == 8


@pytest.mark.parametrize("stage", ["sensitivity", "emit"])
def test_a_killed_node(
    stage: str,
    cluster: Any,
    engine: RayEngine,
    tiny_source: HuggingFaceSource,
    statistics: Statistics,
    types: Types,
    notes: list[str],
    local_table: bytes,
    local_file: bytes,
    tmp_path: Path,
) -> None:
    """All of its processes by SIGKILL, while it works; its tasks run again elsewhere."""
    more = cluster.add_node(num_cpus=1, object_store_memory=80_000_000)
    cluster.wait_for_nodes()
    engine.look_again()
    (tmp_path / "marks").mkdir()
    source: Any = Marked(tiny_source, tmp_path / "marks")
    killer = threading.Thread(target=kill_when_it_works, args=(cluster, more, tmp_path / "marks"))
    killer.start()
    if stage == "sensitivity":
        assert table_bytes(source, statistics, engine, tmp_path / "table") == local_table
    else:
        assert emitted(engine, source, types, statistics, tmp_path / "out" / "out.gguf") == local_file
    killer.join()
    assert any("lost its machine" in note for note in notes)
    notes.clear()


def test_a_damaged_weight_is_one_line(
    engine: RayEngine, tiny_source: HuggingFaceSource, statistics: Statistics, types: Types, tmp_path: Path
) -> None:
    """A NaN that a worker meets: the message of the local engine, with the machine before it; nothing is left."""
    import shutil

    from converters import CONVERTERS
    from mopeq_edge.source.huggingface import open_huggingface

    shutil.copytree(tiny_source.path, tmp_path / "model")
    source = open_huggingface(tmp_path / "model", CONVERTERS, pre="gpt-2")
    name = "model.layers.2.mlp.experts.7.up_proj.weight"
    shard = source.checkpoint._shard_of[name]
    with Path(str(shard.path)).open("r+b") as file:
        file.seek(shard.entries[name].offset + 100)
        file.write(b"\xff\x7f")
    (tmp_path / "out").mkdir()
    with pytest.raises(SourceError, match=r"^machine \S+: .*'blk.2.ffn_up_exps.weight', expert 7: 1 of \d+ weights"):
        emitted(engine, source, types, statistics, tmp_path / "out" / "out.gguf")
    assert list((tmp_path / "out").iterdir()) == []


def test_a_full_disk(
    engine: RayEngine, tiny_source: HuggingFaceSource, statistics: Statistics, types: Types, tmp_path: Path
) -> None:
    full: Any = Limited(tiny_source)
    out = tmp_path / "out.gguf"
    out.write_bytes(b"old")
    with pytest.raises(OutputError, match=r"^machine \S+: .*cannot be written \(File too large\); nothing was left"):
        emit_on(engine, full, types, kvs_of(full), statistics.gradient, out, progress=SilentProgress())
    assert [path.name for path in tmp_path.iterdir()] == ["out.gguf"]
    assert out.read_bytes() == b"old"
