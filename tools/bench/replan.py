"""Time of a plan for another budget, everything before it finished: the whole command, and its stages.

Writes a sparse checkpoint (``tools.sparse_checkpoint``) with a work directory of synthetic statistics and damages, as
large as real ones, plans once, and then for other budgets, each in a process of its own.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import numpy as np

from mopeq_edge.calibrate.statistics import Routing, write_routing
from mopeq_edge.cli.console import print_json
from mopeq_edge.ggml.types import BY_NAME
from mopeq_edge.imatrix import GRADIENT, Entry, Imatrix, write_imatrix
from mopeq_edge.pipeline_calibrate import ACTIVATION_FILE, GRADIENT_FILE, ROUTING_FILE
from mopeq_edge.pipeline_context import open_header
from mopeq_edge.plan.candidates import DEFAULT_TYPES, candidates
from mopeq_edge.sensitivity.measure import TensorErrors
from mopeq_edge.sensitivity.scores import DERIVED, NEEDS_TRACES, SCORES
from mopeq_edge.sensitivity.table import SensitivityTable, write_table
from mopeq_edge.source.model import Source
from mopeq_edge.source.roles import Role
from mopeq_edge.workdir import WorkDirectory
from tools.bench.measure import run
from tools.sparse_checkpoint import Size, write_sparse_checkpoint

PRE = "deepseek-v3"
STAGES = (
    ("mopeq_edge.pipeline", "open_description"),
    ("mopeq_edge.pipeline_calibrate", "load_calibrated"),
    ("mopeq_edge.pipeline", "load_sensitivity"),
    ("mopeq_edge.pipeline", "run_plan"),
    ("mopeq_edge.pipeline", "run_forecast"),
    ("mopeq_edge.cli.stages", "plan_table"),
)
"""Functions that are timed, as the command finds them."""

# times each of the functions where it is looked up, and the imports before them
_TIMED = """
import json, sys, time
start = time.perf_counter()
from importlib import import_module
stages, arguments = json.loads(sys.argv[1]), json.loads(sys.argv[2])
modules = [import_module(module) for module, _ in stages]
seconds = {"imports": time.perf_counter() - start}
def timed(name, function):
    def call(*args, **kwargs):
        begin = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            seconds[name] = seconds.get(name, 0) + time.perf_counter() - begin
    return call
for module, (_, name) in zip(modules, stages):
    setattr(module, name, timed(name, getattr(module, name)))
from mopeq_edge.cli import cli
cli(arguments, standalone_mode=False)
print(json.dumps(seconds), file=sys.stderr)
"""


def write_work(work: WorkDirectory, source: Source, spread: float) -> None:
    """Statistics and damages as a calibration would leave them; ``spread`` is that of the experts' log damages."""
    rng = np.random.default_rng(0)
    n_tokens = 128 * 512
    stacks = [t for t in source.tensors if t.role is Role.EXPERT]
    matrices = [t for t in source.tensors if t.quantizable and t.role is not Role.EMBEDDING]
    counts = {t.layer: n_tokens * rng.dirichlet(np.full(t.n_matrices, 2.0)) for t in stacks if t.layer is not None}
    entries = {}
    for tensor in matrices:
        of_layer = counts.get(tensor.layer) if tensor.role is Role.EXPERT and tensor.layer is not None else None
        seen = np.full(tensor.n_matrices, 1e4) if of_layer is None else of_layer
        sums = rng.random((tensor.n_matrices, tensor.n_in), dtype=np.float32)
        entries[tensor.name] = Entry(sums + 0.1, np.maximum(seen, 1.0).astype(np.float32))
    for name, kind in ((ACTIVATION_FILE, "activation"), (GRADIENT_FILE, GRADIENT)):
        write_imatrix(Imatrix(entries, ("corpus.txt",), 128, 512, kind), work.file(name))
    n_vocab = next(t.n_out for t in source.tensors if t.role is Role.EMBEDDING)
    write_routing(Routing(n_tokens, counts, counts, np.zeros(n_vocab)), work.file(ROUTING_FILE), "synthetic")
    work.record("calibrate", "synthetic", [ACTIVATION_FILE, GRADIENT_FILE, ROUTING_FILE])
    scores = tuple(score for score in SCORES if score not in NEEDS_TRACES | DERIVED)
    errors = {}
    types = [BY_NAME[name] for name in DEFAULT_TYPES]
    for tensor in (t for t in source.tensors if t.quantizable):
        kinds = candidates(tensor, types, has_imatrix=True, floors={})
        damage = {score: _damages(rng, kinds, tensor.n_matrices, spread) for score in scores}
        errors[tensor.name] = TensorErrors(
            tuple(kind.name for kind in kinds),
            damage,
            {score: 1e-4 * values**2 for score, values in damage.items()},
            np.ones(tensor.n_matrices),
        )
    mopeq = {layer: np.ones(len(own)) for layer, own in counts.items()}
    name = f"sensitivity-{GRADIENT}.safetensors"
    write_table(SensitivityTable(errors, mopeq, scores, GRADIENT, (), 16, "synthetic"), work.file(name))
    work.record(f"sensitivity-{GRADIENT}", "synthetic", [name])


