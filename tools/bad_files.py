"""What readers make of GGUF files as a stranger could make them: ``python -m tools.bad_files``.

Each file of :mod:`tools.bad_gguf_files` goes through ``mopeq-edge validate``, the installed ``gguf.GGUFReader``
and llama-completion of the installed llama.cpp, each in a process of its own with a limit of time and memory.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

from mopeq_edge.runtime.locate import find_runtime
from tools.bad_gguf_files import FILES, nothing_wrong

ROOT = Path(__file__).parent.parent
SECONDS, MEMORY = 10, 4 << 30


@dataclass(frozen=True)
class Outcome:
    """What became of one file in one reader: ``refuses``, ``accepts``, ``hangs`` or ``crashes``, and how.

    ``seconds`` and ``mib`` (largest resident set) are of the whole process, its start included.
    """

    verdict: str
    how: str
    seconds: float
    mib: float


READ_WITH_GGUF = """
import sys, gguf
reader = gguf.GGUFReader(sys.argv[1])
for field in reader.fields.values():
    field.contents()
for tensor in reader.tensors:
    tensor.data.sum()
"""
READ_WITH_OURS = "from mopeq_edge.cli import main; main()"
OURS, PACKAGE, LLAMA = "mopeq-edge", "gguf package", "llama-completion"


def commands() -> dict[str, Callable[[Path], list[str]]]:
    """How each reader is started; llama.cpp's only where it is installed."""
    found: dict[str, Callable[[Path], list[str]]] = {
        OURS: lambda path: [sys.executable, "-c", READ_WITH_OURS, "validate", str(path)],
        PACKAGE: lambda path: [sys.executable, "-c", READ_WITH_GGUF, str(path)],
    }
    runtime = find_runtime()
    if runtime is not None:
        program = str(runtime.bin / LLAMA)
        options = ["-p", "a", "-n", "1", "-c", "32", "-t", "1", "-no-cnv", "--no-warmup"]
        found[LLAMA] = lambda path: [program, "-m", str(path), *options]
    return found


def read(command: Sequence[str]) -> Outcome:
    """Run one reader with the limits of this module."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

    with TemporaryDirectory() as folder:
        said = Path(folder) / "said"
        env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        with said.open("wb") as file:
            start = time.monotonic()
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, preexec_fn=limit, cwd=folder, env=env
            )
            status, usage = None, None
            while status is None and time.monotonic() - start < SECONDS:
                pid, code, found = os.wait4(process.pid, os.WNOHANG)
                if pid:
                    status, usage = os.waitstatus_to_exitcode(code), found
                else:
                    time.sleep(0.01)
            seconds = time.monotonic() - start
            if usage is None:
                process.kill()
                _, _, usage = os.wait4(process.pid, 0)
            process.returncode = 0 if status is None else status
        words = said.read_bytes().decode(errors="replace")
    return Outcome(*_verdict(status, words), round(seconds, 2), round(usage.ru_maxrss / 1024))


def _verdict(status: int | None, words: str) -> tuple[str, str]:
    lines = [line for line in words.splitlines() if line.strip()]
    last = lines[-1] if lines else ""
    if status is None:
        return "hangs", f"stopped after {SECONDS} s"
    if status < 0:
        return "crashes", signal.Signals(-status).name
    if status == 0:
        return "accepts", ""
    if "Traceback (most recent call last)" in words:
        name = last.partition(":")[0].strip()
        # the package says so with a ValueError; anything else is what a later line stumbled over
        return ("refuses" if name == "ValueError" else "stumbles", name)
    return "refuses", ""


def measured(names: Sequence[str]) -> dict[str, dict[str, Outcome]]:
    """Outcomes by reader, by kind of file."""
    found: dict[str, dict[str, Outcome]] = {}
    with TemporaryDirectory() as folder:
        for name in names:
            path = Path(folder) / f"{name}.gguf"
            path.write_bytes(FILES[name]())
            found[name] = {reader: read(command(path)) for reader, command in commands().items()}
            print(f"{name}: {' | '.join(outcome.verdict for outcome in found[name].values())}", file=sys.stderr)
    return found


def table(found: Mapping[str, Mapping[str, Outcome]]) -> str:
    """Markdown: a row for each kind, and how often each verdict was given."""
    readers = list(next(iter(found.values())))
    rows = [f"| file | {' | '.join(readers)} |", "|---|" + "---|" * len(readers)]
    for name, outcomes in found.items():
        rows.append(f"| {name.replace('_', ' ')} | {' | '.join(map(_cell, outcomes.values()))} |")
    bad = [outcomes for name, outcomes in found.items() if name != nothing_wrong.__name__]
    total = []
    for reader in readers:
        counts = Counter(outcomes[reader].verdict for outcomes in bad)
        total.append(", ".join(f"{verdict} {n}" for verdict, n in counts.most_common()))
    return "\n".join([*rows, f"| **{len(bad)} bad files** | {' | '.join(total)} |"])


def _cell(outcome: Outcome) -> str:
    how = f" ({outcome.how})" if outcome.how else ""
    return f"{outcome.verdict}{how}, {outcome.seconds:.1f} s, {outcome.mib:.0f} MiB"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.bad_files", description=__doc__)
    parser.add_argument("--only", action="append", choices=sorted(FILES), help="Kinds of files; default: all.")
    parser.add_argument("--json", action="store_true", dest="as_json")
    parser.add_argument("--write", type=Path, help="Write the files into this folder and read nothing.")
    given = parser.parse_args()
    names = given.only or list(FILES)
    if given.write is not None:
        given.write.mkdir(parents=True, exist_ok=True)
        for name in names:
            (given.write / f"{name}.gguf").write_bytes(FILES[name]())
        return
    found = measured(names)
    if given.as_json:
        print(json.dumps({name: {r: asdict(o) for r, o in row.items()} for name, row in found.items()}, indent=1))
        return
    runtime = find_runtime()
    llama = f", llama.cpp of llama-cpp-python {runtime.version}" if runtime is not None else ""
    print(f"gguf {version('gguf')}{llama}; limits: {SECONDS} s, {MEMORY >> 30} GiB of address space\n")
    print(table(found))


if __name__ == "__main__":
    main()
