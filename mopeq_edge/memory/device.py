"""What memory the device has. What nothing says is None, never 0.

All is read through a :class:`Machine`, so that any device can be played back from its files and commands.
"""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

COMMAND_SECONDS = 10


@dataclass(frozen=True)
class Machine:
    """How to ask: ``read`` gives a file's text, ``run`` a command's output; both None where there is none."""

    system: str
    """As ``platform.system()`` has it: Linux, Darwin, Windows."""
    read: Callable[[str], str | None]
    run: Callable[[Sequence[str]], str | None]


@dataclass(frozen=True)
class Gpu:
    """One GPU; ``total`` and ``free`` in bytes, None where the driver does not say (unified memory)."""

    name: str
    total: int | None
    free: int | None


@dataclass(frozen=True)
class Device:
    """Memory in bytes; None is unknown.

    ``available`` is what programs can still get without swapping. ``limit`` is what a control group allows, of which
    ``limit_left`` is left. ``locked_limit`` is what a process may lock; None where it is not limited or not known.
    ``unified``: GPU and CPU share the memory.
    """

    name: str | None
    system: str
    total: int | None
    available: int | None
    swap_total: int | None
    swap_free: int | None
    unified: bool | None
    gpus: tuple[Gpu, ...] = ()
    limit: int | None = None
    limit_left: int | None = None
    locked_limit: int | None = None

    @property
    def usable(self) -> int | None:
        """What a process can have now: the least of what is free and what a control group leaves."""
        known = [n for n in (self.available, self.limit_left) if n is not None]
        return min(known) if known else None

    @property
    def capacity(self) -> int | None:
        """What a process could have at most on this device."""
        known = [n for n in (self.total, self.limit) if n is not None]
        return min(known) if known else None

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "usable": self.usable, "capacity": self.capacity}


def _read(path: str) -> str | None:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None


def _run(command: Sequence[str]) -> str | None:
    try:
        done = subprocess.run(
            list(command), capture_output=True, text=True, errors="replace", timeout=COMMAND_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def this_machine() -> Machine:
    """The machine that this runs on."""
    return Machine(platform.system(), _read, _run)


def probe(machine: Machine | None = None) -> Device:
    """What memory ``machine`` has; of a system that is not known, nothing."""
    from mopeq_edge.memory import device_linux, device_macos, device_windows

    machine = machine or this_machine()
    probes = {"Linux": device_linux.probe, "Darwin": device_macos.probe, "Windows": device_windows.probe}
    found = probes.get(machine.system)
    return found(machine) if found else Device(None, machine.system, None, None, None, None, None)


def nvidia_gpus(machine: Machine) -> tuple[Gpu, ...]:
    """From nvidia-smi; where memory is unified it prints [N/A] or [Not Supported]."""
    query = ("nvidia-smi", "--query-gpu=name,memory.total,memory.free", "--format=csv,noheader,nounits")
    found = []
    for line in (machine.run(query) or "").splitlines():
        fields = [field.strip() for field in line.rsplit(",", 2)]
        if len(fields) == 3 and fields[0]:
            found.append(Gpu(fields[0], _mib(fields[1]), _mib(fields[2])))
    return tuple(found)


def _mib(text: str) -> int | None:
    return int(text) * 2**20 if text.isdigit() else None
