"""Predicted against measured memory of llama-server, over models and settings.

Each setting is started, its context filled with prompts of random tokens, and the process sampled (Linux). llama.cpp's
own lines about its buffers are compared too: they are printed to a hundredth of a MiB.
"""

from __future__ import annotations

import os
import random
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from mopeq_edge.cli.console import print_json
from mopeq_edge.memory.command import arguments
from mopeq_edge.memory.model import Model, model_of_gguf
from mopeq_edge.memory.predict import ANONYMOUS, CACHE, COMPUTE, MAPPED, OUTPUT, Prediction, predict
from mopeq_edge.memory.repack import this_cpu
from mopeq_edge.memory.settings import CACHE_TYPES, Settings
from mopeq_edge.runtime.locate import tool
from mopeq_edge.split import read_parts
from tools.llama_server import buffers, serving
from tools.process_memory import Sampler, peaks

MIB = 2**20
RELATIVE, ABSOLUTE = 0.03, 20_000_000
"""What counts as right: an error below the larger of the two (bytes)."""


@dataclass(frozen=True)
class Case:
    """One setting of one model, by the name of its file."""

    model: str
    ctx: int
    parallel: int = 1
    cache: str = "f16"
    mmap: bool = True
    repack: bool = True
    flash: bool = True
    ubatch: int = 512
    unified: bool = False

    def settings(self, threads: int) -> Settings:
        kind = CACHE_TYPES[self.cache]
        return Settings(
            ctx=self.ctx,
            parallel=self.parallel,
            unified=self.unified,
            cache_type_k=kind,
            cache_type_v=kind,
            mmap=self.mmap,
            repack=self.repack,
            flash_attn=self.flash,
            ubatch=self.ubatch,
            threads=threads,
        )


CASES = (
    Case("tiny", 512),
    Case("tiny", 4096, parallel=4, cache="q8_0"),
    Case("tiny", 8192, cache="q4_0", mmap=False),
    Case("tiny", 32768),
    Case("tiny-groups", 2048, cache="q8_0"),
    Case("tiny-groups", 16384, parallel=4, mmap=False),
    Case("olmoe", 512),
    Case("olmoe", 4096),
    Case("olmoe", 4096, parallel=4, cache="q8_0", mmap=False),
    Case("olmoe", 4096, cache="q4_0", repack=False),
    Case("olmoe-groups", 2048),
    Case("olmoe-groups", 4096, parallel=4, cache="q8_0"),
    Case("olmoe-groups", 4096, cache="q4_0", mmap=False),
    Case("gpt-oss", 1024),
    Case("gpt-oss", 8192, parallel=4, unified=True),
    Case("gpt-oss", 8192, cache="q8_0", mmap=False),
    Case("gpt-oss", 2048, flash=False, ubatch=256),
)


def measure(program: Path, path: Path, model: Model, settings: Settings, found: Prediction) -> dict[str, Any]:
    """Peaks of the process in bytes by kind, and llama.cpp's own figures."""
    samplers: list[Sampler] = []
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        options = [*arguments(settings), "--fit", "off", "--cache-ram", "0", "--ctx-checkpoints", "0"]
        # a slot has no more than the context that the model says it was trained with
        options += ["--override-kv", f"{model.hparams.architecture}.context_length=int:131072"]
        with serving(
            program, ["-m", str(path), *options], log, started=lambda pid: samplers.append(Sampler(pid))
        ) as server:
            draw = random.Random(0)
            each = found.resolved.n_ctx // found.resolved.n_seq - 16
            limit = min(4000, model.hparams.n_vocab)
            prompts = [[draw.randrange(8, limit) for _ in range(each)] for _ in range(found.resolved.n_seq)]
            server.complete_all(prompts)
            samples = samplers[0].stop()
        text = log.read_text(errors="replace")
    return {**peaks(samples), "buffers": buffers(text)}


def compare(case: Case, folder: Path, program: Path, threads: int) -> dict[str, Any]:
    """A row: settings, predicted and measured bytes, error."""
    path = folder / f"{case.model}.gguf"
    model, settings = model_of_gguf(read_parts(path)), case.settings(threads)
    found = predict(model, settings, this_cpu())
    got = measure(program, path, model, settings, found)
    predicted = {"anon": found.total(ANONYMOUS), "file": found.total(MAPPED), "rss": found.peak}
    error = predicted["rss"] - got["rss"]
    says = {kind: sum(size for _, size in got["buffers"][kind]) for kind in ("kv", "compute", "output")}
    ours = {"kv": found.nbytes(CACHE), "compute": found.nbytes(COMPUTE), "output": found.nbytes(OUTPUT)}
    return {
        "case": case.__dict__,
        "file_bytes": model.file_bytes,
        "predicted": predicted,
        "measured": {kind: got[kind] for kind in ("anon", "file", "rss", "pss", "swap", "major_faults")},
        "error": error,
        "relative_error": error / got["rss"],
        "right": abs(error) < max(ABSOLUTE, RELATIVE * got["rss"]),
        "buffers_mib": {kind: {"llama.cpp": says[kind], "ours": round(ours[kind] / MIB, 2)} for kind in says},
        # each of llama.cpp's figures is rounded; a cache with sliding windows has two
        "buffers_agree": all(abs(says[kind] - ours[kind] / MIB) < 0.0101 for kind in says),
    }


def _line(row: dict[str, Any]) -> str:
    case = row["case"]
    extra = [name for name in ("mmap", "repack", "flash") if not case[name]]
    what = ", ".join(
        [
            *(f"no {name}" for name in extra),
            *(["unified"] if case["unified"] else []),
            *([f"ubatch {case['ubatch']}"] if case["ubatch"] != 512 else []),
        ]
    )
    mb = {key: row[key]["rss"] / 1e6 for key in ("predicted", "measured")}
    anon = {key: row[key]["anon"] / 1e6 for key in ("predicted", "measured")}
    agree = "yes" if row["buffers_agree"] else "NO"
    return (
        f"| {case['model']} | {case['ctx']} | {case['parallel']} | {case['cache']} | {what or '-'} "
        f"| {mb['predicted']:.1f} | {mb['measured']:.1f} | {row['error'] / 1e6:+.1f} "
        f"| {100 * row['relative_error']:+.2f} % "
        f"| {anon['predicted']:.1f} | {anon['measured']:.1f} | {agree} |"
    )


HEADER = (
    "| model | context | parallel | cache | other | predicted, MB | measured, MB | error, MB | error "
    "| anonymous, predicted | measured | buffers agree |"
)


@click.command()
@click.argument("folder", type=click.Path(exists=True, path_type=Path))
@click.option("--threads", default=2, show_default=True, help="Threads of llama-server.")
@click.option("--only", multiple=True, help="Only models of this name.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def main(folder: Path, threads: int, only: Sequence[str], as_json: bool) -> None:
    """Compare prediction and measurement on the models of tools.memory_models in FOLDER."""
    os.nice(5)
    program = tool("llama-server")
    rows = []
    if not as_json:
        click.echo(f"{HEADER}\n|{'---|' * 12}")
    for case in CASES:
        if only and case.model not in only:
            continue
        rows.append(compare(case, folder, program, threads))
        if not as_json:
            click.echo(_line(rows[-1]))
    if as_json:
        print_json(rows)
        return
    click.echo(f"{sum(row['right'] for row in rows)} of {len(rows)} within 3 % or 20 MB")


if __name__ == "__main__":
    main()
