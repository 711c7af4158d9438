"""Devices played back from the real formats of their files and commands."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest

from mopeq_edge.device_report.machine import describe, power_mode
from mopeq_edge.memory.device import Machine

MEMINFO = "MemTotal:        7800396 kB\nMemAvailable:    5120044 kB\nSwapTotal:       3900192 kB\n"

NVIDIA_SMI_ORIN = """Tue Nov 25 10:11:12 2025
+---------------------------------------------------------------------------------------+
| NVIDIA-SMI 540.4.0                Driver Version: 540.4.0      CUDA Version: 12.6     |
|-----------------------------------------+----------------------+----------------------+
|   0  Orin (nvgpu)                  N/A  | N/A              N/A |                  N/A |
+---------------------------------------------------------------------------------------+
"""

NVIDIA_SMI_LAPTOP = """Tue Nov 25 10:11:12 2025
+-----------------------------------------------------------------------------------------+
| NVIDIA-SMI 560.35.03              Driver Version: 560.35.03      CUDA Version: 12.6     |
+-----------------------------------------------------------------------------------------+
"""

NVCC = """nvcc: NVIDIA (R) Cuda compiler driver
Copyright (c) 2005-2024 NVIDIA Corporation
Built on Wed_Aug_14_10:14:07_PDT_2024
Cuda compilation tools, release 12.6, V12.6.68
Build cuda_12.6.r12.6/compiler.34714021_0
"""

LSCPU = """Architecture:                       aarch64
CPU op-mode(s):                     32-bit, 64-bit
Vendor ID:                          ARM
Model name:                         Cortex-A78AE
Model:                              1
"""

OURS = "nvidia-smi --query-gpu=name,driver_version,compute_cap,power.limit --format=csv,noheader,nounits"
MEMORY = "nvidia-smi --query-gpu=name,memory.total,memory.free --format=csv,noheader,nounits"


def machine(system: str, files: Mapping[str, str], commands: Mapping[str, str]) -> Machine:
    def run(command: Sequence[str]) -> str | None:
        return commands.get(" ".join(command))

    return Machine(system, files.get, run)


ORIN = machine(
    "Linux",
    {
        "/proc/meminfo": MEMINFO,
        "/proc/device-tree/model": "NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super\0",
        "/proc/device-tree/compatible": "nvidia,p3768-0000+p3767-0005-super\0nvidia,p3767-0005\0nvidia,tegra234\0",
        "/proc/cpuinfo": "processor\t: 0\nBogoMIPS\t: 62.50\nCPU implementer\t: 0x41\nCPU part\t: 0xd42\n",
        "/proc/self/status": "Name:\tpython3\nCpus_allowed:\t3d\nCpus_allowed_list:\t0,2-5\n",
        "/sys/devices/system/cpu/present": "0-5\n",
        "/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor": "schedutil\n",
        "/etc/os-release": 'NAME="Ubuntu"\nVERSION_ID="22.04"\nPRETTY_NAME="Ubuntu 22.04.5 LTS"\n',
        "/etc/nv_tegra_release": "# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic, EABI: aarch64\n",
    },
    {
        "uname -m": "aarch64\n",
        "uname -r": "5.15.148-tegra\n",
        "lscpu": LSCPU,
        OURS: "Orin (nvgpu), 540.4.0, [N/A], [N/A]\n",
        MEMORY: "Orin (nvgpu), [N/A], [N/A]\n",
        "nvidia-smi": NVIDIA_SMI_ORIN,
        "/usr/local/cuda/bin/nvcc --version": NVCC,
        "nvpmodel -q": "NV Power Mode: MAXN_SUPER\n2\n",
    },
)


def test_a_jetson() -> None:
    assert describe(ORIN) == {
        "board": "NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super",
        "soc": "nvidia,tegra234",
        "architecture": "aarch64",
        "cpu": "Cortex-A78AE",
        "cpu_cores_count": 6,
        "cpu_cores_usable_count": 5,
        "cpu_governor": "schedutil",
        "system": "Linux",
        "os": "Ubuntu 22.04.5 LTS",
        "kernel": "5.15.148-tegra",
        "l4t": "R36.4.3",
        "memory_total_bytes": 7800396 * 1024,
        "memory_available_bytes": 5120044 * 1024,
        "memory_limit_bytes": None,
        "memory_unified": True,
        "swap_total_bytes": 3900192 * 1024,
        "gpus": [
            {
                "name": "Orin (nvgpu)",
                "driver_version": "540.4.0",
                "compute_capability": None,
                "power_limit_watts": None,
            }
        ],
        "gpu_memory_total_bytes": [None],
        "cuda_driver": "12.6",
        "cuda_toolkit": "12.6",
        "power_mode": "MAXN_SUPER (2)",
    }


def test_a_laptop_with_a_gpu() -> None:
    found = describe(
        machine(
            "Linux",
            {
                "/proc/meminfo": MEMINFO,
                "/sys/class/dmi/id/sys_vendor": "LENOVO\n",
                "/sys/class/dmi/id/product_name": "21D6CTO1WW\n",
                "/proc/cpuinfo": "processor\t: 0\nmodel name\t: 12th Gen Intel(R) Core(TM) i7-12800H\n",
                "/sys/devices/system/cpu/present": "0-19\n",
            },
            {
                OURS: "NVIDIA RTX A1000 Laptop GPU, 560.35.03, 8.6, 35.00\n",
                MEMORY: "NVIDIA RTX A1000 Laptop GPU, 4096, 3800\n",
                "nvidia-smi": NVIDIA_SMI_LAPTOP,
            },
        )
    )
    assert (found["board"], found["cpu"]) == ("LENOVO 21D6CTO1WW", "12th Gen Intel(R) Core(TM) i7-12800H")
    assert found["cpu_cores_count"] == 20
    assert found["gpus"][0]["compute_capability"] == "8.6"
    assert found["gpus"][0]["power_limit_watts"] == 35.0
    assert found["gpu_memory_total_bytes"] == [4096 * 2**20]
    assert (found["memory_unified"], found["cuda_driver"], found["cuda_toolkit"]) == (False, "12.6", None)


def test_a_mac() -> None:
    commands = {
        "sysctl -n hw.model": "Mac14,2\n",
        "sysctl -n machdep.cpu.brand_string": "Apple M2\n",
        "sysctl -n hw.ncpu": "8\n",
        "sysctl -n hw.memsize": "17179869184\n",
        "sw_vers -productVersion": "15.1\n",
        "uname -m": "arm64\n",
    }
    found = describe(machine("Darwin", {}, commands))
    assert (found["board"], found["cpu"], found["cpu_cores_count"]) == ("Mac14,2", "Apple M2", 8)
    assert (found["os"], found["memory_total_bytes"]) == ("macOS 15.1", 2**34)


@pytest.mark.parametrize("system", ["Linux", "Darwin", "Windows", "Plan9"])
def test_what_nothing_says_is_unknown(system: str) -> None:
    """Never 0, and never something of the machine that the tests run on."""
    found = describe(machine(system, {}, {}))
    assert {name: value for name, value in found.items() if value not in (None, [])} == {"system": system}


def test_power_modes() -> None:
    assert power_mode("NVPM WARN: fan mode is not set!\nNV Power Mode: 15W\n0\n") == "15W (0)"
    assert power_mode("NV Power Mode: MODE_30W_ALL\n") == "MODE_30W_ALL"
    assert power_mode("nvpmodel: permission denied") is None
    assert power_mode(None) is None
