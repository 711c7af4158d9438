"""Run programs side by side: wall time and peak memory of a command, and rows of llama-bench."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

# The kernel counts the memory of the process that starts a program too, so a small one does.
_STARTER = """
import os, subprocess, sys, time
start = time.perf_counter()
process = subprocess.Popen(sys.argv[1:], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
_, status, usage = os.wait4(process.pid, 0)
print(status, time.perf_counter() - start, usage.ru_maxrss / 1024)
"""


def run(command: list[str]) -> tuple[float, float]:
    """(wall seconds, peak resident MiB) of ``command``."""
    starter = [sys.executable, "-I", "-S", "-c", _STARTER, *command]
    status, seconds, peak = subprocess.run(starter, check=True, capture_output=True, text=True).stdout.split()
    if status != "0":
        raise SystemExit(f"{command[0]}: failed with status {status}")
    return float(seconds), float(peak)


def llama_bench(program: Path, model: Path, *, prompt: int, generate: int, threads: int) -> dict[str, float]:
    """Tokens per second: ``prefill`` of ``prompt`` tokens and ``decode`` of ``generate`` tokens, once each."""
    command = [str(program), "-m", str(model), "-p", str(prompt), "-n", str(generate), "-t", str(threads)]
    text = subprocess.run([*command, "-r", "1", "-o", "json"], check=True, capture_output=True, text=True).stdout
    rows: list[dict[str, Any]] = json.loads(text)
    return {"prefill" if row["n_prompt"] else "decode": float(row["avg_ts"]) for row in rows}
