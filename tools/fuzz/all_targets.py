"""Every target in turn, each in a process of its own, and what came of it in one table."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

_FIGURES = {
    "calls": re.compile(r"stat::number_of_executed_units: *(\d+)|: (\d+) calls in"),
    "edges": re.compile(r"cov: (\d+)"),
    "memory_mib": re.compile(r"stat::peak_rss_mb: *(\d+)"),
}
"""In what libFuzzer, or the blind run, prints; the last of each counts."""


@dataclass(frozen=True)
class Outcome:
    """One target; a figure that was not printed is None."""

    target: str
    seconds: int
    calls: int | None
    edges: int | None
    memory_mib: int | None
    found: tuple[str, ...]
    """Files that lead to what was found, or what was said without one."""


def run_all(
    targets: Sequence[str], seconds: int, found: Path, seed: int, *, blind: bool = False, as_json: bool = False
) -> int:
    """Run ``targets`` and print what came of them; 1 if something was found, else 0."""
    outcomes = []
    for target in targets:
        if not as_json:
            print(f"{target} …", file=sys.stderr, flush=True)
        outcomes.append(_run(target, seconds, found / target, seed, blind))
    if as_json:
        print(json.dumps({"seed": seed, "targets": [asdict(outcome) for outcome in outcomes]}, indent=1))
    else:
        print(_table(outcomes))
    return int(any(outcome.found for outcome in outcomes))


def _run(target: str, seconds: int, found: Path, seed: int, blind: bool) -> Outcome:
    command = [sys.executable, "-m", "tools.fuzz", target, "--seconds", str(seconds), "--found", str(found)]
    command += ["--seed", str(seed), *(["--blind"] if blind else [])]
    began = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    said = done.stdout + done.stderr
    files = tuple(sorted(str(path) for path in found.iterdir())) if found.is_dir() else ()
    if done.returncode != 0 and not files:
        files = (said[-300:],)
    elif not files and found.is_dir():
        found.rmdir()
    figures = {key: _last(pattern, said) for key, pattern in _FIGURES.items()}
    return Outcome(target, round(time.monotonic() - began), **figures, found=files)


def _last(pattern: re.Pattern[str], said: str) -> int | None:
    numbers = [next(group for group in match.groups() if group) for match in pattern.finditer(said)]
    return int(numbers[-1]) if numbers else None


def _table(outcomes: Sequence[Outcome]) -> str:
    lines = ["| target | seconds | calls | a second | edges | memory, MiB | found |", "|---" * 7 + "|"]
    for one in outcomes:
        speed = f"{one.calls / max(one.seconds, 1):,.0f}" if one.calls is not None else ""
        calls, edges, memory = (f"{n:,}" if n is not None else "" for n in (one.calls, one.edges, one.memory_mib))
        lines.append(f"| `{one.target}` | {one.seconds} | {calls} | {speed} | {edges} | {memory} | {len(one.found)} |")
    total = sum(one.calls or 0 for one in outcomes)
    found = [path for one in outcomes for path in one.found]
    lines.append(f"| all | {sum(one.seconds for one in outcomes)} | {total:,} | | | | {len(found)} |")
    return "\n".join([*lines, *found])
