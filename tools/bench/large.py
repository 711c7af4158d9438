"""Time and peak memory of a large checkpoint on one machine, by its weights alone: inspect, sensitivity, plan, dry run.

The checkpoint is sparse (``tools.sparse_checkpoint``), 100 billion weights by default. ``--layers`` takes fewer:
time grows with them; what should not grow is memory.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import click

from mopeq_edge.cli.console import print_json
from tools.bench.measure import run
from tools.sparse_checkpoint import Size, write_sparse_checkpoint

PRE = ("--pre", "deepseek-v3")


@click.command()
@click.option("--layers", default=61, show_default=True)
@click.option("--experts", default=256, show_default=True)
@click.option("--sample-rows", default=4, show_default=True, help="Rows of each expert that are measured.")
@click.option("--types", default="k", show_default=True, help="Candidate types.")
@click.option("--bpw", default=3.5, show_default=True, help="Budget.")
@click.option("--keep", type=click.Path(path_type=Path), help="Folder for the model, used again if it is there.")
def main(layers: int, experts: int, sample_rows: int, types: str, bpw: float, keep: Path | None) -> None:
    """Run the data-free way on a sparse checkpoint; prints JSON."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = keep or Path(scratch)
        model, work = folder / "model", folder / "work-free"
        if not model.is_dir():
            write_sparse_checkpoint(model, Size(n_layer=layers, n_expert=experts, sample_rows=sample_rows))
        common = (*PRE, "--work-dir", str(work))
        measured = ("--quantize-with", "none", "--rows-only", "--sample-rows", str(sample_rows), "--types", types)
        steps = {
            "inspect": ("inspect", str(model), *PRE),
            "sensitivity": ("sensitivity", str(model), *measured, *common),
            "plan": ("plan", str(model), "--target-bpw", str(bpw), "--layout", "per-expert", "--types", types, *common),
            "dry run": ("emit", str(model), str(folder / "out.gguf"), "--dry-run", *common),
        }
        found = {}
        for name, arguments in steps.items():
            done = run([sys.executable, "-c", "from mopeq_edge.cli import main; main()", *arguments])
            found[name] = {"seconds": done.seconds, "cpu_seconds": done.cpu_seconds, "peak_mib": done.peak_mib}
        print_json({"layers": layers, "experts": experts, "steps": found})


if __name__ == "__main__":
    main()
