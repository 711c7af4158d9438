"""Speed and memory of expert groups against stock files of equal bytes, in one llama.cpp, in turn.

Prefill and decode in llama-bench on a random-weight OLMoE, as ratios to the stock file (above 1 is
better), and peak memory of loading as ratio to it (below 1 is better). A mix of types is compared with what its
uniform files take per token, weighted by rows: so a slow kernel of one type does not count as a cost of grouping.
"""

from __future__ import annotations

import random
import tempfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import click

from mopeq_edge.cli.console import print_json
from mopeq_edge.expert_groups.layout import ExpertGroup, Grouping, Types
from mopeq_edge.ggml.types import BY_NAME, GgmlType, type_named
from mopeq_edge.runtime.locate import tool
from tools.bench.measure import Ratio, Spread, llama_bench, markdown, run
from tools.bench.models import Shape, write_random_olmoe

REST = BY_NAME["Q6_K"]
"""Type of everything but experts."""

Speeds = dict[tuple[int, str], list[float]]
"""Tokens per second of every round by (threads, "prefill" or "decode")."""


def measure(
    shape: Shape,
    same: str,
    mix: str,
    threads: Sequence[int],
    prompt: int,
    generate: int,
    rounds: int,
    program: Path | None = None,
) -> list[Ratio]:
    """Ratios of speed, ours over theirs, and of memory."""
    program = program or tool("llama-bench")
    kinds = [type_named(name) for name in mix.split(",")]
    files: dict[str, Types] = {kind.name: _types(shape, kind) for kind in {*kinds, type_named(same)}}
    grouped, mixed = f"{same} in {len(kinds)} groups", f"{mix} in groups"
    files[grouped] = _types(shape, [type_named(same)] * len(kinds))
    files[mixed] = _types(shape, kinds)
    with tempfile.TemporaryDirectory() as folder:
        paths = {name: Path(folder) / f"{index}.gguf" for index, name in enumerate(files)}
        for name, types in files.items():
            weights = write_random_olmoe(paths[name], shape, types)
        speeds = _speeds(program, paths, threads, rounds, prompt, generate)
        peaks = {mmap: _peaks(program, paths, mmap, rounds) for mmap in ("mmap", "none")}
    size = f"{weights / 1e9:.2f} B weights"
    average = _average([speeds[kind.name] for kind in kinds])
    found = []
    for name, theirs, target, said in (
        (grouped, speeds[same], "≥ 0.97", same),
        (mixed, average, "≥ 0.95", "the mean time of its types' files"),
    ):
        bench = f"per-expert, {size}, {name}, against {said}"
        found += [
            _ratio(bench, f"{what}, {n} threads", speeds[name][n, what], theirs[n, what], "t/s", target)
            for n, what in theirs
        ]
    bench = f"per-expert, {size}, {grouped}, against {same}"
    for mmap, peak in peaks.items():
        found.append(_ratio(bench, f"peak memory, load mode {mmap}", peak[grouped], peak[same], "MiB", "≤ 1.01"))
    return found


def _ratio(bench: str, what: str, ours: Sequence[float], theirs: Sequence[float], unit: str, target: str) -> Ratio:
    by_round = [a / b for a, b in zip(ours, theirs, strict=True)]
    return Ratio(bench, what, Spread.of(by_round), Spread.of(ours), Spread.of(theirs), unit, target)


def _types(shape: Shape, kinds: GgmlType | Sequence[GgmlType]) -> Types:
    """Every matrix in :data:`REST`; stacks in one type, or in groups of equal size that are drawn for each stack."""
    tensors = shape.tensors(n_vocab=1)
    types: dict[str, GgmlType | Grouping] = {t.name: REST for t in tensors if t.quantizable}
    for tensor in tensors:
        if tensor.projection is None:
            continue
        if isinstance(kinds, GgmlType):
            types[tensor.name] = kinds
            continue
        order = list(range(shape.n_expert))
        random.Random(tensor.name).shuffle(order)
        parts = [tuple(sorted(order[g :: len(kinds)])) for g in range(len(kinds))]
        types[tensor.name] = tuple(ExpertGroup(kind, part) for kind, part in zip(kinds, parts, strict=True))
    return types


def _speeds(
    program: Path, paths: Mapping[str, Path], threads: Sequence[int], rounds: int, prompt: int, generate: int
) -> dict[str, Speeds]:
    found: dict[str, Speeds] = {name: defaultdict(list) for name in paths}
    for turn in range(rounds):
        # back and forth, so that a machine that warms up favours nobody
        for name in sorted(paths, reverse=bool(turn % 2)):
            for n in threads:
                rows = llama_bench(program, paths[name], prompt=prompt, generate=generate, threads=n)
                for what, value in rows.items():
                    found[name][n, what].append(value)
    return found


def _peaks(program: Path, paths: Mapping[str, Path], mmap: str, rounds: int) -> dict[str, list[float]]:
    """Peak resident MiB of loading and of one token, of every round."""
    peaks: dict[str, list[float]] = defaultdict(list)
    for _ in range(rounds):
        for name, path in paths.items():
            command = [str(program), "-m", str(path), "-p", "0", "-n", "1", "-r", "1", "-t", "1"]
            peaks[name].append(run([*command, "-lm", mmap]).peak_mib)
    return peaks


def _average(uniform: Sequence[Speeds]) -> Speeds:
    """Speed whose time per token is the mean of the uniform files' times: the mix has as many rows of each type."""
    rounds = {key: zip(*(speeds[key] for speeds in uniform), strict=True) for key in uniform[0]}
    return {key: [len(uniform) / sum(1 / speed for speed in one) for one in each] for key, each in rounds.items()}


@click.command()
@click.option("--layers", default=8, show_default=True, help="Blocks.")
@click.option("--experts", default=64, show_default=True, help="Experts of a block.")
@click.option("--used", default=8, show_default=True, help="Experts of a token.")
@click.option("--embd", default=1024, show_default=True, help="Hidden size.")
@click.option("--ff", default=1024, show_default=True, help="Hidden size of an expert.")
@click.option("--same", default="Q3_K", show_default=True, help="Type of all groups in the uniform file.")
@click.option("--mix", default="Q2_K,Q3_K,Q4_K", show_default=True, help="Types of the groups in the mixed file.")
@click.option("--threads", default="1,2", show_default=True, help="Numbers of threads.")
@click.option("--prompt", default=256, show_default=True, help="Tokens of prefill.")
@click.option("--generate", default=64, show_default=True, help="Tokens of decode.")
@click.option("--rounds", default=5, show_default=True, help="Runs of each, in turn.")
@click.option("--bench", type=click.Path(exists=True, path_type=Path), help="llama-bench to use (default: installed).")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def main(
    layers: int,
    experts: int,
    used: int,
    embd: int,
    ff: int,
    same: str,
    mix: str,
    threads: str,
    prompt: int,
    generate: int,
    rounds: int,
    bench: Path | None,
    as_json: bool,
) -> None:
    """Compare per-expert with stock files."""
    numbers = [int(n) for n in threads.split(",")]
    shape = Shape(layers, experts, embd, ff, used)
    ratios = measure(shape, same, mix, numbers, prompt, generate, rounds, bench)
    if as_json:
        print_json([ratio.as_dict() for ratio in ratios])
    else:
        click.echo(markdown(ratios))


if __name__ == "__main__":
    main()
