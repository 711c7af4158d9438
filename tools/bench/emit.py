"""Time and peak memory of ``emit`` against llama-quantize: same source, types and imatrix, same threads, in turn.

Both files must have the same tensors, byte for byte.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import click
import numpy as np

from mopeq_edge.cli.console import available_threads, print_json
from mopeq_edge.ggml.types import type_named
from mopeq_edge.gguf_file import read_header
from mopeq_edge.imatrix import Entry, Imatrix, write_imatrix
from mopeq_edge.plan.artifact import tensor_type_lines
from mopeq_edge.runtime.locate import tool
from mopeq_edge.source.file_bytes import read_bytes
from mopeq_edge.source.model import SourceTensor
from tools.bench.measure import Ratio, compared, in_turn, markdown
from tools.bench.models import Shape, write_random_olmoe

# A process of its own, like llama-quantize, so that start-up and memory are counted alike.
_OURS = """
import json, sys
from pathlib import Path
from mopeq_edge.emit import emit
from mopeq_edge.ggml.library import load_ggml
from mopeq_edge.ggml.types import type_named
from mopeq_edge.imatrix import read_imatrix
from mopeq_edge.progress import SilentProgress
from mopeq_edge.source.gguf import GGUFSource
source, chosen = GGUFSource(Path(sys.argv[1])), json.loads(Path(sys.argv[3]).read_text())
types = {t.name: type_named(chosen[t.name]) if t.name in chosen else t.type for t in source.tensors}
imatrix, threads, progress = read_imatrix(Path(sys.argv[4])), int(sys.argv[5]), SilentProgress()
emit(source, types, source.kvs, imatrix, load_ggml(), Path(sys.argv[2]), threads=threads, progress=progress)
"""

OLMOE = Shape(n_layer=4, n_expert=64, n_embd=2048, n_ff=1024, n_used=8, n_head=16)
"""A quarter of OLMoE-1B-7B's blocks: 1.70 B weights."""
TYPES = "Q3_K,Q4_K,Q6_K"


def ours(source: Path, out: Path, types: Path, imatrix: Path, threads: int) -> list[str]:
    """The command that writes ``out`` in ``types`` (a JSON object, by tensor)."""
    return [sys.executable, "-c", _OURS, str(source), str(out), str(types), str(imatrix), str(threads)]


def types_of(shape: Shape, kinds: str) -> dict[str, str]:
    """A stack in each of ``kinds`` in turn, all else in Q6_K."""
    names = [type_named(name).name for name in kinds.split(",")]
    found, n_stacks = {}, 0
    for tensor in shape.tensors(n_vocab=1):
        if tensor.quantizable:
            found[tensor.name] = "Q6_K" if tensor.projection is None else names[n_stacks % len(names)]
            n_stacks += tensor.projection is not None
    return found


def write_random_imatrix(path: Path, tensors: list[SourceTensor]) -> None:
    """Statistics of every matrix in a block."""
    rng = np.random.default_rng(0)
    entries = {}
    for tensor in tensors:
        if tensor.quantizable and tensor.layer is not None:
            sums = rng.exponential(size=(tensor.n_matrices, tensor.n_in)).astype(np.float32)
            entries[tensor.name] = Entry(sums, np.ones(tensor.n_matrices, dtype=np.float32))
    write_imatrix(Imatrix(entries, ("random",), 1, 512), path)


def measure(shape: Shape, kinds: str, rounds: int, threads: int) -> list[Ratio]:
    """Ratios of time and of memory."""
    with tempfile.TemporaryDirectory() as folder:
        names = ("source.gguf", "ours.gguf", "theirs.gguf", "types.json", "types.txt", "imatrix.gguf")
        source, mine, other, by_name, lines, imatrix = (Path(folder) / name for name in names)
        weights = write_random_olmoe(source, shape)
        write_random_imatrix(imatrix, shape.tensors(n_vocab=1))
        types = types_of(shape, kinds)
        by_name.write_text(json.dumps(types))
        lines.write_text(tensor_type_lines(types))
        theirs = [str(tool("llama-quantize")), "--imatrix", str(imatrix), "--tensor-type-file", str(lines)]
        commands = {
            "ours": ours(source, mine, by_name, imatrix, threads),
            "theirs": [*theirs, str(source), str(other), "Q4_K", str(threads)],
        }
        runs = in_turn(commands, rounds)
        require_same_tensors(mine, other)
    bench = f"emit, {weights / 1e9:.2f} B weights, llama-quantize"
    pair = (runs["ours"], runs["theirs"])
    return [
        compared(bench, "speed, wall time", *pair, "seconds", speed=True, target="≥ 1.0"),
        compared(bench, "speed, CPU time", *pair, "cpu_seconds", speed=True, target="≥ 1.0"),
        compared(bench, "peak memory", *pair, "peak_mib", target="≤ 0.5"),
        compared(bench, "peak memory without pages of files", *pair, "anonymous_mib", target="≤ 0.5"),
    ]


def require_same_tensors(one: Path, other: Path) -> None:
    """Exit with the first tensor that differs in type or in a byte."""
    first, second = read_header(one), read_header(other)
    theirs = {info.name: info for info in second.tensors}
    for info in first.tensors:
        same = theirs[info.name]
        if same.type is info.type and same.nbytes == info.nbytes:
            ends = ((one, first.data_start + info.offset), (other, second.data_start + same.offset))
            mine, their = (read_bytes(path, start, info.nbytes) for path, start in ends)
            if np.array_equal(mine, their):
                continue
        raise SystemExit(f"tensor '{info.name}' is not the same in both files: {info.type.name}, {same.type.name}")


@click.command()
@click.option("--layers", default=OLMOE.n_layer, show_default=True, help="Blocks.")
@click.option("--experts", default=OLMOE.n_expert, show_default=True, help="Experts of a block.")
@click.option("--embd", default=OLMOE.n_embd, show_default=True, help="Hidden size.")
@click.option("--ff", default=OLMOE.n_ff, show_default=True, help="Hidden size of an expert.")
@click.option("--types", default=TYPES, show_default=True, help="Types of the stacks, in turn; all else is Q6_K.")
@click.option("--rounds", default=3, show_default=True, help="Runs of each, in turn.")
@click.option("--threads", type=int, default=available_threads, help="Threads of each (default: every CPU).")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def main(layers: int, experts: int, embd: int, ff: int, types: str, rounds: int, threads: int, as_json: bool) -> None:
    """Compare emit with llama-quantize on a random-weight model."""
    ratios = measure(Shape(layers, experts, embd, ff, n_used=8, n_head=16), types, rounds, threads)
    if as_json:
        print_json([ratio.as_dict() for ratio in ratios])
    else:
        click.echo(markdown(ratios))


if __name__ == "__main__":
    main()
