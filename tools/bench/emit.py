"""Time and peak memory of ``emit`` against llama-quantize: same source, same types, same threads, in turn.

Prints the ratios of medians, ours over theirs: below 1 is better.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import click

from mopeq_edge.cli.console import available_threads, print_json
from mopeq_edge.runtime.locate import tool
from tools.bench.measure import run
from tools.bench.models import Shape, write_random_olmoe

# A process of its own, like llama-quantize, so that start-up and memory are counted alike.
_OURS = """
import sys
from pathlib import Path
from mopeq_edge.emit import emit
from mopeq_edge.ggml.library import load_ggml
from mopeq_edge.ggml.types import type_named
from mopeq_edge.progress import SilentProgress
from mopeq_edge.source.gguf import GGUFSource
source, kind = GGUFSource(Path(sys.argv[1])), type_named(sys.argv[3])
types = {t.name: kind if t.quantizable else t.type for t in source.tensors}
threads, progress = int(sys.argv[4]), SilentProgress()
emit(source, types, source.kvs, None, load_ggml(), Path(sys.argv[2]), threads=threads, progress=progress)
"""


@click.command()
@click.option("--layers", default=4, show_default=True, help="Blocks.")
@click.option("--experts", default=16, show_default=True, help="Experts of a block.")
@click.option("--embd", default=1024, show_default=True, help="Hidden size.")
@click.option("--ff", default=1024, show_default=True, help="Hidden size of an expert.")
@click.option("--type", "kind", default="Q4_K", show_default=True, help="Type of all matrices.")
@click.option("--rounds", default=3, show_default=True, help="Runs of each, in turn.")
@click.option("--threads", default=available_threads, help="Threads of each (default: every CPU).")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def main(layers: int, experts: int, embd: int, ff: int, kind: str, rounds: int, threads: int, as_json: bool) -> None:
    """Compare emit with llama-quantize on a random-weight model."""
    with tempfile.TemporaryDirectory() as folder:
        source, ours, theirs = (Path(folder) / name for name in ("source.gguf", "ours.gguf", "theirs.gguf"))
        weights = write_random_olmoe(source, Shape(layers, experts, embd, ff))
        commands = {
            "ours": [sys.executable, "-c", _OURS, str(source), str(ours), kind, str(threads)],
            "llama-quantize": [str(tool("llama-quantize")), "--pure", str(source), str(theirs), kind, str(threads)],
        }
        runs: dict[str, list[tuple[float, float]]] = {name: [] for name in commands}
        for _ in range(rounds):
            for name, command in commands.items():
                runs[name].append(run(command))
        same_size = ours.stat().st_size - theirs.stat().st_size
    result: dict[str, Any] = {"weights": weights, "type": kind, "threads": threads, "size_difference_bytes": same_size}
    for name, values in runs.items():
        result[name] = {
            "seconds": statistics.median(v[0] for v in values),
            "peak_mib": statistics.median(v[1] for v in values),
        }
    for key in ("seconds", "peak_mib"):
        result[f"ratio_{key}"] = result["ours"][key] / result["llama-quantize"][key]
    if as_json:
        print_json(result)
        return
    click.echo(f"{weights:,} weights to {kind}, {threads} threads, medians of {rounds}")
    for name in runs:
        click.echo(f"{name:<15} {result[name]['seconds']:8.2f} s  {result[name]['peak_mib']:8.1f} MiB peak")
    click.echo(f"{'ratio':<15} {result['ratio_seconds']:8.2f}    {result['ratio_peak_mib']:8.2f}")


if __name__ == "__main__":
    main()
