"""Memory of a Mac: sysctl and vm_stat."""

from __future__ import annotations

import re

from mopeq_edge.memory.device import Device, Gpu, Machine

AVAILABLE_PAGES = ("Pages free", "Pages inactive", "Pages speculative", "Pages purgeable")
"""What programs can get without compression or swapping."""


def probe(machine: Machine) -> Device:
    """On Apple silicon GPU and CPU share all memory; how much of it the GPU may use is macOS's choice."""
    total = _number(_sysctl(machine, "hw.memsize"))
    arm = _number(_sysctl(machine, "hw.optional.arm64")) == 1
    name = _sysctl(machine, "machdep.cpu.brand_string")
    swap = swap_usage(_sysctl(machine, "vm.swapusage") or "")
    wired = _number(_sysctl(machine, "iogpu.wired_limit_mb"))
    # 0 is the default, a share of the memory that macOS does not tell
    limit = wired * 2**20 if wired else None
    return Device(
        name=name,
        system=machine.system,
        total=total,
        available=available_bytes(machine.run(("vm_stat",)) or ""),
        swap_total=swap.get("total"),
        swap_free=swap.get("free"),
        unified=True if arm else None,
        gpus=(Gpu(name, limit, None),) if arm and name else (),
    )


def _sysctl(machine: Machine, key: str) -> str | None:
    text = machine.run(("sysctl", "-n", key))
    return text.strip() or None if text is not None else None


def _number(text: str | None) -> int | None:
    return int(text) if text is not None and text.isdigit() else None


def available_bytes(text: str) -> int | None:
    """From vm_stat's output; None if a line of it is missing."""
    size = re.search(r"page size of (\d+) bytes", text)
    pages = [re.search(rf"^{name}:\s+(\d+)\.", text, re.MULTILINE) for name in AVAILABLE_PAGES]
    if size is None or any(match is None for match in pages):
        return None
    return int(size[1]) * sum(int(match[1]) for match in pages if match)


def swap_usage(text: str) -> dict[str, int]:
    """Bytes of ``total``, ``used`` and ``free`` from ``sysctl vm.swapusage``."""
    units = {"K": 2**10, "M": 2**20, "G": 2**30}
    found = re.findall(r"(total|used|free) = ([\d.]+)([KMG])", text)
    return {name: int(float(number) * units[unit]) for name, number, unit in found}
