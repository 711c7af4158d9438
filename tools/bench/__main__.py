"""All benchmarks that compare with a peer, in one run: ``python -m tools.bench [NAMES] [--quick] [--json F]``.

Prints the table of docs/performance.md and, before it, the machine; progress goes to stderr.
"""

from __future__ import annotations

import json
import platform
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click

from mopeq_edge.cli.console import available_threads
from tools.bench import calibrate, emit, expert_groups, growth, sensitivity
from tools.bench.measure import Ratio, markdown
from tools.bench.models import Shape

Bench = Callable[[bool, int, int], list[Ratio]]


def _olmoe(n_layer: int) -> Shape:
    return Shape(n_layer, n_expert=64, n_embd=2048, n_ff=1024, n_used=8, n_head=16)


def _emit(quick: bool, rounds: int, threads: int) -> list[Ratio]:
    return emit.measure(_olmoe(1 if quick else 4), emit.TYPES, rounds, threads)


def _calibrate(quick: bool, rounds: int, threads: int) -> list[Ratio]:
    return calibrate.measure(_olmoe(1 if quick else 2), "BF16,F16", 512, 8 if quick else 16, rounds, threads)


def _sensitivity(quick: bool, rounds: int, threads: int) -> list[Ratio]:
    return sensitivity.measure(_olmoe(1 if quick else 4), sensitivity.EIGHT, "auto", 4.0, rounds, threads)


def _expert_groups(quick: bool, rounds: int, threads: int) -> list[Ratio]:
    shape = Shape(2 if quick else 8, 64, 1024, 1024, 8)
    return expert_groups.measure(shape, "Q3_K", "Q2_K,Q3_K,Q4_K", [threads], 256, 64, max(rounds, 3))


def _growth(quick: bool, rounds: int, threads: int) -> list[Ratio]:
    return growth.measure([1, 2] if quick else [1, 2, 4, 8], threads)


BENCHES: Mapping[str, Bench] = {
    "emit": _emit,
    "calibrate": _calibrate,
    "sensitivity": _sensitivity,
    "expert-groups": _expert_groups,
    "growth": _growth,
}


@click.command()
@click.argument("names", nargs=-1, type=click.Choice(list(BENCHES)))
@click.option("--quick", is_flag=True, help="Models of 0.4 B weights: minutes in all, and less telling.")
@click.option("--rounds", default=3, show_default=True, help="Runs of each, in turn; growth runs once.")
@click.option("--threads", type=int, default=available_threads, help="Threads (default: every CPU).")
@click.option("--json", "path", type=click.Path(path_type=Path), help="Also write everything to this file.")
def main(names: tuple[str, ...], quick: bool, rounds: int, threads: int, path: Path | None) -> None:
    """Run NAMES, or all: emit, calibrate, sensitivity, expert-groups, growth."""
    found: list[Ratio] = []
    for name in names or tuple(BENCHES):
        start = time.perf_counter()
        found += BENCHES[name](quick, rounds, threads)
        print(f"{name}: {time.perf_counter() - start:.0f} s", file=sys.stderr)
        if path is not None:
            # after each, so that a run that is stopped has left what it measured
            result: dict[str, Any] = {"machine": machine(), "quick": quick, "rounds": rounds, "threads": threads}
            result["ratios"] = [ratio.as_dict() for ratio in found]
            path.write_text(json.dumps(result, indent=2, sort_keys=True) + "\n")
    click.echo(f"{machine()}, {threads} threads, {rounds} rounds{', quick' if quick else ''}\n\n{markdown(found)}")


def machine() -> str:
    """The processor's name, its CPUs, and what the kernel calls it."""
    cpu = Path("/proc/cpuinfo")
    lines = cpu.read_text().splitlines() if cpu.is_file() else []
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in reversed(lines))}
    model = f"family {fields['cpu family']} model {fields['model']}" if "cpu family" in fields else platform.machine()
    return f"{fields.get('model name', platform.processor())} ({model}), {available_threads()} CPUs"


if __name__ == "__main__":
    main()
