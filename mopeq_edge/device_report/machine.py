"""The device for a report: board, processor, system, CUDA, power mode. What nothing says is None, never 0.

Names and versions only: no host name, no serial number, no address.
"""

from __future__ import annotations

import re
from typing import Any

from mopeq_edge.memory.device import Machine, probe, this_machine

_NVIDIA_SMI = ("nvidia-smi", "--query-gpu=name,driver_version,compute_cap,power.limit", "--format=csv,noheader,nounits")
_DEVICE_TREE = "/proc/device-tree"
_DMI = "/sys/class/dmi/id"
_GOVERNOR = "/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"


def describe(machine: Machine | None = None) -> dict[str, Any]:
    """Plain values with units in the names, of ``machine`` or of this one."""
    machine = machine or this_machine()
    memory = probe(machine)
    return {
        "board": _board(machine),
        "soc": _soc(machine),
        "architecture": _line(machine, "uname", "-m"),
        "cpu": _cpu(machine),
        "cpu_cores_count": _cores(machine, machine.read("/sys/devices/system/cpu/present")),
        "cpu_cores_usable_count": _cores(machine, _allowed(machine)),
        "cpu_governor": _text(machine, _GOVERNOR),
        "system": machine.system,
        "os": _os(machine),
        "kernel": _line(machine, "uname", "-r"),
        "l4t": _l4t(machine),
        "memory_total_bytes": memory.total,
        "memory_available_bytes": memory.available,
        "memory_limit_bytes": memory.limit,
        "memory_unified": memory.unified,
        "swap_total_bytes": memory.swap_total,
        "gpus": _gpus(machine),
        "gpu_memory_total_bytes": [gpu.total for gpu in memory.gpus],
        "cuda_driver": _cuda_of_driver(machine),
        "cuda_toolkit": _cuda_toolkit(machine),
        "power_mode": power_mode(machine.run(("nvpmodel", "-q"))),
    }


def power_mode(text: str | None) -> str | None:
    """ "MAXN_SUPER (2)" from what ``nvpmodel -q`` prints: a line with the name, then one with the number."""
    name = re.search(r"^NV Power Mode:\s*(\S.*?)\s*$", text or "", re.MULTILINE)
    if name is None:
        return None
    number = re.search(r"^(\d+)\s*$", text or "", re.MULTILINE)
    return f"{name[1]} ({number[1]})" if number else name[1]


def _board(machine: Machine) -> str | None:
    if machine.system == "Darwin":
        return _line(machine, "sysctl", "-n", "hw.model")
    found = _text(machine, f"{_DEVICE_TREE}/model")
    if found is not None:
        return found
    names = [_text(machine, f"{_DMI}/{name}") for name in ("sys_vendor", "product_name")]
    return " ".join(name for name in names if name) or None


def _soc(machine: Machine) -> str | None:
    """The last of the device tree's names is the most general: "nvidia,tegra234"."""
    names = [name for name in (machine.read(f"{_DEVICE_TREE}/compatible") or "").split("\0") if name.strip()]
    return names[-1].strip() if names else None


def _cpu(machine: Machine) -> str | None:
    if machine.system == "Darwin":
        return _line(machine, "sysctl", "-n", "machdep.cpu.brand_string")
    # ARM's /proc/cpuinfo has numbers alone; lscpu knows their names
    for text in (machine.read("/proc/cpuinfo"), machine.run(("lscpu",))):
        match = re.search(r"^model name\s*:\s*(\S.*?)\s*$", text or "", re.MULTILINE | re.IGNORECASE)
        if match is not None and match[1] != "-":
            return match[1]
    return None


def _os(machine: Machine) -> str | None:
    if machine.system == "Darwin":
        version = _line(machine, "sw_vers", "-productVersion")
        return f"macOS {version}" if version else None
    match = re.search(r'^PRETTY_NAME="?([^"\n]+)"?', machine.read("/etc/os-release") or "", re.MULTILINE)
    return match[1] if match else None


def _l4t(machine: Machine) -> str | None:
    """ "R36.4.3" of a Jetson's "# R36 (release), REVISION: 4.3, ..."."""
    match = re.match(r"# (R\d+) \(release\), REVISION: ([\d.]+)", machine.read("/etc/nv_tegra_release") or "")
    return f"{match[1]}.{match[2]}" if match else None


def _gpus(machine: Machine) -> list[dict[str, Any]]:
    found = []
    for line in (machine.run(_NVIDIA_SMI) or "").splitlines():
        fields = [field.strip() for field in line.rsplit(",", 3)]
        if len(fields) == 4 and fields[0]:
            name, driver, capability, watts = fields
            found.append(
                {
                    "name": name,
                    "driver_version": _known(driver),
                    "compute_capability": _known(capability),
                    "power_limit_watts": float(watts) if re.fullmatch(r"\d+(\.\d+)?", watts) else None,
                }
            )
    return found


def _cuda_of_driver(machine: Machine) -> str | None:
    """The newest CUDA that the driver runs, from nvidia-smi's own table."""
    match = re.search(r"CUDA Version:\s*(\d[\d.]*)", machine.run(("nvidia-smi",)) or "")
    return match[1] if match else None


def _cuda_toolkit(machine: Machine) -> str | None:
    for program in ("nvcc", "/usr/local/cuda/bin/nvcc"):
        match = re.search(r"release (\d[\d.]*)", machine.run((program, "--version")) or "")
        if match is not None:
            return match[1]
    return None


def _known(text: str) -> str | None:
    return None if not text or text.startswith("[") or text == "N/A" else text


def _text(machine: Machine, path: str) -> str | None:
    return (machine.read(path) or "").strip("\0\n ") or None


def _cores(machine: Machine, ranges: str | None) -> int | None:
    """Of the kernel's "0-3,6"; a Mac tells the number."""
    if machine.system == "Darwin":
        text = _line(machine, "sysctl", "-n", "hw.ncpu") or ""
        return int(text) if text.isdigit() else None
    found = re.findall(r"(\d+)(?:-(\d+))?", ranges or "")
    return sum(int(last or first) - int(first) + 1 for first, last in found) or None


def _allowed(machine: Machine) -> str | None:
    """The cores that this process may use. Not of nproc, which follows OMP_NUM_THREADS."""
    match = re.search(r"^Cpus_allowed_list:\s*(\S+)$", machine.read("/proc/self/status") or "", re.MULTILINE)
    return match[1] if match else None


def _line(machine: Machine, *command: str) -> str | None:
    return (machine.run(command) or "").strip() or None