def _damages(rng: np.random.Generator, kinds: tuple[Any, ...], n: int, spread: float) -> Any:
    """[n_types, n]: about fourfold a bit, types of equal size a few per cent apart, nothing for the own type."""
    expert = 1e-4 * np.exp(spread * rng.standard_normal(n))
    noise = np.exp(0.05 * rng.standard_normal((len(kinds), n)))
    found = np.array([4.0**-kind.bpw for kind in kinds])[:, None] * expert * noise
    found[-1] = 0
    return found


def command(model: Path, work: Path, *options: str) -> list[str]:
    """``mopeq-edge plan`` as a user starts it."""
    return [*_PYTHON, "plan", *_arguments(model, work, *options)]


_PYTHON = [sys.executable, "-c", "from mopeq_edge.cli import main; main()"]


def _arguments(model: Path, work: Path, *options: str) -> list[str]:
    return [str(model), "--work-dir", str(work), "--pre", PRE, *options]


def _stages(model: Path, work: Path, *options: str) -> dict[str, float]:
    given = ["plan", *_arguments(model, work, *options)]
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", _TIMED, json.dumps(STAGES), json.dumps(given)],
        check=True,
        capture_output=True,
        text=True,
    )
    seconds: dict[str, float] = json.loads(done.stderr.strip().splitlines()[-1])
    # start and end of Python, and printing
    return {**seconds, "rest": time.perf_counter() - started - sum(seconds.values())}


@click.command()
@click.option("--layers", default=61, show_default=True)
@click.option("--experts", default=256, show_default=True)
@click.option("--spread", default=1.0, show_default=True, help="Standard deviation of the experts' log damages.")
@click.option("--bpw", multiple=True, type=float, default=(2.9, 3.3, 4.1), show_default=True, help="Other budgets.")
@click.option("--rounds", default=3, show_default=True, help="Runs of each.")
@click.option("--keep", type=click.Path(path_type=Path), help="Folder for the model, used again if it is there.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def main(
    layers: int, experts: int, spread: float, bpw: tuple[float, ...], rounds: int, keep: Path | None, as_json: bool
) -> None:
    """Time a second plan of a large model."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = keep or Path(scratch)
        model, work = folder / "model", folder / f"work-{spread:g}"
        if not model.is_dir():
            write_sparse_checkpoint(model, Size(n_layer=layers, n_expert=experts))
        if not work.is_dir():
            write_work(WorkDirectory(work), open_header(model, pre=PRE), spread)
        first = run(command(model, work, "--target-bpw", "3.5", "--json")).seconds
        found: dict[str, Any] = {"first_seconds": first}
        for layout in ("stock", "per-expert"):
            for budget in bpw:
                given = ("--target-bpw", str(budget), "--layout", layout)
                runs = [run(command(model, work, *given)) for _ in range(rounds)]
                stages = [_stages(model, work, *given) for _ in range(rounds)]
                plan = json.loads((work / "plan.json").read_text())
                found[f"{layout} {budget:g} bpw"] = {
                    "seconds": statistics.median(one.seconds for one in runs),
                    "slowest_seconds": max(one.seconds for one in runs),
                    "cpu_seconds": statistics.median(one.cpu_seconds for one in runs),
                    "peak_mib": max(one.peak_mib for one in runs),
                    "gap": plan["gap"],
                    "stages": {name: statistics.median(s.get(name, 0.0) for s in stages) for name in stages[0]},
                }
    if as_json:
        print_json(found)
        return
    click.echo(f"first plan {first:.2f} s; another budget, medians of {rounds}:")
    for name, own in found.items():
        if isinstance(own, dict):
            parts = ", ".join(f"{stage} {seconds:.2f}" for stage, seconds in own["stages"].items())
            click.echo(f"{name:<20} {own['seconds']:.2f} s, {own['peak_mib']:.0f} MiB, gap {own['gap']:.1e} ({parts})")


if __name__ == "__main__":
    main()
