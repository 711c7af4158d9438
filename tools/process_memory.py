"""What a process has in memory, over time: read from /proc (Linux), and from nvidia-smi where there is one."""

from __future__ import annotations

import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

KINDS = ("anon", "file", "shmem", "swap")
_STATUS = {"RssAnon": "anon", "RssFile": "file", "RssShmem": "shmem", "VmSwap": "swap"}


@dataclass(frozen=True)
class Sample:
    """One moment. ``seconds`` from the start; the rest in bytes, faults in numbers since the start of the process.

    ``anon``, ``file`` and ``shmem`` add up to the resident memory; ``pss`` (None if it was not read) counts pages that
    are shared with other processes in part. ``gpu`` is None where nothing says.
    """

    seconds: float
    anon: int
    file: int
    shmem: int
    swap: int
    minor_faults: int
    major_faults: int
    pss: int | None = None
    gpu: int | None = None

    @property
    def rss(self) -> int:
        return self.anon + self.file + self.shmem


def read_status(text: str) -> dict[str, int]:
    """Bytes by kind from /proc/PID/status."""
    found = dict.fromkeys(KINDS, 0)
    for line in text.splitlines():
        key, _, value = line.partition(":")
        if key in _STATUS:
            found[_STATUS[key]] = int(value.split()[0]) * 1024
    return found


def read_faults(text: str) -> tuple[int, int]:
    """(minor, major) faults from /proc/PID/stat; the name in parentheses may hold anything."""
    fields = text.rpartition(")")[2].split()
    return int(fields[7]), int(fields[9])


def read_pss(text: str) -> int | None:
    """Bytes from /proc/PID/smaps_rollup."""
    for line in text.splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    return None


def gpu_bytes(pid: int, run: Callable[[list[str]], str] | None = None) -> int | None:
    """GPU memory of one process; None where nvidia-smi is missing or prints [N/A]."""
    command = ["nvidia-smi", "--query-compute-apps=pid,used_memory", "--format=csv,noheader,nounits"]
    try:
        text = run(command) if run else subprocess.run(command, check=True, capture_output=True, text=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    for line in text.splitlines():
        number, _, used = line.partition(",")
        if number.strip() == str(pid) and used.strip().isdigit():
            return int(used) * 2**20
    return None


class Sampler:
    """Samples process ``pid`` in a thread until :meth:`stop`; every ``pss_every``-th sample has PSS and GPU memory."""

    def __init__(self, pid: int, interval: float = 0.02, pss_every: int = 25, *, gpu: bool = False) -> None:
        self.samples: list[Sample] = []
        self._pid, self._interval, self._pss_every, self._gpu = pid, interval, pss_every, gpu
        self._done = threading.Event()
        self._start = time.perf_counter()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        proc = Path("/proc") / str(self._pid)
        number = 0
        while not self._done.wait(self._interval if number else 0):
            try:
                status = read_status((proc / "status").read_text())
                minor, major = read_faults((proc / "stat").read_text())
                full = number % self._pss_every == 0
                pss = read_pss((proc / "smaps_rollup").read_text()) if full else None
            except (OSError, ValueError):
                return
            gpu = gpu_bytes(self._pid) if full and self._gpu else None
            now = time.perf_counter() - self._start
            self.samples.append(Sample(now, **status, minor_faults=minor, major_faults=major, pss=pss, gpu=gpu))
            number += 1

    def stop(self) -> list[Sample]:
        """End the thread; all samples."""
        self._done.set()
        self._thread.join()
        return self.samples


def peaks(samples: list[Sample]) -> dict[str, Any]:
    """The largest value of every kind, and of their sum; None for what was never read."""
    if not samples:
        return {}
    found: dict[str, Any] = {kind: max(getattr(s, kind) for s in samples) for kind in KINDS}
    found["rss"] = max(s.rss for s in samples)
    for kind in ("pss", "gpu"):
        values = [getattr(s, kind) for s in samples if getattr(s, kind) is not None]
        found[kind] = max(values) if values else None
    found["minor_faults"], found["major_faults"] = samples[-1].minor_faults, samples[-1].major_faults
    found["at_peak"] = asdict(max(samples, key=lambda s: s.rss))
    return found
