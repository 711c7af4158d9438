"""NVIDIA GPUs of this machine, as nvidia-smi tells them."""

from __future__ import annotations

import re
import subprocess

from mopeq_edge.errors import RuntimeMissingError

_SMI = "nvidia-smi"
_SECONDS = 30


def has_gpu() -> bool:
    """Whether nvidia-smi lists a GPU; False where it is missing or fails."""
    return any(line.startswith("GPU ") for line in _ask("-L"))


def cuda_backend(arch: str | None = None) -> str:
    """Name of the CUDA backend, e.g. "cuda87" for compute capability 8.7.

    ``arch`` is "87" or "8.7", by default that of this machine's oldest GPU, whose code newer ones run too.
    Raises RuntimeMissingError if none is given or found, or if it is no compute capability.
    """
    if arch is not None:
        plain = arch.replace(".", "")
        if not re.fullmatch(r"[0-9]{2,3}", plain):
            raise RuntimeMissingError(
                f"--cuda-arch {arch}: expected a compute capability such as 87 (Jetson Orin) or 8.7, found '{arch}'"
            )
        return f"cuda{plain}"
    told = [
        re.fullmatch(r"(\d+)\.(\d)", line.strip()) for line in _ask("--query-gpu=compute_cap", "--format=csv,noheader")
    ]
    found = sorted((int(match[1]), int(match[2])) for match in told if match)
    if not found:
        raise RuntimeMissingError(
            f"{_SMI} names no GPU with a compute capability; give it with --cuda-arch, for example 87 for Jetson Orin"
        )
    return f"cuda{found[0][0]}{found[0][1]}"


def cuda_arch(backend: str) -> str | None:
    """ "87" of "cuda87", None for a backend that is not CUDA."""
    match = re.fullmatch(r"cuda([0-9]{2,3})", backend)
    return match[1] if match else None


def _ask(*options: str) -> list[str]:
    try:
        done = subprocess.run(
            [_SMI, *options],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            encoding="utf-8",
            errors="replace",
            timeout=_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return []
    return done.stdout.splitlines() if done.returncode == 0 else []
