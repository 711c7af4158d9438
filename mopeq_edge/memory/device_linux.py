"""Memory of a Linux machine, of a Jetson among them: /proc, /sys, control groups, nvidia-smi, tegrastats."""

from __future__ import annotations

import re

from mopeq_edge.memory.device import Device, Gpu, Machine, nvidia_gpus

NO_LIMIT = 2**60
"""Control groups of version 1 say "no limit" with a number of about 2**63."""

_UNIFIED_GPUS = ("Orin", "Xavier", "Thor", "Tegra", "nvgpu", "GB10")


def probe(machine: Machine) -> Device:
    """What the kernel says of memory, and what limits there are for this process."""
    memory = meminfo(machine.read("/proc/meminfo") or "")
    model = (machine.read("/proc/device-tree/model") or "").rstrip("\0\n ") or None
    gpus = nvidia_gpus(machine)
    limit, left = _control_group(machine)
    return Device(
        name=model,
        system=machine.system,
        total=memory.get("MemTotal"),
        available=memory.get("MemAvailable"),
        swap_total=memory.get("SwapTotal"),
        swap_free=memory.get("SwapFree"),
        unified=_unified(machine, model, gpus),
        gpus=gpus,
        limit=limit,
        limit_left=left,
        locked_limit=_locked(machine.read("/proc/self/limits") or ""),
    )


def meminfo(text: str) -> dict[str, int]:
    """Bytes by name from /proc/meminfo."""
    found = {}
    for line in text.splitlines():
        match = re.match(r"(\w+):\s+(\d+) kB", line)
        if match:
            found[match[1]] = int(match[2]) * 1024
    return found


def tegrastats(line: str) -> dict[str, int] | None:
    """Bytes from one line of tegrastats: ``used``, ``total``, and of swap if it says; None for another line.

    Its "used" leaves out what the kernel can take back, and there is no GPU memory beside it: on a Jetson both are the
    same, and what CUDA calls free is not MemFree either.
    """
    match = re.search(r"\bRAM (\d+)/(\d+)MB\b", line)
    if match is None:
        return None
    found = {"used": int(match[1]) * 2**20, "total": int(match[2]) * 2**20}
    swap = re.search(r"\bSWAP (\d+)/(\d+)MB\b", line)
    if swap is not None:
        found |= {"swap_used": int(swap[1]) * 2**20, "swap_total": int(swap[2]) * 2**20}
    return found


def _unified(machine: Machine, model: str | None, gpus: tuple[Gpu, ...]) -> bool | None:
    """True on a Jetson, False beside a GPU that has memory of its own; without a GPU of NVIDIA unknown."""
    tegra = machine.read("/etc/nv_tegra_release") is not None
    if tegra or (model is not None and ("Jetson" in model or "NVIDIA" in model)):
        return True
    if any(name in gpu.name for gpu in gpus for name in _UNIFIED_GPUS):
        return True
    if gpus:
        return False if all(gpu.total is not None for gpu in gpus) else None
    return None


def _locked(limits: str) -> int | None:
    for line in limits.splitlines():
        match = re.match(r"Max locked memory\s+(\S+)", line)
        if match and match[1].isdigit():
            return int(match[1])
    return None


def _control_group(machine: Machine) -> tuple[int | None, int | None]:
    """(limit, what is left of it), the tightest of the process's group and of those above it."""
    found = [
        *_levels(machine, *_version_2(machine)),
        *_levels(machine, *_version_1(machine)),
    ]
    limits = [limit for limit, _ in found]
    lefts = [left for _, left in found if left is not None]
    return (min(limits) if limits else None), (min(lefts) if lefts else None)


_Names = tuple[str, str, str]


def _version_2(machine: Machine) -> tuple[str | None, str, _Names]:
    match = re.search(r"^0::(/.*)$", machine.read("/proc/self/cgroup") or "", re.MULTILINE)
    return (match[1] if match else None), "/sys/fs/cgroup", ("memory.max", "memory.current", "inactive_file")


def _version_1(machine: Machine) -> tuple[str | None, str, _Names]:
    match = re.search(r"^\d+:[^:]*\bmemory\b[^:]*:(/.*)$", machine.read("/proc/self/cgroup") or "", re.MULTILINE)
    names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    return (match[1] if match else None), "/sys/fs/cgroup/memory", names


def _levels(machine: Machine, group: str | None, root: str, names: _Names) -> list[tuple[int, int | None]]:
    """(limit, left) of every group from the process's up that has a limit."""
    if group is None:
        return []
    limit_name, usage_name, droppable_name = names
    found = []
    at = group.rstrip("/")
    while True:
        text = (machine.read(f"{root}{at}/{limit_name}") or "").strip()
        if text.isdigit() and int(text) < NO_LIMIT:
            found.append((int(text), _left(machine, f"{root}{at}", int(text), usage_name, droppable_name)))
        if not at:
            return found
        at = at.rpartition("/")[0]


def _left(machine: Machine, folder: str, limit: int, usage_name: str, droppable_name: str) -> int | None:
    """What the group may still take; pages of files that nobody uses do not count as taken."""
    usage = (machine.read(f"{folder}/{usage_name}") or "").strip()
    if not usage.isdigit():
        return None
    stat = re.search(rf"^{droppable_name} (\d+)$", machine.read(f"{folder}/memory.stat") or "", re.MULTILINE)
    return max(0, limit - int(usage) + (int(stat[1]) if stat else 0))
