"""``python -m tools.fuzz TARGET --seconds N``: guided by coverage with atheris where it is installed, else blindly.

Every target starts from the files of tests/corpus. What is found is left as a file in ``--found``: a call that ended in
anything but a MopeqError of one line, took more than five seconds or 2 GiB. ``all`` runs every target for ``--seconds``
in a process of its own, one after the other, and ends with a table, or JSON; its exit code is 1 if one found something.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import sys
import time
from importlib import import_module
from pathlib import Path
from tempfile import mkdtemp

TARGETS = ("artifacts", "config", "gguf", "imatrix", "index", "plan", "safetensors", "tokenizer", "torch", "vision")
"""Names in ``tools.fuzz.targets``, which is imported later: atheris sees only what is imported under its eyes."""

CORPUS = Path(__file__).parents[2] / "tests" / "corpus"

SECONDS_OF_A_CALL = 5
MEMORY_MIB = 2048


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.fuzz", description=__doc__)
    parser.add_argument("target", choices=(*TARGETS, "all"))
    parser.add_argument("--seconds", type=int, default=120)
    parser.add_argument("--found", type=Path, default=Path("fuzz-found"))
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--blind", action="store_true", help="Without atheris even where it is installed.")
    parser.add_argument("--json", action="store_true", help="Of all: print JSON.")
    given = parser.parse_args()
    if given.target == "all":
        from tools.fuzz.all_targets import run_all

        sys.exit(run_all(TARGETS, given.seconds, given.found, given.seed, blind=given.blind, as_json=given.json))
    given.found.mkdir(parents=True, exist_ok=True)
    if given.blind or not _guided(given):
        _blind(given)


def _corpus(target: str) -> Path:
    """A copy of the target's corpus, to which libFuzzer adds what reaches new code."""
    import_module("tools.fuzz.targets").clean_up()
    folder = Path(mkdtemp(prefix=f"fuzz-{os.getpid()}-corpus-"))
    return Path(shutil.copytree(CORPUS / target, folder, dirs_exist_ok=True))


def _guided(given: argparse.Namespace) -> bool:
    try:
        import atheris
    except ImportError:
        return False
    with atheris.instrument_imports(include=["mopeq_edge", "converters"]):
        corpus = _corpus(given.target)
        run = import_module("tools.fuzz.targets").TARGETS[given.target]()
        # what is imported at the first call takes longer than a call may
        for path in sorted(corpus.iterdir()):
            run(path.read_bytes())
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
