"""Whether a model runs in the memory that is predicted for it: llama-server under a hard limit (Linux).

The limit is RLIMIT_DATA: all memory of the process that is not a file's. RLIMIT_AS would count mapped weights too, be
they in memory or not. Weights are read, not mapped, so that they fall under the limit. What is allocated but never
touched counts as well, so threads get small stacks and malloc one arena.
"""

from __future__ import annotations

import os
import random
import resource
import tempfile
from pathlib import Path

import click

from mopeq_edge.memory.command import arguments
from mopeq_edge.memory.model import model_of_gguf
from mopeq_edge.memory.predict import ANONYMOUS, predict
from mopeq_edge.memory.repack import this_cpu
from mopeq_edge.memory.settings import CACHE_TYPES, Settings
from mopeq_edge.memory.verdict import judge
from mopeq_edge.runtime.locate import tool
from mopeq_edge.split import read_parts
from tools.llama_server import ServerError, serving

STACK = 512 * 1024


def answers(path: Path, settings: Settings, limit: int, n_prompt: int, architecture: str) -> str | None:
    """None if llama-server loads and answers with at most ``limit`` bytes of its own, else what it said."""

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_STACK, (STACK, STACK))
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
        os.nice(5)

    options = [*arguments(settings), "--fit", "off", "--cache-ram", "0", "--ctx-checkpoints", "0"]
    options += ["--override-kv", f"{architecture}.context_length=int:131072"]
    draw = random.Random(0)
    before = os.environ.get("MALLOC_ARENA_MAX")
    os.environ["MALLOC_ARENA_MAX"] = "1"
    try:
        with tempfile.TemporaryDirectory() as folder:
            with serving(
                tool("llama-server"), ["-m", str(path), *options], Path(folder) / "log", preexec=limited
            ) as server:
                reply = server.complete([draw.randrange(8, 4000) for _ in range(n_prompt)], n_predict=8)
            return None if reply["tokens_predicted"] > 0 else "answered nothing"
    except (ServerError, OSError) as error:
        return str(error)
    finally:
        if before is None:
            del os.environ["MALLOC_ARENA_MAX"]


@click.command()
@click.argument("model", type=click.Path(exists=True, path_type=Path))
@click.option("--ctx", default=2048, show_default=True, help="Context, all of which is filled.")
@click.option("--cache-type", type=click.Choice(list(CACHE_TYPES)), default="f16", help="Type of K and V.")
@click.option("--threads", default=2, show_default=True, help="CPU threads.")
@click.option("--share", "shares", type=float, multiple=True, default=(1.05, 0.8), help="Of what is predicted.")
def main(model: Path, ctx: int, cache_type: str, threads: int, shares: tuple[float, ...]) -> None:
    """Run MODEL in several shares of its predicted memory."""
    kind = CACHE_TYPES[cache_type]
    settings = Settings(ctx=ctx, parallel=1, cache_type_k=kind, cache_type_v=kind, mmap=False, threads=threads)
    found = model_of_gguf(read_parts(model))
    prediction = predict(found, settings, this_cpu())
    own = prediction.total(ANONYMOUS)
    click.echo(f"predicted: {own:,} bytes of its own, {prediction.host:,} with the program's pages")
    for share in shares:
        verdict = judge(prediction, int(prediction.peak * share))
        said = answers(model, settings, int(own * share), ctx - 16, found.hparams.architecture)
        outcome = "runs" if said is None else f"fails: {said[:160]}"
        click.echo(f"{share:.2f} of it: predicted '{verdict.word}', {outcome}")


if __name__ == "__main__":
    main()
