"""Devices played back from the real formats of their files and commands."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

import pytest

from mopeq_edge.memory.device import Device, Gpu, Machine, probe
from mopeq_edge.memory.device_linux import tegrastats
from mopeq_edge.memory.device_macos import available_bytes

KIB, MIB, GIB = 2**10, 2**20, 2**30

MEMINFO = """MemTotal:        7800396 kB
MemFree:          412300 kB
MemAvailable:    5120044 kB
Buffers:           90012 kB
Cached:          4512312 kB
SwapCached:            0 kB
SwapTotal:       3900192 kB
SwapFree:        3800000 kB
HugePages_Total:       0
Hugepagesize:       2048 kB
"""

LIMITS = """Limit                     Soft Limit           Hard Limit           Units
Max data size             unlimited            unlimited            bytes
Max locked memory         8388608              8388608              bytes
Max address space         unlimited            unlimited            bytes
"""

UNLIMITED = LIMITS.replace("8388608              8388608", "unlimited            unlimited")

ORIN = "NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super\0"
TEGRA_RELEASE = "# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic, EABI: aarch64\n"
NVIDIA_SMI = "nvidia-smi --query-gpu=name,memory.total,memory.free --format=csv,noheader,nounits"


def machine(system: str, files: Mapping[str, str], commands: Mapping[str, str]) -> Machine:
    def run(command: Sequence[str]) -> str | None:
        return commands.get(" ".join(command))

    return Machine(system, files.get, run)


def linux(files: Mapping[str, str], commands: Mapping[str, str] | None = None) -> Device:
    return probe(machine("Linux", {"/proc/meminfo": MEMINFO, "/proc/self/limits": LIMITS, **files}, commands or {}))


def test_a_linux_machine() -> None:
    found = linux({})
    assert found == Device(
        name=None,
        system="Linux",
        total=7800396 * KIB,
        available=5120044 * KIB,
        swap_total=3900192 * KIB,
        swap_free=3800000 * KIB,
        unified=None,
        locked_limit=8388608,
    )
    assert found.usable == found.available
    assert found.capacity == found.total


def test_no_limit_on_locked_memory_is_none() -> None:
    assert linux({"/proc/self/limits": UNLIMITED}).locked_limit is None


def test_a_gpu_with_memory_of_its_own() -> None:
    found = linux({}, {NVIDIA_SMI: "NVIDIA GeForce RTX 4090, 24564, 23010\nNVIDIA L4, 23034, 22500\n"})
    assert found.unified is False
    assert found.gpus == (
        Gpu("NVIDIA GeForce RTX 4090", 24564 * MIB, 23010 * MIB),
        Gpu("NVIDIA L4", 23034 * MIB, 22500 * MIB),
    )


@pytest.mark.parametrize(
    ("files", "line"),
    [
        ({"/proc/device-tree/model": ORIN, "/etc/nv_tegra_release": TEGRA_RELEASE}, "Orin (nvgpu), [N/A], [N/A]"),
        ({"/proc/device-tree/model": ORIN}, "Orin (nvgpu), [Not Supported], [Not Supported]"),
        ({}, "NVIDIA GB10, [N/A], [N/A]"),
    ],
)
def test_unified_memory_that_nvidia_smi_does_not_know(files: dict[str, str], line: str) -> None:
    found = linux(files, {NVIDIA_SMI: line + "\n"})
    assert found.unified is True
    assert [(gpu.total, gpu.free) for gpu in found.gpus] == [(None, None)]
    # the kernel's figure, not what CUDA calls free
    assert found.usable == 5120044 * KIB
    if files:
        assert found.name == ORIN.rstrip("\0")


def test_a_jetson_without_nvidia_smi() -> None:
    found = linux({"/proc/device-tree/model": ORIN, "/etc/nv_tegra_release": TEGRA_RELEASE})
    assert (found.unified, found.gpus) == (True, ())


def test_a_raspberry_pi_is_no_jetson() -> None:
    found = linux({"/proc/device-tree/model": "Raspberry Pi 5 Model B Rev 1.0\0"})
    assert (found.name, found.unified) == ("Raspberry Pi 5 Model B Rev 1.0", None)


def test_tegrastats() -> None:
    line = (
        "11-25-2025 14:12:01 RAM 2448/7620MB (lfb 3x4MB) SWAP 12/3810MB (cached 0MB) CPU [2%@729,1%@729,0%@729,off,off]"
        " EMC_FREQ 0% GR3D_FREQ 0% cpu@48.5C VDD_IN 4067mW/4067mW"
    )
    assert tegrastats(line) == {
        **{"used": 2448 * MIB, "total": 7620 * MIB},
        **{"swap_used": 12 * MIB, "swap_total": 3810 * MIB},
    }
    assert tegrastats("RAM 1901/3964MB (lfb 93x4MB) CPU [off]") == {"used": 1901 * MIB, "total": 3964 * MIB}
    assert tegrastats("tegrastats: command not found") is None


V2 = {
    "/proc/self/cgroup": "0::/system.slice/llama.service\n",
    "/sys/fs/cgroup/system.slice/llama.service/memory.max": "2147483648\n",
    "/sys/fs/cgroup/system.slice/llama.service/memory.current": "524288000\n",
    "/sys/fs/cgroup/system.slice/llama.service/memory.stat": "anon 100000\nfile 424288000\ninactive_file 400000000\n",
    "/sys/fs/cgroup/system.slice/memory.max": "max\n",
}


def test_a_control_group_of_version_2() -> None:
    found = linux(V2)
    assert (found.limit, found.limit_left) == (2147483648, 2147483648 - 524288000 + 400000000)
    assert found.usable == found.limit_left
    assert found.capacity == found.limit


def test_the_tightest_group_above_counts() -> None:
    above = {
        "/sys/fs/cgroup/system.slice/memory.max": "1073741824\n",
        "/sys/fs/cgroup/system.slice/memory.current": "1000000000\n",
        "/sys/fs/cgroup/system.slice/memory.stat": "inactive_file 0\n",
    }
    found = linux({**V2, **above})
    assert (found.limit, found.limit_left) == (1073741824, 73741824)


def test_a_control_group_of_version_1() -> None:
    files = {
        "/proc/self/cgroup": "5:cpu,cpuacct:/docker/ab\n4:memory:/docker/ab\n0::/\n",
        "/sys/fs/cgroup/memory/docker/ab/memory.limit_in_bytes": "3221225472\n",
        "/sys/fs/cgroup/memory/docker/ab/memory.usage_in_bytes": "221225472\n",
        "/sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
    }
    found = linux(files)
    assert (found.limit, found.limit_left) == (3221225472, 3000000000)
    files["/sys/fs/cgroup/memory/docker/ab/memory.limit_in_bytes"] = "9223372036854771712\n"
    assert (linux(files).limit, linux(files).limit_left) == (None, None)


def test_version_2_without_a_limit() -> None:
    found = linux({**V2, "/sys/fs/cgroup/system.slice/llama.service/memory.max": "max\n"})
    assert (found.limit, found.limit_left, found.capacity) == (None, None, found.total)


VM_STAT = """Mach Virtual Memory Statistics: (page size of 16384 bytes)
Pages free:                               10000.
Pages active:                            300000.
Pages inactive:                           20000.
Pages speculative:                         3000.
Pages throttled:                              0.
Pages wired down:                        100000.
Pages purgeable:                            400.
"Translation faults":                 123456789.
"""


def test_a_mac() -> None:
    commands = {
        "sysctl -n hw.memsize": "17179869184\n",
        "sysctl -n hw.optional.arm64": "1\n",
        "sysctl -n machdep.cpu.brand_string": "Apple M2\n",
        "sysctl -n vm.swapusage": "total = 2048.00M  used = 1024.50M  free = 1023.50M  (encrypted)\n",
        "sysctl -n iogpu.wired_limit_mb": "0\n",
        "vm_stat": VM_STAT,
    }
    found = probe(machine("Darwin", {}, commands))
    assert found == Device(
        name="Apple M2",
        system="Darwin",
        total=16 * GIB,
        available=33400 * 16384,
        swap_total=2048 * MIB,
        swap_free=int(1023.5 * MIB),
        unified=True,
        gpus=(Gpu("Apple M2", None, None),),
    )
    raised = probe(machine("Darwin", {}, {**commands, "sysctl -n iogpu.wired_limit_mb": "14336\n"}))
    assert raised.gpus[0].total == 14336 * MIB
    intel = probe(machine("Darwin", {}, {**commands, "sysctl -n hw.optional.arm64": ""}))
    assert (intel.unified, intel.gpus) == (None, ())


def test_half_an_answer_is_no_answer() -> None:
    assert available_bytes(VM_STAT.replace("Pages free", "Pages fre")) is None
    assert available_bytes("") is None


def test_a_windows_machine() -> None:
    from mopeq_edge.memory.device_windows import QUERY

    sizes = {"TotalVisibleMemorySize": 16608992, "FreePhysicalMemory": 9123456}
    sizes |= {"TotalVirtualMemorySize": 19092192, "FreeVirtualMemory": 10123456}
    command = f"powershell -NoProfile -Command {QUERY}"
    gpu = {NVIDIA_SMI: "NVIDIA GeForce RTX 3060, 12288, 11000\r\n"}
    found = probe(machine("Windows", {}, {command: json.dumps(sizes), **gpu}))
    assert found == Device(
        name=None,
        system="Windows",
        total=16608992 * KIB,
        available=9123456 * KIB,
        swap_total=(19092192 - 16608992) * KIB,
        swap_free=1000000 * KIB,
        unified=False,
        gpus=(Gpu("NVIDIA GeForce RTX 3060", 12288 * MIB, 11000 * MIB),),
    )


@pytest.mark.parametrize("system", ["Linux", "Darwin", "Windows", "FreeBSD", ""])
def test_where_nothing_says_anything_all_is_unknown(system: str) -> None:
    found = probe(machine(system, {}, {}))
    assert found == Device(None, system, None, None, None, None, None)
    assert (found.usable, found.capacity) == (None, None)


def test_no_swap_is_0_and_not_unknown() -> None:
    text = MEMINFO.replace("3900192", "0").replace("3800000", "0")
    found = linux({"/proc/meminfo": text})
    assert (found.swap_total, found.swap_free) == (0, 0)


def test_this_machine() -> None:
    import platform

    if platform.system() != "Linux":
        pytest.skip("reads /proc")
    found = probe()
    assert found.total is not None
    assert found.available is not None
    assert 0 < found.available <= found.total
