"""Time and memory of ``calibrate`` against llama-imatrix: same weights, same text, same threads, in turn.

llama-imatrix reads a GGUF of each type that it is asked for; the fastest of them is the peer. Ours is the command, from
Python's start to the files, with the hash of the checkpoint; once for imatrix statistics, once with ``--fisher``.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from pathlib import Path

import click

from converters import CONVERTERS
from mopeq_edge.cli.console import available_threads, print_json
from mopeq_edge.emit import emit
from mopeq_edge.ggml.library import load_ggml
from mopeq_edge.ggml.types import type_named
from mopeq_edge.progress import SilentProgress
from mopeq_edge.runtime.locate import tool
from mopeq_edge.source.huggingface import open_huggingface
from tools.bench.checkpoints import write_olmoe_checkpoint
from tools.bench.measure import Ratio, compared, in_turn, markdown
from tools.bench.models import EXAMPLE, Shape

PROGRAM = [sys.executable, "-c", "from mopeq_edge.cli import main; main()"]
VOCABULARY = 4096
"""Tokens of the bundled tokenizer."""
TEXT = EXAMPLE / "calibration.txt"


def ours(model: Path, work: Path, window: int, chunks: int, threads: int, *, fisher: bool) -> list[str]:
    """The calibrate command."""
    text = ["--text", str(TEXT), "--window", str(window), "--chunks", str(chunks), "--pre", "gpt-2"]
    passes = "--fisher" if fisher else "--no-fisher"
    return [*PROGRAM, "calibrate", str(model), "--work-dir", str(work), *text, "--threads", str(threads), passes]


def write_gguf(model: Path, path: Path, kind: str, threads: int) -> None:
    """The checkpoint as a GGUF with all matrices in ``kind``."""
    source, ggml = open_huggingface(model, CONVERTERS, pre="gpt-2"), load_ggml()
    types = {t.name: type_named(kind) if t.quantizable else t.type for t in source.tensors}
    emit(source, types, source.kvs, None, ggml, path, threads=threads, progress=SilentProgress())


def measure(shape: Shape, kinds: str, window: int, chunks: int, rounds: int, threads: int) -> list[Ratio]:
    """Ratios of time and of memory, to the type that llama-imatrix is fastest with."""
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        nbytes = write_olmoe_checkpoint(model, shape, VOCABULARY)
        commands: dict[str, list[str]] = {}
        for kind in kinds.split(","):
            path = Path(folder) / f"{kind}.gguf"
            write_gguf(model, path, kind, threads)
            text = ["-m", str(path), "-f", str(TEXT), "-o", f"{folder}/{kind}.imatrix.gguf", "--no-ppl"]
            sizes = ["-c", str(window), "--chunks", str(chunks), "-t", str(threads)]
            commands[kind] = [str(tool("llama-imatrix")), *text, *sizes]
        for name, fisher in (("imatrix", False), ("fisher", True)):
            commands[name] = ours(model, Path(folder) / name, window, chunks, threads, fisher=fisher)

        def forget(name: str) -> None:
            # or the finished stage would be reused; the hashes stay
            for path in (Path(folder) / name).glob("stages.json"):
                path.unlink()

        runs = in_turn(commands, rounds, forget)
    peer = min(kinds.split(","), key=lambda kind: statistics.median(run.cpu_seconds for run in runs[kind]))
    tokens = f"{nbytes / 2e9:.2f} B weights, {chunks} x {window} tokens"
    found = []
    for name, most, said in (("imatrix", "≥ 0.8", "imatrix only"), ("fisher", "≥ 0.25", "with Fisher")):
        bench, pair = f"calibrate, {said}, {tokens}, llama-imatrix ({peer})", (runs[name], runs[peer])
        found += [
            compared(bench, "speed, wall time", *pair, "seconds", speed=True, target=most),
            compared(bench, "speed, CPU time", *pair, "cpu_seconds", speed=True, target=most),
            compared(bench, "peak memory", *pair, "peak_mib", target=""),
            compared(bench, "peak memory without pages of files", *pair, "anonymous_mib", target=""),
        ]
    return found


@click.command()
@click.option("--layers", default=2, show_default=True, help="Blocks in the shape of OLMoE-1B-7B's.")
@click.option("--types", default="BF16,F16", show_default=True, help="Types of llama-imatrix's GGUF files.")
@click.option("--window", default=512, show_default=True, help="Tokens of one window.")
@click.option("--chunks", default=16, show_default=True, help="Windows.")
@click.option("--rounds", default=3, show_default=True, help="Runs of each, in turn.")
@click.option("--threads", type=int, default=available_threads, help="Threads of each (default: every CPU).")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def main(layers: int, types: str, window: int, chunks: int, rounds: int, threads: int, as_json: bool) -> None:
    """Compare calibrate with llama-imatrix on a random-weight model."""
    ratios = measure(Shape(layers, 64, 2048, 1024, 8, 16), types, window, chunks, rounds, threads)
    if as_json:
        print_json([ratio.as_dict() for ratio in ratios])
    else:
        click.echo(markdown(ratios))


if __name__ == "__main__":
    main()
