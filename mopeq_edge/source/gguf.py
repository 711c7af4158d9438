"""A GGUF file as a :class:`Source`, whatever its types: quantized weights are dequantized by libggml."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from mopeq_edge.errors import SourceError
from mopeq_edge.expert_groups.read import is_part
from mopeq_edge.ggml.library import bf16_to_f32, load_ggml
from mopeq_edge.ggml.types import BF16, F16, F32, GgmlType
from mopeq_edge.gguf_file import KV
from mopeq_edge.model_keys import check_model_keys
from mopeq_edge.source.file_bytes import read_bytes
from mopeq_edge.source.model import Bytes, Floats, SourceTensor, mark_mtp, require_finite
from mopeq_edge.split import read_parts
from mopeq_edge.vision.mmproj import is_mmproj

_INTEGERS: Mapping[str, str] = {"I8": "<i1", "I16": "<i2", "I32": "<i4", "I64": "<i8", "F64": "<f8"}


class GGUFSource:
    """One GGUF, split or not: ``path`` is the first file.

    Raises :class:`FormatError` if it is damaged, :class:`SourceError` if it is not supported.
    """

    kind = "gguf"

    def __init__(self, path: Path) -> None:
        headers = read_parts(path)
        self.path = path
        self.files: tuple[Path, ...] = tuple(header.path for header in headers)
        self.kvs: Mapping[str, KV] = {k: kv for k, kv in headers[0].kvs.items() if not k.startswith("split.")}
        architecture = headers[0].get("general.architecture")
        if not isinstance(architecture, str):
            raise SourceError(f"{path}: has no general.architecture, so it holds no model that llama.cpp can run")
        self.architecture = architecture
        infos = [info for header in headers for info in header.tensors]
        if is_mmproj(headers[0]):
            raise SourceError(f"{path}: is no model but what sees pictures for one (mmproj); give the model's own file")
        check_model_keys(path, self.kvs, ((info.name, info.shape) for info in infos))
        for info in infos:
            if math.prod(info.shape[3:]) != 1:
                raise SourceError(f"{path}: tensor '{info.name}' has shape {list(info.shape)}, expected 3 axes at most")
            if is_part(info.name):
                raise SourceError(
                    f"{path}: tensor '{info.name}': a file of the per-expert layout, its experts are already in groups "
                    "of different types; give the model that it was made of (mopeq-edge inspect describes this one)"
                )
        tensors = (SourceTensor(info.name, info.shape[:3], info.type) for info in infos)
        self.tensors = mark_mtp(tensors, architecture, self.kvs)
        self._place_of = {
            i.name: (header.path, header.data_start + i.offset) for header in headers for i in header.tensors
        }
        """File of each tensor, and where its data begins in it."""
        self.warnings = tuple(_warnings(path, self.tensors))

    def read(self, tensor: SourceTensor, matrix: int = 0, rows: slice | None = None) -> Floats:
        return self._decode(tensor, matrix, self._read_raw(tensor, matrix, rows))

    def read_stored(self, tensor: SourceTensor, matrix: int = 0, rows: slice | None = None) -> Bytes:
        raw = self._read_raw(tensor, matrix, rows)
        self._decode(tensor, matrix, raw)
        return raw

    def _read_raw(self, tensor: SourceTensor, matrix: int, rows: slice | None) -> Bytes:
        if not 0 <= matrix < tensor.n_matrices:
            raise IndexError(f"{tensor.name}: no matrix {matrix} of {tensor.n_matrices}")
        start, stop, step = (rows or slice(None)).indices(tensor.n_out)
        if step != 1:
            raise ValueError(f"{tensor.name}: rows must be contiguous, got a step of {step}")
        n_rows, row_bytes = max(stop - start, 0), tensor.type.nbytes(tensor.n_in)
        path, data_start = self._place_of[tensor.name]
        first = data_start + (matrix * tensor.n_out + start) * row_bytes
        return read_bytes(path, first, n_rows * row_bytes).reshape(n_rows, row_bytes)

    def _decode(self, tensor: SourceTensor, matrix: int, raw: Bytes) -> Floats:
        return require_finite(_dequantize(tensor.type, raw, tensor.n_in), self.path, tensor, matrix)


def _dequantize(kind: GgmlType, raw: Bytes, n_in: int) -> Floats:
    # The plain types need no library, so that a BF16 GGUF can be read before llama.cpp is built
    if kind is F32:
        return raw.view("<f4")
    if kind is F16:
        return raw.view("<f2").astype(np.float32)
    if kind is BF16:
        return bf16_to_f32(raw.view("<u2"))
    if kind.name in _INTEGERS:
        return raw.view(_INTEGERS[kind.name]).astype(np.float32)
    return load_ggml().dequantize(kind, raw, n_in)


def _warnings(path: Path, tensors: tuple[SourceTensor, ...]) -> list[str]:
    total = sum(tensor.n_weights for tensor in tensors)
    quantized: Counter[str] = Counter()
    for tensor in tensors:
        if tensor.type.is_quantized:
            quantized[tensor.type.name] += tensor.n_weights
    if not quantized:
        return []
    shares = ", ".join(f"{name} {n / total:.1%}" for name, n in quantized.most_common())
    return [
        f"{path}: {sum(quantized.values()) / total:.1%} of the weights are already quantized ({shares}); "
        "what that lost stays lost and quantizing again adds to it; better give the original checkpoint or a BF16 GGUF"
    ]
