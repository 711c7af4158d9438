"""How time and peak memory of every stage grow with the number of layers: 0.4, 0.8, 1.7 and 3.3 B weights.

Each size in the shape of OLMoE-1B-7B's blocks, the commands one after the other. A ratio is to the smallest size: of
CPU time over the number of weights, which is 1 or less (starting takes the same everywhere), and of peak memory, which
is 1 when it does not grow.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import click

from mopeq_edge.cli.console import available_threads, print_json
from tools.bench.calibrate import PROGRAM, VOCABULARY, ours
from tools.bench.checkpoints import write_olmoe_checkpoint
from tools.bench.measure import Ratio, Run, Spread, markdown, run
from tools.bench.models import Shape

BLOCK = Shape(n_layer=1, n_expert=64, n_embd=2048, n_ff=1024, n_used=8, n_head=16)
LAYERS = "1,2,4,8"
TYPES = "Q3_K,Q6_K"
"""Types that are quickly quantized."""


def measure_size(shape: Shape, threads: int) -> tuple[int, dict[str, Run]]:
    """(weights, a run of every stage)."""
    with tempfile.TemporaryDirectory() as folder:
        model, work, out = Path(folder) / "model", Path(folder) / "work", Path(folder) / "out.gguf"
        nbytes = write_olmoe_checkpoint(model, shape, VOCABULARY)
        common = [str(model), "--work-dir", str(work), "--pre", "gpt-2"]
        many = ["--threads", str(threads)]
        stages = {
            "calibrate": ours(model, work, 256, 4, threads, fisher=True),
            "sensitivity": [*PROGRAM, "sensitivity", *common, *many, "--types", TYPES],
            "plan": [*PROGRAM, "plan", *common, "--types", TYPES, "--target-bpw", "5"],
            "emit": [*PROGRAM, "emit", str(model), str(out), *common[1:], *many],
        }
        runs = {name: run(command) for name, command in stages.items()}
        shutil.rmtree(model)
    return nbytes // 2, runs


def measure(layers: Sequence[int], threads: int, block: Shape = BLOCK) -> list[Ratio]:
    """Ratios of every size but the first to the first."""
    (base, first), *others = (measure_size(replace(block, n_layer=n), threads) for n in layers)
    found = []
    for weights, runs in others:
        bench = f"{weights / 1e9:.1f} B against {base / 1e9:.1f} B weights"
        for stage in ("calibrate", "sensitivity", "emit"):
            for what, value, unit, by in (
                ("CPU time a weight", "cpu_seconds", "s", weights / base),
                ("peak memory", "peak_mib", "MiB", 1.0),
            ):
                mine, other = float(getattr(runs[stage], value)), float(getattr(first[stage], value))
                of, to = Spread.of([mine]), Spread.of([other])
                found.append(Ratio(bench, f"{stage}, {what}", Spread.of([mine / by / other]), of, to, unit, "≤ 1.1"))
    return found


@click.command()
@click.option("--layers", default=LAYERS, show_default=True, help="Numbers of blocks, the smallest first.")
@click.option("--threads", type=int, default=available_threads, help="Threads (default: every CPU).")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def main(layers: str, threads: int, as_json: bool) -> None:
    """Measure every stage on models of several sizes."""
    ratios = measure([int(n) for n in layers.split(",")], threads)
    if as_json:
        print_json([ratio.as_dict() for ratio in ratios])
    else:
        click.echo(markdown(ratios))


if __name__ == "__main__":
    main()
