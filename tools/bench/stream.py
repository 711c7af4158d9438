"""Whether a model larger than memory can be measured: calibrate and sensitivity within a third of its bytes.

Writes a random OLMoE checkpoint, several times larger than torch itself, and runs each stage in a process of its own
that has no more memory than that, file cache included, where a control group can be made (root). Prints the peak
resident memory of each, program code included, as a share of the checkpoint, and what of it was allocated.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import click

from mopeq_edge.cli.console import available_threads, print_json
from tools.bench.checkpoints import write_olmoe_checkpoint
from tools.bench.measure import run
from tools.bench.memory_group import memory_group
from tools.bench.models import EXAMPLE, Shape

_PROGRAM = [sys.executable, "-c", "from mopeq_edge.cli import main; main()"]
_BASELINE = [sys.executable, "-c", "import torch, transformers; from transformers import AutoModelForCausalLM"]


@click.command()
@click.option("--layers", default=16, show_default=True, help="Blocks.")
@click.option("--experts", default=64, show_default=True, help="Experts of a block.")
@click.option("--used", default=8, show_default=True, help="Experts of a token.")
@click.option("--embd", default=1024, show_default=True, help="Hidden size.")
@click.option("--ff", default=512, show_default=True, help="Hidden size of an expert.")
@click.option("--vocab", default=50304, show_default=True, help="Rows of embedding and output.")
@click.option("--ctx", default=512, show_default=True, help="Tokens of one window.")
@click.option("--chunks", default=4, show_default=True, help="Windows.")
@click.option("--share", default=1 / 3, help="Memory allowed, as a share of the checkpoint (default: a third).")
@click.option("--types", default="Q4_K", show_default=True, help="Types that sensitivity tries.")
@click.option("--sample-rows", default=64, show_default=True, help="Rows of each expert that sensitivity measures.")
@click.option("--trace", is_flag=True, help="Also two probes of --trace on one window.")
@click.option("--threads", default=available_threads, help="Threads (default: every CPU).")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def main(
    layers: int,
    experts: int,
    used: int,
    embd: int,
    ff: int,
    vocab: int,
    ctx: int,
    chunks: int,
    share: float,
    types: str,
    sample_rows: int,
    trace: bool,
    threads: int,
    as_json: bool,
) -> None:
    """Run calibrate and sensitivity on a checkpoint that is larger than the memory allowed."""
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        nbytes = write_olmoe_checkpoint(model, Shape(layers, experts, embd, ff, used, n_head=embd // 64), vocab)
        common = [str(model), "--work-dir", f"{folder}/work", "--threads", str(threads)]
        text = ["--text", str(EXAMPLE / "calibration.txt"), "--window", str(ctx), "--chunks", str(chunks)]
        traced = ["--trace", "--probes", "2", "--trace-chunks", "1"]
        sensitivity = ["sensitivity", *common, "--types", types, "--sample-rows", str(sample_rows)]
        stages = {
            "calibrate": [*_PROGRAM, "calibrate", *common, *text, *(traced if trace else [])],
            "sensitivity": [*_PROGRAM, *sensitivity],
        }
        limit = int(share * nbytes)
        baseline = run(_BASELINE).peak_mib
        result: dict[str, Any] = {"checkpoint_bytes": nbytes, "baseline_mib": baseline}
        with memory_group(limit) as group:
            result["limit_bytes"] = None if group is None else limit
            for name, command in stages.items():
                found = run(command, group)
                shares = {"share": found.peak_mib * 2**20 / nbytes, "anonymous_mib": found.anonymous_mib}
                result[name] = {"seconds": found.seconds, "peak_mib": found.peak_mib, **shares}
    if as_json:
        print_json(result)
        return
    held = "no limit" if result["limit_bytes"] is None else f"limit {limit:,} bytes"
    click.echo(f"checkpoint {nbytes:,} bytes, {held}, {threads} threads; torch alone {baseline:.0f} MiB")
    for name in stages:
        stage = result[name]
        of_checkpoint = f"{stage['share']:.3f} of the checkpoint"
        allocated = f"{stage['anonymous_mib']:.0f} MiB of it allocated"
        click.echo(
            f"{name:<12} {stage['seconds']:7.1f} s  {stage['peak_mib']:7.0f} MiB peak, {of_checkpoint}, {allocated}"
        )


if __name__ == "__main__":
    main()
