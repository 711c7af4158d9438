"""Run programs in turn: time and peak memory of each run, and what of it is more or less than another's."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

# The kernel counts the memory of the process that starts a program too, so a small one does. Anonymous pages are what
# the program allocated, looked at fifty times a second; the peak of all has those of mapped files as well.
_STARTER = """
import os, subprocess, sys, time
def enter():
    if sys.argv[1]:
        with open(sys.argv[1], "w") as file:
            file.write(str(os.getpid()))
start = time.perf_counter()
process = subprocess.Popen(sys.argv[2:], stdout=subprocess.DEVNULL, preexec_fn=enter)
anonymous = 0
while True:
    done, status, usage = os.wait4(process.pid, os.WNOHANG)
    if done:
        break
    with open(f"/proc/{process.pid}/status") as file:
        now = sum(int(line.split()[1]) for line in file if line.startswith(("RssAnon", "RssShmem")))
    anonymous = max(anonymous, now)
    time.sleep(0.02)
seconds = time.perf_counter() - start
print(status, seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024, anonymous / 1024)
"""


@dataclass(frozen=True)
class Run:
    """One run of a program. ``peak_mib`` is all that was resident at once, pages of mapped files included."""

    seconds: float
    cpu_seconds: float
    peak_mib: float
    anonymous_mib: float
    """What it allocated: the peak without pages of files, which the kernel can drop."""


@dataclass(frozen=True)
class Spread:
    """The least, the middle and the largest of several values."""

    low: float
    median: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of one value or more."""
        return cls(min(values), statistics.median(values), max(values))

    def text(self, digits: int = 2) -> str:
        """``median (low to high)``."""
        return f"{self.median:,.{digits}f} ({self.low:,.{digits}f} to {self.high:,.{digits}f})"


@dataclass(frozen=True)
class Ratio:
    """One line of a report: ``ours`` over ``theirs`` of each round, or the other way round for a speed."""

    bench: str
    what: str
    ratio: Spread
    ours: Spread
    theirs: Spread
    unit: str
    target: str = ""

    def row(self) -> list[str]:
        """The cells of a table: what, ratio, target, ours and theirs."""
        digits = 0 if self.unit == "MiB" else 1
        sizes = (f"{spread.text(digits)} {self.unit}" for spread in (self.ours, self.theirs))
        return [self.bench, self.what, self.ratio.text(), self.target or "–", *sizes]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


HEAD = ["bench", "what", "ratio: median (least to most)", "target", "ours", "theirs"]


def markdown(ratios: Sequence[Ratio]) -> str:
    """``ratios`` as a table in Markdown."""
    lines = [HEAD, ["---"] * len(HEAD), *(ratio.row() for ratio in ratios)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def run(command: Sequence[str], group: Path | None = None) -> Run:
    """One run of ``command``, in the control group whose list of processes is ``group``."""
    starter = [sys.executable, "-I", "-S", "-c", _STARTER, str(group or ""), *command]
    done = subprocess.run(starter, check=True, capture_output=True, text=True)
    status, *numbers = done.stdout.split()
    if status != "0":
        said = done.stderr.strip().splitlines()
        raise SystemExit(f"{command[0]}: failed with status {status}: {said[-1] if said else 'said nothing'}")
    return Run(*map(float, numbers))


def in_turn(
    commands: Mapping[str, Sequence[str]], rounds: int, before: Callable[[str], None] = lambda name: None
) -> dict[str, list[Run]]:
    """``rounds`` runs of each, there and back again, so that a machine that warms up favours nobody.

    ``before`` is called with the name of each run and is not measured.
    """
    found: dict[str, list[Run]] = {name: [] for name in commands}
    for turn in range(rounds):
        for name in list(commands)[:: -1 if turn % 2 else 1]:
            before(name)
            found[name].append(run(commands[name]))
    return found


def compared(
    bench: str, what: str, ours: Sequence[Run], theirs: Sequence[Run], value: str, *, speed: bool = False, target: str
) -> Ratio:
    """``value``, a field of :class:`Run`, of both and its ratio round by round; ``speed``: theirs over ours."""
    mine, other = ([float(getattr(one, value)) for one in runs] for runs in (ours, theirs))
    by_round = [b / a if speed else a / b for a, b in zip(mine, other, strict=True)]
    unit = "MiB" if value.endswith("_mib") else "s"
    return Ratio(bench, what, Spread.of(by_round), Spread.of(mine), Spread.of(other), unit, target)


def llama_bench(program: Path, model: Path, *, prompt: int, generate: int, threads: int) -> dict[str, float]:
    """Tokens per second: ``prefill`` of ``prompt`` tokens and ``decode`` of ``generate`` tokens, once each."""
    command = [str(program), "-m", str(model), "-p", str(prompt), "-n", str(generate), "-t", str(threads)]
    text = subprocess.run([*command, "-r", "1", "-o", "json"], check=True, capture_output=True, text=True).stdout
    rows: list[dict[str, Any]] = json.loads(text)
    return {"prefill" if row["n_prompt"] else "decode": float(row["avg_ts"]) for row in rows}
