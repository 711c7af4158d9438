"""llama-quantize's presets beside a plan: their types by its dry run, their exact bytes, their damage by our table."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mopeq_edge.errors import FormatError
from mopeq_edge.ggml.types import BY_NAME, GgmlType
from mopeq_edge.gguf_layout import layout, string, uint32
from mopeq_edge.imatrix import read_imatrix
from mopeq_edge.output_kvs import QUANTIZATION_VERSION
from mopeq_edge.plan.artifact import Plan
from mopeq_edge.progress import Progress
from mopeq_edge.runtime.tools import run_tool
from mopeq_edge.sensitivity.table import SensitivityTable
from mopeq_edge.split import read_parts
from mopeq_edge.study.presets import PRESETS

_LINE = re.compile(r"^\[\s*\d+/\s*\d+\]\s+(\S+)\s+- \[.*-> .*\((\w+)\)\s*$")


@dataclass(frozen=True)
class Preset:
    """``damage`` by the plan's score; None if a type of it was not measured."""

    name: str
    file_bytes: int
    damage: float | None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def dry_run_types(said: str) -> dict[str, GgmlType]:
    """The type of every tensor that ``llama-quantize --dry-run`` says it would change, by name.

    Raises :class:`FormatError` for a type that is not known, and if there is no line of a tensor.
    """
    types: dict[str, GgmlType] = {}
    by_lower = {name.lower(): kind for name, kind in BY_NAME.items()}
    for line in said.splitlines():
        found = _LINE.match(line)
        if found is None:
            continue
        kind = by_lower.get(found[2].lower())
        if kind is None:
            raise FormatError(f"llama-quantize --dry-run: says type '{found[2]}', which is not known")
        types[found[1]] = kind
    if not types:
        raise FormatError("llama-quantize --dry-run: expected a line for every tensor, found none")
    return types


def presets(
    plan: Plan, table: SensitivityTable, source: Path, imatrix: Path, largest: int, progress: Progress
) -> tuple[Preset, ...]:
    """The presets of at most ``largest`` bytes, smallest first, with an ``imatrix`` in the folder of ``source``.

    Sizes are of the file that llama-quantize writes when it is started in that folder, to the byte. Raises
    :class:`RuntimeMissingError` without llama.cpp's tools, :class:`FormatError` for a dry run of another form.
    """
    headers = read_parts(source)
    tensors = [info for header in headers for info in header.tensors]
    read = read_imatrix(imatrix)
    kvs = {key: value for key, value in headers[0].kvs.items() if not key.startswith("split.")}
    kvs["general.file_type"] = uint32(0)
    kvs["general.quantization_version"] = uint32(QUANTIZATION_VERSION)
    kvs["quantize.imatrix.file"] = string(imatrix.name)
    if read.datasets:
        # llama-quantize cuts it there
        cut = read.datasets[0].encode()[:127].decode(errors="ignore")
        kvs["quantize.imatrix.dataset"] = string(cut)
    kvs["quantize.imatrix.entries_count"] = uint32(0)
    kvs["quantize.imatrix.chunks_count"] = uint32(0)
    found = []
    with progress.step("llama-quantize's presets", len(PRESETS)) as step:
        for name in PRESETS:
            args = ["--dry-run", "--imatrix", imatrix.name, source.name, name]
            types = dry_run_types(run_tool("llama-quantize", args, cwd=source.parent))
            specs = [(t.name, t.shape, types.get(t.name, t.type)) for t in tensors]
            size = layout(kvs, specs).file_size
            if size <= largest:
                every = {t.name: types.get(t.name, t.type) for t in tensors}
                found.append(Preset(name, size, _damage(plan, table, every)))
            step.advance()
    return tuple(sorted(found, key=lambda preset: (preset.file_bytes, preset.name)))


def _damage(plan: Plan, table: SensitivityTable, types: Mapping[str, GgmlType]) -> float | None:
    total = 0.0
    for name, errors in table.errors.items():
        kind = types.get(name)
        if kind is None or kind.name not in errors.types:
            return None
        total += float(errors.damage[plan.sensitivity][errors.types.index(kind.name)].sum())
    return total
