"""Time of ``sensitivity`` and ``plan`` for eight candidate types against that of one ``emit`` of their plan.

All are the commands, from Python's start to the files, in turn. The statistics are llama-imatrix's or ours, of a little
text: what they are does not change how long anything takes.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import click

from mopeq_edge.cli.console import available_threads, print_json
from tools.bench.calibrate import PROGRAM, VOCABULARY, ours
from tools.bench.checkpoints import write_olmoe_checkpoint
from tools.bench.measure import Ratio, Run, compared, in_turn, markdown, run
from tools.bench.models import Shape

EIGHT = "IQ2_XXS,Q2_K,IQ3_XXS,Q3_K,IQ4_XS,Q4_K,Q5_K,Q6_K"


def measure(shape: Shape, types: str, sample_rows: str, bpw: float, rounds: int, threads: int) -> list[Ratio]:
    """Ratios of time, and of memory to the checkpoint's bytes."""
    with tempfile.TemporaryDirectory() as folder:
        model, work, out = Path(folder) / "model", Path(folder) / "work", Path(folder) / "out.gguf"
        nbytes = write_olmoe_checkpoint(model, shape, VOCABULARY)
        run(ours(model, work, 64, 2, threads, fisher=True))
        common = [str(model), "--work-dir", str(work), "--pre", "gpt-2", "--threads", str(threads)]
        commands = {
            "sensitivity": [*PROGRAM, "sensitivity", *common, "--types", types, "--sample-rows", sample_rows],
            "plan": [*PROGRAM, "plan", *common[:-2], "--types", types, "--target-bpw", str(bpw)],
            "emit": [*PROGRAM, "emit", str(model), str(out), *common[1:]],
        }
        # a plan is there from the first round on
        for name in ("sensitivity", "plan"):
            run(commands[name])

        def forget(name: str) -> None:
            if name == "sensitivity":
                for path in work.glob("sensitivity-*"):
                    path.unlink()

        runs = in_turn(commands, rounds, forget)
    both = [together(a, b) for a, b in zip(runs["sensitivity"], runs["plan"], strict=True)]
    n_types = len(types.split(","))
    bench = (
        f"sensitivity + plan of {n_types} types, rows {sample_rows}, {nbytes / 2e9:.2f} B weights, emit at {bpw} bpw"
    )
    pair = (both, runs["emit"])
    return [
        compared(bench, "time, wall", *pair, "seconds", target="≤ 1.0"),
        compared(bench, "time, CPU", *pair, "cpu_seconds", target="≤ 1.0"),
        compared(bench, "peak memory", *pair, "peak_mib", target=""),
    ]


def together(first: Run, second: Run) -> Run:
    """One run after the other, as one."""
    return Run(
        first.seconds + second.seconds,
        first.cpu_seconds + second.cpu_seconds,
        max(first.peak_mib, second.peak_mib),
        max(first.anonymous_mib, second.anonymous_mib),
    )


@click.command()
@click.option("--layers", default=4, show_default=True, help="Blocks in the shape of OLMoE-1B-7B's.")
@click.option("--types", default=EIGHT, show_default=True, help="Candidate types.")
@click.option("--sample-rows", default="auto", show_default=True, help="As of the command.")
@click.option("--bpw", default=4.0, show_default=True, help="Bits per weight of the plan.")
@click.option("--rounds", default=2, show_default=True, help="Runs of each, in turn.")
@click.option("--threads", type=int, default=available_threads, help="Threads of each (default: every CPU).")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def main(layers: int, types: str, sample_rows: str, bpw: float, rounds: int, threads: int, as_json: bool) -> None:
    """Compare sensitivity and plan with emit on a random-weight model."""
    ratios = measure(Shape(layers, 64, 2048, 1024, 8, 16), types, sample_rows, bpw, rounds, threads)
    if as_json:
        print_json([ratio.as_dict() for ratio in ratios])
    else:
        click.echo(markdown(ratios))


if __name__ == "__main__":
    main()
