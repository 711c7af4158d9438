"""Memory of a program over time: resident memory by kind, PSS, page faults, swap, GPU memory (Linux).

Any command, or llama-server with prompts of random tokens:

    python -m tools.memory_profile -o profile.json --plot profile.png -- llama-bench -m out.gguf
    python -m tools.memory_profile --server out.gguf --prompt 500 --prompt 2000 -- --ctx-size 4096 --parallel 1
"""

from __future__ import annotations

import json
import random
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from mopeq_edge.gguf_file import read_header
from mopeq_edge.runtime.locate import tool
from tools.llama_server import buffers, serving
from tools.process_memory import Sample, Sampler, peaks

KINDS = {"anon": "anonymous", "file": "pages of files", "shmem": "shared", "swap": "swapped out"}


def of_command(command: Sequence[str], *, gpu: bool) -> tuple[list[Sample], dict[str, Any]]:
    """Samples of one program until it ends."""
    process = subprocess.Popen(list(command), stdout=subprocess.DEVNULL)
    sampler = Sampler(process.pid, gpu=gpu)
    status = process.wait()
    return sampler.stop(), {"command": list(command), "status": status}


def of_server(
    model: Path, prompts: Sequence[int], options: Sequence[str], *, gpu: bool
) -> tuple[list[Sample], dict[str, Any]]:
    """Samples of llama-server from its start through prompts of so many random tokens, one after the other."""
    tokens = read_header(model).get("tokenizer.ggml.tokens") or []
    samplers: list[Sampler] = []
    marks: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        arguments = ["-m", str(model), *options]
        program = tool("llama-server")
        with serving(program, arguments, log, started=lambda pid: samplers.append(Sampler(pid, gpu=gpu))) as server:
            marks.append({"what": "ready", "seconds": samplers[0].samples[-1].seconds})
            draw = random.Random(0)
            for n in prompts:
                server.complete([draw.randrange(8, min(4000, len(tokens))) for _ in range(n)])
                marks.append({"what": f"{n} tokens", "seconds": samplers[0].samples[-1].seconds})
            samples = samplers[0].stop()
        said = buffers(log.read_text(errors="replace"))
    return samples, {"command": [str(program), *arguments], "marks": marks, "buffers_mib": said}


def plot(samples: Sequence[Sample], marks: Sequence[dict[str, Any]], path: Path) -> None:
    """Resident memory by kind over time, with the peak's parts."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 4.5))
    seconds = [s.seconds for s in samples]
    axes.stackplot(
        seconds, *([getattr(s, kind) / 1e6 for s in samples] for kind in KINDS), labels=KINDS.values(), alpha=0.8
    )
    with_pss = [s for s in samples if s.pss is not None]
    axes.plot([s.seconds for s in with_pss], [(s.pss or 0) / 1e6 for s in with_pss], "k:", label="PSS")
    top = max(samples, key=lambda s: s.rss)
    parts = ", ".join(f"{KINDS[kind]} {getattr(top, kind) / 1e6:.0f}" for kind in KINDS if getattr(top, kind))
    axes.annotate(f"peak {top.rss / 1e6:.0f} MB: {parts}", (top.seconds, top.rss / 1e6), fontsize=8, ha="right")
    for mark in marks:
        axes.axvline(mark["seconds"], color="gray", lw=0.7)
        axes.text(mark["seconds"], 0, mark["what"], rotation=90, fontsize=7, va="bottom", ha="right")
    axes.set(xlabel="seconds", ylabel="MB (1e6 bytes)")
    axes.legend(loc="upper left", fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


@click.command(context_settings={"ignore_unknown_options": True})
@click.option("--server", type=click.Path(exists=True, path_type=Path), help="Start llama-server with this model.")
@click.option("--prompt", "prompts", type=int, multiple=True, help="With --server: a prompt of so many tokens.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="JSON file (default: stdout).")
@click.option("--plot", "picture", type=click.Path(path_type=Path), help="Picture of the time line.")
@click.option("--gpu", is_flag=True, help="Ask nvidia-smi too.")
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def main(
    server: Path | None,
    prompts: tuple[int, ...],
    output: Path | None,
    picture: Path | None,
    gpu: bool,
    arguments: tuple[str, ...],
) -> None:
    """Profile the command ARGUMENTS, or llama-server with them as options."""
    if server is None and not arguments:
        raise click.UsageError("give a command after --, or --server MODEL")
    samples, about = (
        of_command(arguments, gpu=gpu) if server is None else of_server(server, prompts, arguments, gpu=gpu)
    )
    if not samples:
        raise click.ClickException("the program ended before it could be sampled")
    found = {**about, "peaks_bytes": peaks(samples), "samples": [asdict(s) for s in samples]}
    if picture is not None:
        plot(samples, about.get("marks", ()), picture)
    if output is not None:
        output.write_text(json.dumps(found, indent=1))
        top = found["peaks_bytes"]
        click.echo(
            f"peak {top['rss'] / 1e6:.1f} MB: anonymous {top['at_peak']['anon'] / 1e6:.1f}, "
            f"pages of files {top['at_peak']['file'] / 1e6:.1f}; {top['major_faults']} major faults"
        )
        return
    click.echo(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
