"""Which weights llama.cpp's CPU backend copies into an order of its own, by what the CPU can do.

Such weights have a buffer of their own. Under mmap the file's pages of them stay mapped and count as resident, but
nothing reads them again: they are the first that the kernel can drop. Facts: ``ggml/src/ggml-cpu/repack.cpp``.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from mopeq_edge.ggml.types import GgmlType
from mopeq_edge.memory.model import StoredTensor

X86: Mapping[str, tuple[tuple[str, int], ...]] = {
    "avx2": (("Q4_0", 8), ("Q4_K", 8), ("IQ4_NL", 8), ("MXFP4", 8)),
    "avx512f": (("Q2_K", 8),),
}
"""CPU flag as /proc/cpuinfo has it: types, and what the number of rows must be a multiple of."""

_ARM_EITHER = (("Q4_0", 4), ("Q8_0", 4), ("Q1_0", 4), ("Q4_K", 8), ("Q5_K", 8), ("Q6_K", 8))
ARM: Mapping[str, tuple[tuple[str, int], ...]] = {
    "asimddp": (*_ARM_EITHER, ("IQ4_NL", 4), ("MXFP4", 4)),
    "i8mm": _ARM_EITHER,
}


@dataclass(frozen=True)
class Cpu:
    """A CPU as far as repacking asks: machine as ``uname -m`` has it, flags as the kernel does."""

    machine: str
    flags: frozenset[str]

    @property
    def repacked(self) -> dict[str, int]:
        """Types by name, and what the number of rows must be a multiple of."""
        table = X86 if self.machine in ("x86_64", "AMD64", "i686") else ARM
        return {name: rows for flag, types in table.items() if flag in self.flags for name, rows in types}

    @property
    def tiled(self) -> bool:
        """Whether matrices are multiplied by tiles, which takes a workspace for each thread."""
        return bool(self.flags & {"avx", "avx2", "avx512_vnni"})


def this_cpu(cpuinfo: Path = Path("/proc/cpuinfo"), machine: Callable[[], str] = platform.machine) -> Cpu:
    """The CPU that this runs on; where the kernel says nothing of it, what all of its kind can do."""
    name = machine()
    try:
        text = cpuinfo.read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    for line in text.splitlines():
        key, _, value = line.partition(":")
        if key.strip() in ("flags", "Features"):
            return Cpu(name, frozenset(value.split()))
    # Apple's and Windows' ARM machines all have dot products; an x86 without AVX2 runs no LLM of use
    return Cpu(name, frozenset(("asimddp", "i8mm") if name in ("arm64", "aarch64") else ("avx", "avx2")))


def is_repacked(tensor: StoredTensor, cpu: Cpu) -> bool:
    """Whether the CPU backend makes a copy of ``tensor`` in another order."""
    rows = cpu.repacked.get(tensor.type.name)
    if rows is None or len(tensor.shape) < 2 or tensor.shape[1] % rows or tensor.shape[1] == 1:
        return False
    if tensor.name.startswith(("token_embd.", "per_layer_token_embd.")):
        return False
    stacked = len(tensor.shape) == 3 and tensor.shape[2] > 1
    # matrices of a head each (MLA) are multiplied by an op that knows no other order
    return stacked == tensor.stack.endswith("_exps.weight")


def repacked_types(tensors: Iterable[StoredTensor], cpu: Cpu) -> tuple[GgmlType, ...]:
    """The types of ``tensors`` that are copied, each once."""
    return tuple(dict.fromkeys(t.type for t in tensors if is_repacked(t, cpu)))
