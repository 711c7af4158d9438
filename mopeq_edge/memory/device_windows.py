"""Memory of a Windows machine: PowerShell, which every one has."""

from __future__ import annotations

import json
from typing import Any

from mopeq_edge.memory.device import Device, Machine, nvidia_gpus

QUERY = (
    "Get-CimInstance Win32_OperatingSystem | Select-Object TotalVisibleMemorySize,FreePhysicalMemory,"
    "TotalVirtualMemorySize,FreeVirtualMemory | ConvertTo-Json"
)
"""Sizes in kB; virtual memory is physical memory and page file together."""


def probe(machine: Machine) -> Device:
    found = _sizes(machine.run(("powershell", "-NoProfile", "-Command", QUERY)) or "")
    total, free = found.get("TotalVisibleMemorySize"), found.get("FreePhysicalMemory")
    gpus = nvidia_gpus(machine)
    return Device(
        name=None,
        system=machine.system,
        total=total,
        available=free,
        swap_total=_minus(found.get("TotalVirtualMemorySize"), total),
        swap_free=_minus(found.get("FreeVirtualMemory"), free),
        unified=False if gpus and all(gpu.total is not None for gpu in gpus) else None,
        gpus=gpus,
    )


def _sizes(text: str) -> dict[str, int]:
    try:
        values: Any = json.loads(text)
    except ValueError:
        return {}
    if not isinstance(values, dict):
        return {}
    return {key: value * 1024 for key, value in values.items() if isinstance(value, int)}


def _minus(whole: int | None, part: int | None) -> int | None:
    return None if whole is None or part is None else max(0, whole - part)
