"""llama-quantize's presets: which of them come nearest to a size from below, and their files."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from mopeq_edge.errors import FormatError
from mopeq_edge.pipeline import imatrix_file, source_gguf
from mopeq_edge.runtime.tools import run_tool
from mopeq_edge.study.setup import Setup

PRESETS: tuple[str, ...] = (
    *("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M", "Q2_K_S", "Q2_K", "IQ3_XXS", "IQ3_XS", "IQ3_S", "IQ3_M"),
    *("Q3_K_S", "Q3_K_M", "Q3_K_L", "IQ4_XS", "IQ4_NL", "Q4_K_S", "Q4_K_M", "Q5_K_S", "Q5_K_M", "Q6_K", "Q8_0"),
)
NEAREST = 2
"""Presets below each budget."""

_SIZE = re.compile(r"quant size\s*=\s*([\d.]+) MiB")


def preset_sizes(setup: Setup) -> dict[str, int]:
    """Bytes of tensor data of every preset, by llama-quantize's dry run: it says them to 0.01 MiB, this is the most."""
    sizes: dict[str, int] = {}
    for preset in PRESETS:
        said = run_tool("llama-quantize", ["--dry-run", *_imatrix(setup), source_gguf(setup.context), preset])
        found = _SIZE.search(said)
        if found is None:
            raise FormatError(f"llama-quantize --dry-run {preset}: expected 'quant size = N MiB', found no such line")
        sizes[preset] = int((float(found[1]) + 0.005) * 2**20)
    return sizes


def nearest_below(sizes: Mapping[str, int], header: int, limit: int) -> Sequence[str]:
    """The :data:`NEAREST` presets of the largest files of at most ``limit`` bytes, largest first.

    ``header`` bytes come on top of the ``sizes``; ours will do, which has a few key-values more than theirs.
    """
    fitting = [(size, preset) for preset, size in sizes.items() if size + header <= limit]
    return [preset for _, preset in sorted(fitting, reverse=True)[:NEAREST]]


def write_preset(setup: Setup, preset: str, path: Path) -> None:
    """Let llama-quantize write ``path`` with the imatrix that the plans are quantized with."""
    source, threads = source_gguf(setup.context), str(setup.context.threads)
    run_tool("llama-quantize", [*_imatrix(setup), source, path, preset, threads])


def _imatrix(setup: Setup) -> list[str | Path]:
    return ["--imatrix", setup.context.work.file(imatrix_file(setup.table.quantized_with))]
