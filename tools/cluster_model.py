"""Time and cost of a 671 B FP8 checkpoint on N machines, from task times measured on this one.

    python -m tools.cluster_model                 # measures, simulates, prints the formula beside it
    python -m tools.cluster_model --real          # also: tasks on a Ray cluster of two nodes, simulated and real

The tasks are the product's own, cut as the engine cuts them, for the tensors of DeepSeek-V3. What one takes is measured
on one expert's matrix of its shape in FP8 with block scales. See docs/cluster.md.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mopeq_edge.artifacts import file_digest
from mopeq_edge.emit_parts import PartToWrite, PartWritten, TensorToHash, cut, hash_tensor, write_part
from mopeq_edge.engine.interface import Tools
from mopeq_edge.engine.local import LocalEngine
from mopeq_edge.engine.ray import PART_WEIGHTS, connected
from mopeq_edge.ggml.library import load_ggml
from mopeq_edge.ggml.types import BF16, GgmlType
from mopeq_edge.gguf_file import KV
from mopeq_edge.imatrix import Entry, Imatrix
from mopeq_edge.plan.candidates import parse_types
from mopeq_edge.sensitivity.measure import TensorErrors
from mopeq_edge.sensitivity.run import Measurement, measure_part, norms_of_part
from mopeq_edge.sensitivity.scores import Pricing
from mopeq_edge.source.checkpoint import Checkpoint
from mopeq_edge.source.model import Bytes, Floats, Source, SourceTensor
from mopeq_edge.source.part import Part, parts_of
from tools.cluster_simulation import Machines, Task, predict, simulate

N_IN, N_OUT, BLOCK = 7168, 2048, 128
FP8_BYTES = 1.0 + 4 / BLOCK**2
"""Bytes of a weight with its share of the scales."""

NAME = "blk.3.ffn_gate_exps.weight"
EMIT_BPW = 2.6
"""Bits per weight of the file that is written."""

MEASURED_ROWS, EMIT_ROWS = 64, 256
SCORES = 6
"""Pricings of each error: what a calibration with gradients gives."""


class OneExpert:
    """One matrix of an expert, FP8 with block scales, as a source."""

    kind, architecture, warnings = "huggingface", "deepseek2", ()
    kvs: Mapping[str, KV] = {}

    def __init__(self, directory: Path) -> None:
        rng = np.random.default_rng(1)
        codes = rng.integers(0, 256, (N_OUT, N_IN), dtype=np.uint8)
        # no NaN
        codes[codes & 127 == 127] = 0
        scales = (rng.random((N_OUT // BLOCK, N_IN // BLOCK), dtype=np.float32) + 0.5) * 1e-4
        header: dict[str, Any] = {
            "w": {"dtype": "F8_E4M3", "shape": list(codes.shape), "data_offsets": [0, codes.nbytes]},
            "w_scale_inv": {
                "dtype": "F32",
                "shape": list(scales.shape),
                "data_offsets": [codes.nbytes, codes.nbytes + scales.nbytes],
            },
        }
        text = json.dumps(header).encode()
        self.path = directory / "model.safetensors"
        self.path.write_bytes(len(text).to_bytes(8, "little") + text + codes.tobytes() + scales.tobytes())
        config = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK]}}
        self.files = (self.path,)
        self.checkpoint = Checkpoint(directory, config)
        self.tensors = (SourceTensor(NAME, (N_IN, N_OUT, 1), BF16),)

    def read(self, tensor: SourceTensor, matrix: int = 0, rows: slice | None = None) -> Floats:
        start, stop, _ = (rows or slice(None)).indices(N_OUT)
        return self.checkpoint.read_rows("w", start, stop)

    def read_stored(self, tensor: SourceTensor, matrix: int = 0, rows: slice | None = None) -> Bytes:
        raise NotImplementedError


@dataclass(frozen=True)
class Rates:
    """What was measured; seconds of one processor for a weight, and bytes a second."""

    read: float
    """Reading from the page cache and multiplying out, which is part of the others."""
    norms: float
    measure: float
    """All candidate types and scores, of each weight that is measured."""
    types: int
    emit: float
    """The type of median cost among those of 2 to 3 bits."""
    emit_slowest: float
    hash: float
    """A byte."""
    sha256: float
    """Bytes a second."""
    write: float
    """Bytes a second into the file system, fsync included."""


def measure_rates(folder: Path, report: Callable[[str], None]) -> Rates:
    """Run each kind of task on one expert's matrix."""
    source = OneExpert(folder)
    tensor = source.tensors[0]
    part, n = Part(tensor, 0, 1), tensor.n_weights
    engine = LocalEngine(1, load_ggml())
    types = parse_types("default")
    rng = np.random.default_rng(2)
    sums = rng.random((1, N_IN), dtype=np.float32) + 0.1
    imatrix = Imatrix({NAME: Entry(sums, np.ones(1, dtype=np.float32))}, ("random",), 1, 1)
    prices = {str(score): [Pricing(1.0, columns=sums[0].astype(np.float64))] for score in range(SCORES)}

    def best(
        what: str, run: Callable[[], object], repeats: int = 3, clock: Callable[[], float] = time.process_time
    ) -> float:
        # processor time: other work on this machine does not count
        found = []
        for _ in range(repeats):
            start = clock()
            run()
            found.append(clock() - start)
        report(f"{what}: {', '.join(f'{seconds:.3f}' for seconds in found)} s")
        return min(found)

    def task(work: Any, what: Any) -> Any:
        return next(iter(engine.map(work, source, [what], lambda _: None)))[1]

    read = best("read and multiply out", lambda: source.read(tensor)) / n
    norms = best("norms", lambda: task(norms_of_part, part)) / n
    chosen = tuple(kind for kind in types if kind.fits(N_IN))
    work = Measurement(part, (*chosen, BF16), prices, imatrix, N_IN, MEASURED_ROWS)
    measured: TensorErrors | None = None

    def run_measure() -> None:
        nonlocal measured
        measured = task(measure_part, work)

    measure = best(f"measure {MEASURED_ROWS} rows, {len(chosen)} types", run_measure, 2) / (MEASURED_ROWS * N_IN)
    assert measured is not None
    out = folder / "out"
    out.touch()
    emits: dict[str, float] = {}
    done: PartWritten | None = None
    for kind in chosen:
        if not 2 <= kind.bpw <= 3.5:
            continue
        place = PartToWrite(out, 0, tensor, kind, (0,), range(EMIT_ROWS), imatrix.entries[NAME].mean())

        def run_write(place: PartToWrite = place) -> None:
            nonlocal done
            done = task(write_part, place)

        emits[kind.name] = best(f"emit {EMIT_ROWS} rows as {kind.name}", run_write, 2) / (EMIT_ROWS * N_IN)
    data = os.urandom(2**26)
    write = len(data) / best("write and fsync 64 MiB", lambda: _write(folder / "data", data), clock=time.perf_counter)
    whole = TensorToHash(folder / "data", 0, "data", ((len(data), ""),))
    hashed = best("hash 64 MiB", lambda: task(hash_tensor, whole)) / len(data)
    sha256 = len(data) / best("SHA-256 of 64 MiB", lambda: file_digest(folder / "data"))
    costs = sorted(emits.values())
    return Rates(read, norms, measure, len(chosen), costs[len(costs) // 2], costs[-1], hashed, sha256, write)


def _write(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def deepseek_v3() -> list[SourceTensor]:
    """The matrices of DeepSeek-V3 (671 B), without its block that predicts a further token."""
    hidden, vocabulary, heads = 7168, 129280, 128
    found = [("token_embd", (hidden, vocabulary)), ("output", (hidden, vocabulary))]
    for layer in range(61):
        found += [
            (f"blk.{layer}.{name}", shape)
            for name, shape in (
                ("attn_q_a", (hidden, 1536)),
                ("attn_q_b", (1536, heads * 192)),
                ("attn_kv_a_mqa", (hidden, 576)),
                ("attn_k_b", (128, 512, heads)),
                ("attn_v_b", (512, 128, heads)),
                ("attn_output", (heads * 128, hidden)),
            )
        ]
        width, stack, kind = (18432, (), "") if layer < 3 else (2048, (256,), "_exps")
        found += [
            (f"blk.{layer}.ffn_gate{kind}", (hidden, width, *stack)),
            (f"blk.{layer}.ffn_up{kind}", (hidden, width, *stack)),
            (f"blk.{layer}.ffn_down{kind}", (width, hidden, *stack)),
        ]
        if layer >= 3:
            found += [(f"blk.{layer}.ffn_{name}_shexp", (hidden, 2048)) for name in ("gate", "up", "down")]
    return [SourceTensor(f"{name}.weight", shape, BF16) for name, shape in found]


def stages_of(rates: Rates, sample_rows: int | None) -> dict[str, list[Task]]:
    """The tasks of a run by stage, in the order in which they are sent; a stage starts when the one before ends."""
    tensors = deepseek_v3()
    parts = parts_of(tensors, PART_WEIGHTS)

    def measured(part: Part) -> float:
        if sample_rows is None:
            return 1.0
        rows = sample_rows if part.whole.n_matrices > 1 else 8 * sample_rows
        return min(1.0, rows / part.whole.n_out)

    writes = sorted(
        (
            part.n_in * len(rows) * len(matrices)
            for part in tensors
            for matrices, rows in cut(part, range(part.n_matrices), PART_WEIGHTS)
        ),
        reverse=True,
    )
    file_bytes = EMIT_BPW / 8
    return {
        "norms": [Task(part.n_weights * rates.norms, part.n_weights * FP8_BYTES) for part in parts],
        "measure": [
            Task(part.n_weights * measured(part) * rates.measure, part.n_weights * measured(part) * FP8_BYTES)
            for part in parts
        ],
        "emit": [Task(n * rates.emit, n * FP8_BYTES, n * file_bytes) for n in writes],
        "hash": [Task(t.n_weights * file_bytes * rates.hash, t.n_weights * file_bytes) for t in tensors],
    }


@dataclass(frozen=True)
class Row:
    """One number of machines: hours of all stages, and what they cost."""

    machines: int
    simulated_hours: float
    formula_hours: float
    failures: float
    tasks_again: float
    cost: float

    @property
    def difference(self) -> float:
        return self.formula_hours / self.simulated_hours - 1


def model_rows(
    stages: Mapping[str, list[Task]],
    machines: Callable[[int], Machines],
    price: float,
    counts: tuple[int, ...],
    seeds: int = 1,
) -> list[Row]:
    """The table, simulations averaged over ``seeds`` of failures; ``price`` is that of a machine for an hour."""
    rows = []
    for n in counts:
        runs = [simulate(tasks, machines(n), seed) for tasks in stages.values() for seed in range(seeds)]
        hours = sum(run.seconds for run in runs) / seeds / 3600
        formula = sum(predict(tasks, machines(n)) for tasks in stages.values()) / 3600
        failures, again = sum(run.failures for run in runs) / seeds, sum(run.again for run in runs) / seeds
        rows.append(Row(n, hours, formula, failures, again, hours * n * price))
    return rows


def timed_write(source: Source, task: PartToWrite, tools: Tools) -> tuple[float, float]:
    """The work of one task, and when it began and ended."""
    start = time.time()
    write_part(source, task, tools)
    return start, time.time()


def nothing(source: Source, task: int, tools: Tools) -> None:
    """A task that only starts its process."""
    time.sleep(1.0)


def real_run(folder: Path, n_machines: int, n_tasks: int) -> dict[str, float]:
    """``n_tasks`` tasks of emit on a Ray cluster of ``n_machines`` nodes with a processor each.

    Returns the real seconds, the simulated ones of the same tasks' times, and their ratio.
    """
    from ray.cluster_utils import Cluster

    source = OneExpert(folder)
    kinds = parse_types("Q2_K,Q3_K,Q4_K,IQ3_XXS")
    tensor = source.tensors[0]
    out = folder / "out"
    weights = np.ones((1, N_IN), dtype=np.float32)

    def tasks() -> Iterator[PartToWrite]:
        for number in range(n_tasks):
            kind: GgmlType = kinds[number % len(kinds)]
            rows = range(N_OUT // 4 // (1 + number % 3))
            yield PartToWrite(out, number * 2**24, tensor, kind, (0,), rows, weights)

    out.touch()
    cluster = Cluster(True, head_node_args={"num_cpus": 0, "object_store_memory": 80_000_000})
    try:
        for _ in range(n_machines):
            cluster.add_node(num_cpus=1, object_store_memory=80_000_000)
        cluster.wait_for_nodes()
        with connected(cluster.address, print) as engine:
            # processes start and read the source
            list(engine.map(nothing, source, range(2 * n_machines), lambda _: None))
            start = time.time()
            spans = dict(engine.map(timed_write, source, tasks(), lambda _: None))
            real = time.time() - start
    finally:
        cluster.shutdown()
    found = [Task(spans[number][1] - spans[number][0]) for number in range(n_tasks)]
    simulated = simulate(found, Machines(n_machines, 1)).seconds
    return {"real_seconds": real, "simulated_seconds": simulated, "ratio": simulated / real, "tasks": n_tasks}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--machines", default="1,2,4,8,16,32", help="numbers of machines")
    parser.add_argument("--cores", type=int, default=32, help="processors of a machine")
    parser.add_argument("--storage", type=float, default=10.0, help="GB/s that the storage gives to all machines")
    parser.add_argument("--network", type=float, default=3.0, help="GB/s of one machine")
    parser.add_argument("--mtbf", type=float, default=100.0, help="hours between two failures of a machine; 0: never")
    parser.add_argument("--price", type=float, default=1.5, help="of a machine for an hour")
    parser.add_argument("--overhead", type=float, default=2e-3, help="seconds of the driver for a task")
    parser.add_argument("--sample-rows", type=int, default=64, help="as of sensitivity; 0: all rows")
    parser.add_argument("--rates", type=Path, help="JSON of an earlier run's rates, instead of measuring")
    parser.add_argument("--real", action="store_true", help="also run tasks on a Ray cluster of two nodes")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()

    def report(line: str) -> None:
        if not given.json:
            print(line, flush=True)

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rates = Rates(**json.loads(given.rates.read_text())) if given.rates else measure_rates(folder, report)
        real = real_run(folder, 2, 24) if given.real else None
    mtbf = given.mtbf * 3600 or None

    def machines(n: int) -> Machines:
        return Machines(n, given.cores, given.storage * 1e9, given.network * 1e9, mtbf, overhead=given.overhead)

    stages = stages_of(rates, given.sample_rows or None)
    counts = tuple(int(n) for n in given.machines.split(","))
    rows = model_rows(stages, machines, given.price, counts)
    n_weights = sum(t.n_weights for t in deepseek_v3())
    if given.json:
        print(json.dumps({"rates": asdict(rates), "rows": [asdict(row) for row in rows], "real": real}, indent=1))
        return
    print(json.dumps(asdict(rates)))
    print(f"{n_weights / 1e9:.1f} B weights, {n_weights * FP8_BYTES / 1e9:.0f} GB in FP8")
    for stage, tasks in stages.items():
        hours = sum(task.seconds for task in tasks) / 3600
        print(
            f"{stage}: {len(tasks)} tasks, {hours:.1f} processor hours, longest {max(t.seconds for t in tasks):.0f} s"
        )
    hash_hours = n_weights * FP8_BYTES / rates.sha256 / 3600
    print(f"before the first task of a MODEL that is a path: its SHA-256 on one processor, {hash_hours:.2f} h")
    print("| machines | simulated, h | formula, h | difference | failures | tasks again | cost |")
    print("|---|---|---|---|---|---|---|")
    for row in rows:
        print(
            f"| {row.machines} | {row.simulated_hours:.2f} | {row.formula_hours:.2f} | {100 * row.difference:+.1f} % "
            f"| {row.failures:.1f} | {row.tasks_again:.0f} | {row.cost:.1f} |"
        )
    if real is not None:
        print(
            f"{real['tasks']} tasks on two nodes: {real['real_seconds']:.1f} s, simulated from their times "
            f"{real['simulated_seconds']:.1f} s, ratio {real['ratio']:.3f}"
        )


if __name__ == "__main__":
    main()
