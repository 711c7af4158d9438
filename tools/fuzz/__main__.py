"""``python -m tools.fuzz TARGET --seconds N``: guided by coverage with atheris where it is installed, else blindly.

Every target starts from the seeds of ``tools.fuzz.seeds``. What is found is left as a file in ``--found``: a call that
ended in anything but a MopeqError of one line, took more than five seconds or 2 GiB.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import time
from importlib import import_module
from pathlib import Path
from tempfile import mkdtemp

TARGETS = ("artifacts", "config", "gguf", "imatrix", "index", "plan", "safetensors", "tokenizer", "torch", "vision")
"""Names in ``tools.fuzz.targets``, which is imported later: atheris sees only what is imported under its eyes."""

SECONDS_OF_A_CALL = 5
MEMORY_MIB = 2048


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.fuzz", description=__doc__)
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("--seconds", type=int, default=120)
    parser.add_argument("--found", type=Path, default=Path("fuzz-found"))
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--blind", action="store_true", help="Without atheris even where it is installed.")
    given = parser.parse_args()
    given.found.mkdir(parents=True, exist_ok=True)
    if given.blind or not _guided(given):
        _blind(given)


def _corpus(target: str) -> Path:
    """A folder with the target's seeds."""
    import_module("tools.fuzz.targets").clean_up()
    folder = Path(mkdtemp(prefix=f"fuzz-{os.getpid()}-corpus-"))
    for name, data in import_module("tools.fuzz.seeds").seeds_of(target).items():
        (folder / name).write_bytes(data)
    return folder


def _guided(given: argparse.Namespace) -> bool:
    try:
        import atheris
    except ImportError:
        return False
    with atheris.instrument_imports(include=["mopeq_edge", "converters"]):
        corpus = _corpus(given.target)
        run = import_module("tools.fuzz.targets").TARGETS[given.target]()
    mutate = import_module("tools.fuzz.mutate").mutate

    def change(data: bytes, most: int, seed: int) -> bytes:
        rng = random.Random(seed)
        if rng.random() < 0.5:
            return bytes(atheris.Mutate(data, most))
        return bytes(mutate(data, given.target, rng)[:most])

    options = [
        *(f"-max_total_time={given.seconds}", f"-seed={given.seed}", "-max_len=65536", "-print_final_stats=1"),
        *(f"-timeout={SECONDS_OF_A_CALL}", f"-rss_limit_mb={MEMORY_MIB}", f"-artifact_prefix={given.found}/"),
    ]
    atheris.Setup([sys.argv[0], *options, str(corpus)], run, custom_mutator=change)
    atheris.Fuzz()
    return True


def _blind(given: argparse.Namespace) -> None:
    rng = random.Random(given.seed)
    files = [path.read_bytes() for path in sorted(_corpus(given.target).iterdir())]
    run = import_module("tools.fuzz.targets").TARGETS[given.target]()
    mutate = import_module("tools.fuzz.mutate").mutate
    done, end = 0, time.monotonic() + given.seconds
    while time.monotonic() < end:
        data = rng.choice(files)
        for _ in range(rng.randrange(1, 5)):
            data = mutate(data, given.target, rng)
        (given.found / "last").write_bytes(data)
        run(data)
        done += 1
    (given.found / "last").unlink(missing_ok=True)
    print(f"{given.target}: {done} calls in {given.seconds} s, nothing found")


if __name__ == "__main__":
    main()
