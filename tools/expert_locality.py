"""Which experts a text touches, and how much of the file that is: a working-set curve over tokens.

llama-imatrix runs the text in short chunks and leaves its counts after each; differences are what one chunk touched.
An expert that no token was routed to is never read, so its pages need not be in memory. What the page cache holds of
the file now is asked with mincore.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import re
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import numpy.typing as npt

from mopeq_edge.expert_groups.read import read_groups
from mopeq_edge.gguf_file import GGUFHeader, read_header
from mopeq_edge.runtime.locate import tool

Counts = Mapping[str, npt.NDArray[np.float32]]
"""Tokens by expert [n_expert] of each stack, by the stack's name."""


@dataclass(frozen=True)
class Point:
    """After ``tokens`` tokens: shares of experts and of the experts' bytes that were ever touched, and in the chunk."""

    tokens: int
    experts: float
    nbytes: int
    chunk_experts: float
    chunk_bytes: int


def expert_bytes(header: GGUFHeader) -> dict[str, npt.NDArray[np.int64]]:
    """Bytes of every expert [n_expert] of each stack; in groups they differ."""
    found: dict[str, npt.NDArray[np.int64]] = {}
    for info in header.tensors:
        if re.search(r"_exps\.weight$", info.name) and len(info.shape) == 3:
            found[info.name] = np.full(info.shape[2], info.nbytes // info.shape[2], dtype=np.int64)
    for stack in read_groups(header):
        n_in, n_out, n_expert = stack.shape
        sizes = np.zeros(n_expert, dtype=np.int64)
        for group in stack.groups:
            sizes[list(group.experts)] = group.type.nbytes(n_in * n_out)
        found[stack.name] = sizes
    return found


def curve(steps: Sequence[Counts], sizes: Mapping[str, npt.NDArray[np.int64]], chunk: int) -> list[Point]:
    """The working set after each chunk of ``chunk`` tokens; ``steps`` are counts since the start."""
    points = []
    total = sum(len(size) for size in sizes.values())
    before: Counts = {}
    for number, counts in enumerate(steps, start=1):
        touched = {name: counts[name] > 0 for name in sizes}
        now = {name: counts[name] > before[name] if name in before else touched[name] for name in sizes}
        before = counts
        points.append(
            Point(
                number * chunk,
                sum(int(t.sum()) for t in touched.values()) / total,
                sum(int(sizes[name][t].sum()) for name, t in touched.items()),
                sum(int(t.sum()) for t in now.values()) / total,
                sum(int(sizes[name][t].sum()) for name, t in now.items()),
            )
        )
    return points


def count_experts(model: Path, text: Path, chunk: int, n_chunks: int, threads: int) -> list[Counts]:
    """Counts after each chunk, from llama-imatrix."""
    with tempfile.TemporaryDirectory() as folder:
        command = [str(tool("llama-imatrix")), "-m", str(model), "-f", str(text), "-o", f"{folder}/imatrix.gguf"]
        command += ["-c", str(chunk), "-b", str(chunk), "--chunks", str(n_chunks), "--save-frequency", "1"]
        command += ["--no-ppl", "-t", str(threads)]
        subprocess.run(command, check=True, capture_output=True)
        saved: dict[int, Path] = {}
        for path in Path(folder).iterdir():
            match = re.search(r"\.at_(\d+)", path.name)
            if match:
                saved[int(match[1])] = path
        # a copy is saved when the first matrix of its chunk is met: it has the chunks before
        steps = [_counts(saved[number]) for number in sorted(saved) if number > 1]
        return [*steps, _counts(Path(folder) / "imatrix.gguf")]


def _counts(path: Path) -> Counts:
    header = read_header(path)
    found = {}
    with path.open("rb") as file:
        for info in header.tensors:
            name = info.name.removesuffix(".counts")
            if name != info.name and name.endswith("_exps.weight"):
                file.seek(header.data_start + info.offset)
                found[name] = np.frombuffer(file.read(info.nbytes), dtype="<f4")
    return found


def cached_bytes(path: Path) -> int | None:
    """Bytes of ``path`` that the page cache holds (Linux, macOS); None where mincore cannot say."""
    size = path.stat().st_size
    pages = -(-size // mmap.PAGESIZE)
    states = (ctypes.c_ubyte * pages)()
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as view:
        start = ctypes.addressof(ctypes.c_char.from_buffer(view))
        try:
            status = ctypes.CDLL(None, use_errno=True).mincore(
                ctypes.c_void_p(start), ctypes.c_size_t(size), ctypes.byref(states)
            )
        except AttributeError:
            return None
    if status != 0:
        return None
    pages_in = int(np.count_nonzero(np.frombuffer(states, dtype=np.uint8) & 1))
    return min(size, pages_in * mmap.PAGESIZE)


@click.command()
@click.argument("model", type=click.Path(exists=True, path_type=Path))
@click.argument("text", type=click.Path(exists=True, path_type=Path))
@click.option("--chunk", default=64, show_default=True, help="Tokens of a chunk, each with a context of its own.")
@click.option("--chunks", default=32, show_default=True, help="Number of chunks.")
@click.option("--threads", default=1, show_default=True, help="CPU threads.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def main(model: Path, text: Path, chunk: int, chunks: int, threads: int, as_json: bool) -> None:
    """Working set of MODEL's experts over the tokens of TEXT."""
    header = read_header(model)
    sizes = expert_bytes(header)
    points = curve(count_experts(model, text, chunk, chunks, threads), sizes, chunk)
    experts = sum(int(size.sum()) for size in sizes.values())
    result: dict[str, Any] = {
        "file_bytes": header.file_size,
        "expert_bytes": experts,
        "cached_bytes": cached_bytes(model),
        "points": [asdict(point) for point in points],
    }
    if as_json:
        click.echo(json.dumps(result, indent=1))
        return
    click.echo(f"{header.file_size:,} bytes, experts {experts:,}; in the page cache {result['cached_bytes'] or 0:,}")
    click.echo(
        "| tokens | experts touched | of the experts' bytes | in this chunk | of the experts' bytes |\n"
        "|---|---|---|---|---|"
    )
    for point in points:
        click.echo(
            f"| {point.tokens} | {point.experts:.3f} | {point.nbytes / experts:.3f} "
            f"| {point.chunk_experts:.3f} | {point.chunk_bytes / experts:.3f} |"
        )


if __name__ == "__main__":
    main()
