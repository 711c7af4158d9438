"""Cut the stacks of finished GGUF files into expert groups with the gguf package: bytes move, nothing is quantized."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt

from .architectures import finish, is_stack

Tensors = dict[str, tuple[npt.NDArray[Any], gguf.GGMLQuantizationType]]
"""Data in numpy's order of dimensions and type, by name, in writing order."""

Assign = Callable[[str, int], int]
"""(name of the stack, expert) to the number of its group, from 0."""


def by_turns(n_groups: int) -> Assign:
    """Groups of nearly equal size in an order that no group has consecutive experts in."""
    return lambda name, expert: (expert * 5 + len(name)) % n_groups


def regroup(
    sources: Sequence[Path],
    path: Path,
    assign: Assign,
    version: int | None = 1,
    change: Callable[[Tensors], None] = lambda tensors: None,
) -> Path:
    """Write ``path`` as the first of ``sources`` with grouped stacks, and return it.

    Group g takes its experts from file g modulo the number of ``sources``: files of one model in several types.
    ``change`` may do anything to the tensors before they are written.
    """
    readers = [gguf.GGUFReader(source) for source in sources]
    stacks = [{t.name: t for t in reader.tensors if is_stack(t.name)} for reader in readers]
    tensors: Tensors = {}
    for tensor in readers[0].tensors:
        if is_stack(tensor.name):
            tensors |= _grouped(tensor.name, [own[tensor.name] for own in stacks], assign)
        else:
            tensors[tensor.name] = tensor.data, tensor.tensor_type
    change(tensors)
    writer = gguf.GGUFWriter(path, readers[0].fields["general.architecture"].contents())
    copy_keys(readers[0], writer)
    if version is not None:
        writer.add_uint32("mopeq.expert_groups.version", version)
    for name, (data, kind) in tensors.items():
        writer.add_tensor(name, data, raw_shape=data.shape, raw_dtype=kind)
    finish(writer)
    return path


def _grouped(name: str, sources: Sequence[gguf.ReaderTensor], assign: Assign) -> Tensors:
    tensors: Tensors = {}
    n_expert = sources[0].data.shape[0]
    group_of = np.array([assign(name, expert) for expert in range(n_expert)])
    used = np.unique(group_of)
    rows = np.full((n_expert, len(used)), -1, dtype=np.int32)
    stem = name.removesuffix(".weight")
    for g, number in enumerate(used):
        experts = np.flatnonzero(group_of == number)
        rows[experts, g] = np.arange(len(experts))
        source = sources[int(number) % len(sources)]
        tensors[f"{stem}.{g}.weight"] = np.ascontiguousarray(source.data[experts]), source.tensor_type
    tensors[f"{stem}.map"] = rows, gguf.GGMLQuantizationType.I32
    return tensors


def copy_keys(reader: gguf.GGUFReader, writer: gguf.GGUFWriter) -> None:
    """All keys but the architecture, which the writer has."""
    for key, kv in reader.fields.items():
        if key.startswith("GGUF.") or key == "general.architecture":
            continue
        inner = kv.types[1] if kv.types[0] is gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(key, kv.contents(), kv.types[0], inner)
