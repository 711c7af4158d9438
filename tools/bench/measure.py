"""Run programs side by side: wall time and peak memory of a command, and rows of llama-bench."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

# The kernel counts the memory of the process that starts a program too, so a small one does.
_STARTER = """
import os, resource, subprocess, sys, time
limit = int(sys.argv[1])
if limit:
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
start = time.perf_counter()
process = subprocess.Popen(sys.argv[2:], stdout=subprocess.DEVNULL)
_, status, usage = os.wait4(process.pid, 0)
print(status, time.perf_counter() - start, usage.ru_maxrss / 1024)
"""


def run(command: list[str], data_limit: int = 0) -> tuple[float, float]:
    """(wall seconds, peak resident MiB) of ``command``, which may allocate ``data_limit`` bytes (0: any number)."""
    starter = [sys.executable, "-I", "-S", "-c", _STARTER, str(data_limit), *command]
    done = subprocess.run(starter, check=True, capture_output=True, text=True)
    status, seconds, peak = done.stdout.split()
    if status != "0":
        said = done.stderr.strip().splitlines()
        raise SystemExit(f"{command[0]}: failed with status {status}: {said[-1] if said else 'said nothing'}")
    return float(seconds), float(peak)


def llama_bench(program: Path, model: Path, *, prompt: int, generate: int, threads: int) -> dict[str, float]:
    """Tokens per second: ``prefill`` of ``prompt`` tokens and ``decode`` of ``generate`` tokens, once each."""
    command = [str(program), "-m", str(model), "-p", str(prompt), "-n", str(generate), "-t", str(threads)]
    text = subprocess.run([*command, "-r", "1", "-o", "json"], check=True, capture_output=True, text=True).stdout
    rows: list[dict[str, Any]] = json.loads(text)
    return {"prefill" if row["n_prompt"] else "decode": float(row["avg_ts"]) for row in rows}
